"""Compiles the kernels without a card, at configurations that the package launches, and prints what became of them.

    python tests/contrast/compile_kernels.py 90        the cases of every test run
    python tests/contrast/compile_kernels.py 90 all    more of them
    python tests/contrast/compile_kernels.py 90 sizes  how often each kernel is compiled over changing batch sizes

The launchers run with CPU tensors and a driver that only names a card: each launch is compiled with the types and
alignments of its real arguments, and not run. One JSON object a kernel, with registers, spilled bytes and shared
memory; and one a case, with all launches, those of PyTorch's own kernels too.
"""
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from softnce.contrast import triton_sums

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
NO_LAUNCH = {'promote_types', 'empty', 'empty_like', 'new_empty', 'view', '_unsafe_view', 'as_strided', 't',
             'transpose', 'slice', 'select', 'expand', 'unbind', 'unsqueeze', 'squeeze', 'detach', 'alias'}


class NamesACard:
    "A driver for compiling only."
    def __init__(self, capability): self.target = GPUTarget('cuda', capability, 32)
    def get_current_target(self): return self.target
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0


class Launches(TorchDispatchMode):
    "Counts PyTorch's kernels."
    def __enter__(self):
        self.names = []
        return super().__enter__()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH: self.names.append(name)
        return func(*args, **(kwargs or {}))


def full(dtype): return torch.promote_types(dtype, F32)


class Case:
    "Inputs of a sum, made before its launches are counted."
    def __init__(self, run, *args): self.run, self.args = run, args
    def __call__(self): self.run(*self.args)


def class_case(dtype, K, S=2, two=False, own=False, probs=False, eta=True, N=3):
    ids, w = (None, None) if probs else (torch.zeros(N, S, dtype=torch.long), torch.ones(N, S, dtype=full(dtype)))
    offset = torch.zeros(1, K, dtype=full(dtype)) if own or two else None
    return Case(triton_sums.class_sums, torch.zeros(N, K, dtype=dtype), ids, w, torch.ones(N, dtype=full(dtype)),
                torch.ones(N, K, dtype=full(dtype)) if probs else None, offset,
                torch.zeros(N, dtype=full(dtype)) if own else None, torch.zeros(K, dtype=full(dtype)) if eta else None,
                [.3, .6] if two else [1.], .5, True)


def expected_case(dtype, K, S=2, probs=False, N=3):
    like, ids = torch.ones(N, dtype=full(dtype)), None if probs else torch.zeros(N, S, dtype=torch.long)
    return Case(triton_sums.expected_sums, torch.zeros(N, K, dtype=dtype), ids,
                None if probs else torch.ones(N, S, dtype=full(dtype)), None if probs else like,
                torch.ones(N, K, dtype=full(dtype)) if probs else None, torch.zeros(1, K, dtype=full(dtype)),
                torch.zeros(N, dtype=torch.long), like, torch.zeros(K, dtype=full(dtype)), .5, True)


def sparse_case(dtype, K, S=2, M=40, one=False, share=False, eta=False, N=3):
    ids, w = torch.zeros(M, S, dtype=torch.long), torch.ones(1 if one else M, S, dtype=full(dtype)).expand(M, S)
    share = torch.ones(M, dtype=full(dtype)) if share else None
    return Case(triton_sums.sparse_sums, torch.zeros(N, K, dtype=dtype), ids, w, share, ids[:N], w[:N],
                None if share is None else share[:N], torch.zeros(K, dtype=full(dtype)) if eta else None, .5, True, one,
                0, True)


def product_case(dtype, M, N=3): return Case(triton_sums.softmax_without_own, torch.zeros(N, M, dtype=dtype), 0)


