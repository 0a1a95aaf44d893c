"""Compiles the kernels without a card, at configurations that the package launches, and prints what became of them.

    python tests/contrast/compile_kernels.py 90        every case, for this compute capability
    python tests/contrast/compile_kernels.py sizes     how often each kernel is compiled over changing batch sizes
    python tests/contrast/compile_kernels.py write     all capabilities, into results/kernels.csv

The launchers run with tensors that have shapes only and a driver that only names a card: each launch is compiled with
the types and numbers of its real arguments, and not run. One row a launch, with registers, spilled bytes and shared
memory as the assembler says, and bytes moved and what may leave 32 bits as its text says (`index_ranges`); PyTorch's
own launches have rows too.
"""
import csv
import io
import json
import re
import sys
from collections import Counter
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path

import torch
from index_ranges import ranges
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor

from softnce.contrast import triton_candidates, triton_common, triton_sums

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CAPABILITIES = 80, 90, 100
SHARED = {80: 163*1024, 90: 227*1024, 100: 227*1024}  # bytes that a program may have
LEDGER = Path(__file__).parents[2]/'results'/'kernels.csv'
COLUMNS = ['capability', 'case', 'launch', 'kernel', 'warps', 'registers', 'spilled', 'shared', 'ctas', 'programs',
           'mib', 'floor_mib', 'overflows', 'floats', 'tensor_cores', 'wide', 'triton']
NO_LAUNCH = {'promote_types', 'empty', 'empty_like', 'new_empty', 'view', '_unsafe_view', 'as_strided', 't',
             'transpose', 'slice', 'select', 'expand', 'unbind', 'unsqueeze', 'squeeze', 'detach', 'alias',
             'empty_strided', 'permute', 'diagonal'}
MULTIPROCESSORS = 132  # of an H100


class NamesACard:
    "A driver for compiling only."
    def __init__(self, capability): self.target = GPUTarget('cuda', capability, 32)
    def get_current_target(self): return self.target
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0


class Launches(TorchDispatchMode):
    "Notes PyTorch's kernels among those of Triton."
    def __init__(self, notes): super().__init__(); self.notes = notes
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH: self.notes.append((f'torch: {name}', None))
        return func(*args, **(kwargs or {}))


def full(dtype): return torch.promote_types(dtype, F32)


class Case:
    "Inputs of a sum, made before its launches are counted; what its loaded integers reach; the fewest bytes."
    def __init__(self, run, *args, classes=0, entries=0):
        self.run, self.args = run, args
        ids, x = (0, max(classes - 1, 0)), args[0]
        self.loaded = dict(IDS=ids, OWN_IDS=ids, LABEL=ids, KEYS=ids, ENTRY=(0, max(entries - 1, 0)),
                           BEGIN=(0, entries))
        self.floor = 2*x.numel()*x.element_size()
    def __call__(self): self.run(*self.args)


class Maker:
    "Tensors of a case: on 'meta' they have no memory."
    def __init__(self, dtype, device='meta'): self.dtype, self.device = dtype, device
    def full(self, *shape): return torch.ones(shape, dtype=full(self.dtype), device=self.device)
    def logits(self, *shape): return torch.zeros(shape, dtype=self.dtype, device=self.device)
    def ids(self, *shape): return torch.zeros(shape, dtype=torch.long, device=self.device)


def class_case(dtype, K, S=2, two=False, own=False, probs=False, eta=True, grad=True, N=8192, device='meta'):
    make = Maker(dtype, device)
    ids, w = (None, None) if probs else (make.ids(N, S), make.full(N, S))
    offset = make.full(1, K) if own or two else None
    return Case(class_sums_and_gradient if grad else lambda *args: triton_sums.class_totals(*args, False),
                make.logits(N, K), ids, w, make.full(N), make.full(N, K) if probs else None, offset,
                make.full(N) if own else None, make.full(K) if eta else None, [.3, .6] if two else [1.], .5, classes=K)


def class_sums_and_gradient(*args):
    total, stats = triton_sums.class_totals(*args, True)
    triton_sums.class_gradient(total, 1., stats, *args)


def counted_case(dtype, K, N=8192, device='meta'):
    make = Maker(dtype, device)
    return Case(counts_and_gradient, make.logits(N, K), make.ids(N, 1), make.full(N, 1), make.full(K), make.full(K), 1.,
                .5, True, classes=K)


def counts_and_gradient(*args):
    total, stats = triton_sums.count_totals(*args, True)
    triton_sums.count_gradient(total, 1., stats, *args)


def expected_case(dtype, K, S=2, probs=False, counts=False, N=8192, device='meta'):
    make = Maker(dtype, device)
    ids, like = None if probs else make.ids(N, S), make.full(N)
    return Case(expected_sums_and_gradient, make.logits(N, K), ids, None if probs else make.full(N, S),
                None if probs or counts else like, make.full(N, K) if probs else None,
                None if counts else make.full(1, K), make.ids(N), None if counts else like, make.full(K), .5,
                make.full(K) if counts else None, classes=K)


