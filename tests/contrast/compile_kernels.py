"""Compiles the kernels without a card, at the configurations that the package launches, and prints what became of them.

    python tests/contrast/compile_kernels.py 90 [all]

The launchers run with CPU tensors and a driver that only names a card: each launch is compiled with the types and
alignments of its real arguments, and not run. One JSON object a launch: kernel, case, registers, bytes of spills and of
shared memory; and one a case, with all its launches, those of PyTorch too.
"""
import json
import re
import subprocess
import sys
import tempfile

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from softnce.contrast import triton_sums

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


class NamesACard:
    "A driver for compiling only."
    def __init__(self, capability): self.target = GPUTarget('cuda', capability, 32)
    def get_current_target(self): return self.target
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0


def class_case(dtype, K, S=2, two=False, own=False, probs=False, eta=True):
    full = torch.promote_types(dtype, F32)
    ids, w = (None, None) if probs else (torch.zeros(3, S, dtype=torch.long), torch.ones(3, S, dtype=full))
    offset = torch.zeros(1, K, dtype=full) if own or two else None
    triton_sums.class_sums(torch.zeros(3, K, dtype=dtype), ids, w, torch.ones(3, dtype=full),
                           torch.ones(3, K, dtype=full) if probs else None, offset,
                           torch.zeros(3, dtype=full) if own else None, torch.zeros(K, dtype=full) if eta else None,
                           [.3, .6] if two else [1.], .5, True)


def sparse_case(dtype, K, S=2, M=40, one=False, share=False, eta=False):
    full = torch.promote_types(dtype, F32)
    ids, w = torch.zeros(M, S, dtype=torch.long), torch.ones(1 if one else M, S, dtype=full).expand(M, S)
    share = torch.ones(M, dtype=full) if share else None
    triton_sums.sparse_sums(torch.zeros(3, K, dtype=dtype), ids, w, share, ids[:3], w[:3],
                            None if share is None else share[:3], torch.zeros(K, dtype=full) if eta else None,
                            .5, True, one, 0, True)


def product_case(dtype, M): triton_sums.softmax_without_own(torch.zeros(3, M, dtype=dtype), 0)


CASES = {
    'classes, bf16, K=1000': lambda: class_case(BF16, 1000),
    'classes, fp32, K=32768, two sums': lambda: class_case(F32, 32768, two=True),
    'classes, fp64, K=100000': lambda: class_case(F64, 100_000, two=True),
    'pairs, fp32, K=1000': lambda: sparse_case(F32, 1000, M=20_000, one=True),
    'candidates, fp32, S=2': lambda: sparse_case(F32, 1000),
    'candidates, fp32, S=8, share': lambda: sparse_case(F32, 1000, S=8, share=True, eta=True),
    'product, fp32, M=32768': lambda: product_case(F32, 32768),
}
MORE = {
    'classes, fp32, K=1000, own offset': lambda: class_case(F32, 1000, S=1, own=True),
    'classes, fp32, K=32768, dense': lambda: class_case(F32, 32768, probs=True),
    'classes, bf16, K=32768, own offset': lambda: class_case(BF16, 32768, S=1, own=True),
    'classes, fp32, K=100, S=32': lambda: class_case(F32, 100, S=32),
    'classes, fp32, K=100000, two sums': lambda: class_case(F32, 100_000, two=True),
    'classes, fp64, K=16384': lambda: class_case(F64, 16384),
    'pairs, bf16, K=1000, log eta': lambda: sparse_case(BF16, 1000, M=20_000, one=True, eta=True),
    'candidates, bf16, S=2': lambda: sparse_case(BF16, 1000),
    'candidates, fp64, S=2, share': lambda: sparse_case(F64, 1000, share=True),
    'candidates, fp32, S=32': lambda: sparse_case(F32, 1000, S=32),
    'product, fp32, M=40000': lambda: product_case(F32, 40_000),
    'product, fp64, M=16384': lambda: product_case(F64, 16384),
}


def usage(kernel):
    "What the assembler gave a kernel; STACK holds what it spilled."
    with tempfile.NamedTemporaryFile('wb', suffix='.cubin') as cubin:
        cubin.write(kernel.asm['cubin'])
        cubin.flush()
        report = subprocess.run([knobs.nvidia.cuobjdump.path, '--dump-resource-usage', cubin.name],
                                capture_output=True, text=True, check=True).stdout
    registers, spills = (int(re.search(rf'{key}:(\d+)', report)[1]) for key in ('REG', 'STACK'))
    return dict(registers=registers, spills=spills, shared=kernel.metadata.shared, warps=kernel.metadata.num_warps,
                tensor_cores='mma' in kernel.asm['ptx'], loads=len(re.findall(r'ld\.global', kernel.asm['ptx'])),
                wide='.v4' in kernel.asm['ptx'], scale=kernel.src.signature.get('scale'))


def main(capability, cases):
    driver.set_active(NamesACard(capability))
    launches, run = [], JITFunction.run
    def compiled(self, *args, grid, warmup, **kwargs):
        launches.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))
    JITFunction.run = compiled
    for case, call in cases.items():
        launches.clear()
        call()
        for name, kernel in launches: print(json.dumps(dict(case=case, kernel=name, **usage(kernel))), flush=True)


if __name__ == '__main__': main(int(sys.argv[1]), CASES | (MORE if sys.argv[2:] == ['all'] else {}))