CASES = {
    'classes, bf16, K=1000': lambda: class_case(BF16, 1000),
    'classes, fp32, K=16384, two sums': lambda: class_case(F32, 16384, two=True),
    'classes, fp64, K=100000': lambda: class_case(F64, 100_000, two=True),
    'drawn labels, fp32, K=1000': lambda: expected_case(F32, 1000),
    'pairs, fp32, K=1000': lambda: sparse_case(F32, 1000, M=20_000, one=True),
    'candidates, fp32, S=2': lambda: sparse_case(F32, 1000),
    'candidates, fp32, S=8, share': lambda: sparse_case(F32, 1000, S=8, share=True, eta=True),
    'product, fp32, M=32768': lambda: product_case(F32, 32768),
}
MORE = {
    'classes, fp32, K=1000, own offset': lambda: class_case(F32, 1000, S=1, own=True),
    'classes, fp32, K=1000, dense': lambda: class_case(F32, 1000, probs=True),
    'classes, fp32, K=16384, dense': lambda: class_case(F32, 16384, probs=True),
    'classes, bf16, K=32768, own offset': lambda: class_case(BF16, 32768, S=1, own=True),
    'classes, fp32, K=100, S=32': lambda: class_case(F32, 100, S=32),
    'classes, fp32, K=100000, two sums': lambda: class_case(F32, 100_000, two=True),
    'classes, fp64, K=4096': lambda: class_case(F64, 4096),
    'drawn labels, bf16, K=1000, dense': lambda: expected_case(BF16, 1000, probs=True),
    'drawn labels, fp32, K=8192': lambda: expected_case(F32, 8192),
    'drawn labels, fp64, K=2048': lambda: expected_case(F64, 2048),
    'drawn labels, fp32, K=100000': lambda: expected_case(F32, 100_000),
    'drawn labels, fp64, K=1000': lambda: expected_case(F64, 1000),
    'pairs, bf16, K=1000, log eta': lambda: sparse_case(BF16, 1000, M=20_000, one=True, eta=True),
    'pairs, fp32, K=100': lambda: sparse_case(F32, 100, M=1000, one=True),
    'candidates, bf16, S=2': lambda: sparse_case(BF16, 1000),
    'candidates, fp64, S=2, share': lambda: sparse_case(F64, 1000, share=True),
    'candidates, fp32, S=32': lambda: sparse_case(F32, 1000, S=32),
    'product, fp32, M=1000': lambda: product_case(F32, 1000),
    'product, fp32, M=40000': lambda: product_case(F32, 40_000),
    'product, fp64, M=4096': lambda: product_case(F64, 4096),
}


def usage(kernel):
    "What the assembler gave a kernel; STACK holds what it spilled."
    with tempfile.NamedTemporaryFile('wb', suffix='.cubin') as cubin:
        cubin.write(kernel.asm['cubin'])
        cubin.flush()
        report = subprocess.run([knobs.nvidia.cuobjdump.path, '--dump-resource-usage', cubin.name],
                                capture_output=True, text=True, check=True).stdout
    registers, spills = (int(re.search(rf'{key}:(\d+)', report)[1]) for key in ('REG', 'STACK'))
    ptx, signature = kernel.asm['ptx'], kernel.src.signature
    return dict(registers=registers, spills=spills, shared=kernel.metadata.shared, warps=kernel.metadata.num_warps,
                tensor_cores='mma' in ptx, wide='.v4' in ptx, floats=[signature[a] for a in ('scale', 't1', 't2')
                                                                      if a in signature])


def record_launches():
    "Kernels are compiled where they would be launched; the list of their names and binaries."
    launches, run = [], JITFunction.run
    def compiled(self, *args, grid, warmup, **kwargs):
        launches.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))
    JITFunction.run = compiled
    return launches


def compile_cases(cases):
    launches = record_launches()
    for name, make in cases.items():
        launches.clear()
        case = make()
        with Launches() as others: case()
        for kernel, binary in launches: print(json.dumps(dict(case=name, kernel=kernel, **usage(binary))), flush=True)
        total = len(launches) + len(others.names)
        print(json.dumps(dict(case=name, launches=total, of_torch=others.names)), flush=True)


def compile_sizes():
    "Of each kernel: binaries over batches of 64, 33, 32 and 1 rows."
    launches = record_launches()
    for N in (64, 33, 32, 1):
        for case in (class_case(F32, 1000, N=N), expected_case(F32, 1000, N=N),
                     sparse_case(F32, 1000, N=N, M=2*N), product_case(F32, 1024, N=N),
                     sparse_case(F32, 20, N=N, M=8*N + 1, one=True)): case()
    print(json.dumps(Counter(name for name, _ in {(name, id(binary)) for name, binary in launches})))


if __name__ == '__main__':
    driver.set_active(NamesACard(int(sys.argv[1])))
    which = sys.argv[2] if len(sys.argv) > 2 else ''
    compile_sizes() if which == 'sizes' else compile_cases(CASES | (MORE if which == 'all' else {}))