def expected_sums_and_gradient(*args):
    total, stats = triton_sums.expected_totals(*args, True)
    triton_sums.expected_gradient(total, 1., stats, *args)


def sparse_case(dtype, K, S=2, M=None, one=False, share=False, eta=False, grad=True, N=8192, device='meta'):
    M, make = M or N, Maker(dtype, device)
    ids, w = make.ids(M, S), make.full(1 if one else M, S).expand(M, S)
    share = make.full(M) if share else None
    return Case(losses_and_gradient if grad else lambda *args: triton_sums.sparse_totals(*args, False),
                make.logits(N, K), ids, w, share, ids[:N], w[:N], None if share is None else share[:N],
                make.full(K) if eta else None, .5, True, one, 0, True, classes=K, entries=M*S)


def losses_and_gradient(*args):
    total, *left = triton_sums.sparse_totals(*args, True)
    triton_sums.sparse_gradient(total, 1., *left, *args)


def product_case(dtype, M, N=8192, device='meta'):
    return Case(triton_sums.softmax_without_own, Maker(dtype, device).logits(N, M), 0)


def dense_case(dtype, K, N=1024, M=1024, device='meta'):
    make = Maker(dtype, device)
    return Case(dense_losses_and_gradient, make.logits(N, K), make.full(M, K), None, make.full(K), .5, 0)


def dense_losses_and_gradient(*args):
    total, gradient = triton_sums.dense_totals(*args, True)
    triton_sums.dense_gradient(total, 1., gradient, *args)


NAMES = {BF16: 'bf16', F16: 'fp16', F32: 'fp32', F64: 'fp64'}
CASES = {}


def add(kind, make, dtype, K, note='', **options):
    rows = f", N={options['N']}" if 'N' in options else ''
    CASES[f"{kind}, {NAMES[dtype]}, K={K}{rows}{', '*bool(note)}{note}"] = lambda: make(dtype, K, **options)


# a row in one block, from the smallest warps to the most; the largest block; longer rows; K no multiple of 16
for dtype, K in [(BF16, 10), (BF16, 1000), (F16, 1000), (F32, 1000), (F32, 1001), (F32, 4096), (F32, 16384),
                 (F32, 21841), (BF16, 21841), (BF16, 32768), (F32, 65536), (BF16, 65536),
                 (F32, 100_000), (F64, 1000), (F64, 4096), (F64, 100_000)]:
    add('classes', class_case, dtype, K)
for dtype, K in [(F32, 1000), (BF16, 32768), (F32, 65536), (F64, 4096)]:
    add('classes', class_case, dtype, K, 'own offset', S=1, own=True)
    add('classes', class_case, dtype, K, 'dense', probs=True)
for dtype, K in [(F32, 1000), (F32, 16384), (F32, 65536), (F32, 100_000), (F64, 100_000)]:
    add('classes', class_case, dtype, K, 'two sums', two=True)
add('classes', class_case, F32, 100, 'S=32', S=32)
add('classes', class_case, F32, 1000, 'no gradient', grad=False)
for dtype, K in [(F32, 1000), (F32, 8192), (F32, 100_000), (F64, 1000), (F64, 2048)]:
    add('drawn labels', expected_case, dtype, K)
add('drawn labels', expected_case, BF16, 1000, 'dense', probs=True)
for dtype, K in [(F32, 1000), (BF16, 1000), (F32, 100_000)]:
    add('hard labels', counted_case, dtype, K)
    add('drawn labels', expected_case, dtype, K, 'counts', counts=True)
add('pairs', sparse_case, F32, 100, M=8192, one=True)
add('pairs', sparse_case, F32, 1000, M=20_000, one=True)
add('pairs', sparse_case, BF16, 1000, 'log eta', M=20_000, one=True, eta=True)
add('pairs', sparse_case, F32, 1000, 'no gradient', M=20_000, one=True, grad=False)
for dtype, S, share in [(BF16, 2, False), (F32, 2, False), (F32, 8, True), (F32, 32, False), (F64, 2, True)]:
    add('candidates', sparse_case, dtype, 1000, f"S={S}{', share'*share}", S=S, share=share, eta=share)
add('candidates', sparse_case, F32, 1000, 'N=64', N=64)
add('candidates', sparse_case, F32, 21841, 'no gradient', grad=False)
for dtype, M in [(F32, 1000), (F32, 1001), (F32, 32768), (F32, 40_000), (F32, 100_000), (F64, 4096), (F64, 100_000)]:
    add('product', product_case, dtype, M)
for dtype, K in [(F32, 1000), (BF16, 1000), (F32, 100_000), (F64, 1000)]:
    add('dense', dense_case, dtype, K)
# N x K = 2**33: where 32 bits would not do
for K in (2**10, 2**18):
    N = 2**33//K
    add('far: classes', class_case, F32, K, N=N, two=True)
    add('far: drawn labels', expected_case, F32, K, N=N)
    add('far: candidates', sparse_case, F32, K, N=N)
    add('far: product', product_case, F32, K, N=N)
add('far: pairs', sparse_case, F32, 4096, N=2**21, one=True)
add('far: candidates', sparse_case, F32, 2**22, N=2**11)


def programs_at_once(registers, warps, shared):
    "Programs of a kernel that fit a multiprocessor of 65,536 registers, 64 warps and 228 KiB of shared memory."
    each = -(-registers//8)*8*32*warps
    return min(32, 65536//each, 64//warps, 228*1024//(shared + 1024))


def usage(kernel, log, loaded, numbers, grid, floor):
    "What the assembler said of a kernel, and what its text says."
    stores, loads = map(int, re.search(r'(\d+) bytes spill stores, (\d+) bytes spill loads', log).groups())
    registers = int(re.search(r'Used (\d+) registers', log)[1])
    ptx, warps = kernel.asm['ptx'], kernel.metadata.num_warps
    overflows, moved = ranges(kernel.asm['ttir'], numbers, grid, loaded)
    large = {n for n, x in numbers.items() if isinstance(x, torch.Tensor) and 2*x.nbytes >= floor/2}  # as the logits
    signature = kernel.src.signature
    return dict(kernel=kernel.metadata.name, warps=warps, registers=registers, spilled=stores + loads,
                shared=kernel.metadata.shared, ctas=kernel.metadata.num_ctas,
                programs=programs_at_once(registers, warps, kernel.metadata.shared),
                mib=round(sum(b for n, b in moved.items() if n in large)/2**20, 1),
                floor_mib=round(floor/2**20, 1), overflows='; '.join(overflows),
                floats=' '.join(sorted({t for t in signature.values() if t.startswith('fp')})),
                tensor_cores='mma' in ptx, wide='.v4' in ptx)


def record_launches():
    "Kernels are compiled where they would be launched; the list of their names and what there is of them."
    launches, run = [], JITFunction.run
    def stand_in(x): return MockTensor(x.dtype) if isinstance(x, torch.Tensor) and x.is_meta else x
    def compiled(self, *args, grid, warmup, **kwargs):
        log = io.StringIO()
        with redirect_stdout(log):
            binary = run(self, *map(stand_in, args), grid=grid, warmup=True, **kwargs)
        numbers = dict(zip(self.arg_names, args)) | kwargs
        launches.append((self.__name__, (binary, log.getvalue(), numbers, grid)))
    JITFunction.run = compiled
    return launches


def rows_of(capability, cases=None):
    "A row for each launch of each case. In a process of its own for each capability: a process has one driver."
    driver.set_active(NamesACard(capability))
    triton_candidates.num_programs = lambda x: 4*MULTIPROCESSORS
    triton_common.has_clusters = lambda x: capability >= 90
    knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = True, True
    launches, logs = record_launches(), {}
    for name, make in (cases or CASES).items():
        launches.clear()
        case = make()
        with Launches(launches): case()
        for i, (kernel, what) in enumerate(launches):
            facts = dict(kernel=kernel)
            if what is not None:
                binary, log, numbers, grid = what
                log = logs.setdefault(binary.hash, log or logs.get(binary.hash, ''))
                facts = usage(binary, log, case.loaded, numbers, grid, case.floor)
            yield dict.fromkeys(COLUMNS, '') | dict(capability=capability, case=name, launch=i + 1,
                                                    triton=metadata.version('triton')) | facts


def compile_sizes():
    "Of each kernel: binaries over batches of 64, 33, 32 and 1 rows."
    driver.set_active(NamesACard(90))
    launches = record_launches()
    on_cpu = dict(device='cpu')
    for N in (64, 33, 32, 1):
        for case in (class_case(F32, 1000, N=N, **on_cpu), expected_case(F32, 1000, N=N, **on_cpu),
                     sparse_case(F32, 1000, N=N, M=2*N, **on_cpu), product_case(F32, 1024, N=N, **on_cpu),
                     sparse_case(F32, 20, N=N, M=8*N + 1, one=True, **on_cpu),
                     dense_case(F32, 1000, N=N, **on_cpu)): case()
    return Counter(name for name, _ in {(name, id(what[0])) for name, what in launches})


def write():
    "All capabilities, each in a process of its own, into the ledger."
    import subprocess
    rows = []
    for capability in CAPABILITIES:
        done = subprocess.run([sys.executable, __file__, str(capability)], check=True, capture_output=True, text=True)
        rows += [json.loads(line) for line in done.stdout.splitlines()]
    with open(LEDGER, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    if sys.argv[1] == 'sizes': print(json.dumps(compile_sizes()))
    elif sys.argv[1] == 'write': write()
    else:
        for row in rows_of(int(sys.argv[1])): print(json.dumps(row), flush=True)
