"""Triton kernels: proved by the interpreter against loops (on a card, where there is one, by the card), and compiled for two compute
capabilities without one."""
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip('triton')

from softnce.contrast.sums import class_contrast, product_contrast, set_backend, sparse_contrast
from softnce.losses import soft_target_info_nce
from test_kernels import F64, K, KINDS, N, SOURCES, literal_candidates, literal_class, literal_target, sparse_case, targets

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
TOLERANCE = {torch.float32: dict(rtol=2e-5, atol=2e-5), F64: dict(rtol=1e-12, atol=1e-12)}


def on_card(fast, literal, *inputs, dtype):
    "Value and gradient of a kernel in `dtype`, against loops in float64."
    x = [i.to(DEVICE, dtype).requires_grad_() for i in inputs]
    with set_backend('triton'): rows = fast(*x)
    assert rows.dtype == dtype
    gradients = torch.autograd.grad((rows*torch.arange(1., len(rows)+1, device=DEVICE)).sum(), x)
    y = [i.clone().requires_grad_() for i in inputs]
    exact = literal(*y)
    expected = torch.autograd.grad((exact*torch.arange(1., len(rows)+1)).sum(), y)
    for a, b in zip((rows, *gradients), (exact, *expected)): torch.testing.assert_close(a.detach().cpu(), b.detach().to(dtype), **TOLERANCE[dtype])


def to(x, dtype): return x.to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('n, classes, slots', [(1, 2, 1), (3, 7, 2), (2, 33, 3)])
@pytest.mark.parametrize('exponents', [(1.,), (.3, .6)])
def test_sums_over_classes(dtype, n, classes, slots, exponents):
    torch.manual_seed(0)
    s, ids, w = torch.randn(n, classes, dtype=F64), torch.randint(classes, (n, slots)), torch.rand(n, slots, dtype=F64)
    background, offset = torch.randn(n, dtype=F64), torch.randn(classes, dtype=F64)
    on_card(lambda s: class_contrast(s, to(ids, dtype), to(w, dtype), background=to(background, dtype), offset=to(offset, dtype), exponents=exponents),
            lambda s: literal_class(s, ids, w, background, offset, exponents), s, dtype=dtype)
    offsets = torch.stack([offset, offset.flip(0)])[:len(exponents)]
    on_card(lambda s: class_contrast(s, to(ids, dtype), to(w, dtype), offset=to(offsets, dtype), exponents=exponents),
            lambda s: literal_class(s, ids, w, torch.zeros(n), offsets, exponents), s, dtype=dtype)


def test_more_classes_than_a_block_and_a_block_without_candidates():
    classes = 9000
    s, y = torch.randn(2, classes, dtype=F64), torch.tensor([8500, 8999])
    offset = torch.full((classes,), float('-inf'), dtype=F64)
    offset[y] = 0.
    def literal(s): return s[:, y].logsumexp(1) - s.gather(1, y[:, None])[:, 0]
    on_card(lambda s: class_contrast(s, to(y[:, None], F64), torch.ones(2, 1, dtype=s.dtype, device=DEVICE), offset=to(offset, s.dtype)), literal, s, dtype=torch.float32)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('n, m, classes, slots', [(1, 1, 2, 1), (3, 70, 4, 2), (35, 40, 3, 2), (5, 7, 6, 3)])
@pytest.mark.parametrize('one_weight', [False, True])
def test_sparse_candidates(dtype, n, m, classes, slots, one_weight):
    s, ids, w = sparse_case(n, max(n, m), classes, slots, one_weight)
    candidates = [literal_target(i, v, 0., classes) for i, v in zip(ids, w)]
    on_card(lambda s: sparse_contrast(s, to(ids, dtype), to(w, dtype), to(ids[:n], dtype), to(w[:n], dtype), one_weight=one_weight),
            lambda s: literal_candidates(s, candidates, candidates), s, dtype=dtype)


def test_rows_that_underflow_in_the_pair_form():
    s, ids, w = sparse_case(6, 40, 5, 2, True)
    ids, s[[0, 3], 0] = ids.clamp(min=1), 500.
    candidates = [literal_target(i, v, 0., 5) for i, v in zip(ids, w)]
    on_card(lambda s: sparse_contrast(s, to(ids, s.dtype), to(w, s.dtype), to(ids[:6], s.dtype), to(w[:6], s.dtype), one_weight=True),
            lambda s: literal_candidates(s, candidates, candidates), s, dtype=torch.float32)


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_blocks_of_a_product(dtype):
    torch.manual_seed(1)
    a, b, shift = torch.randn(5, 3, dtype=F64), torch.randn(8, 3, dtype=F64), torch.randn(8, dtype=F64)
    def literal(a, b, shift): return torch.stack([(b @ a[i] + shift).logsumexp(0) - (a[i] @ b[i] + shift[i]) for i in range(5)])
    on_card(lambda *x: product_contrast(*x, num_rows=2), literal, a, b, shift, dtype=dtype)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('source', SOURCES)
def test_losses(kind, source):
    "The whole loss through the kernels, against the plain formulas."
    x, results = torch.randn(N, K, dtype=F64, generator=torch.Generator().manual_seed(2)), []
    for backend in ('triton', 'plain'):
        torch.manual_seed(3)
        y = x.to(DEVICE).requires_grad_()
        noise, t = SOURCES[source](kind), targets(kind).to(DEVICE)
        with set_backend(backend): loss = soft_target_info_nce(y, t, noise_samples=noise)
        results.append((loss.detach(), *torch.autograd.grad(loss, y)))
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


COMPILE = r"""
import sys
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from softnce.contrast import triton_sums as k

F, I = '*fp32', '*i64'
KERNELS = dict(
    class_kernel=(dict(S=F, OFFSET=F, IDS=I, W=F, BG=F, LOSS=F, GRAD=F, t1='fp32', t2='fp32'),
                  dict(HAS_OFFSET=True, HAS_BG=True, TWO=True, SLOTS=2, WITH_GRAD=True, DTYPE=tl.float32, BLOCK=4096), 8),
    lse_kernel=(dict(T=F, IDS=I, W=F, ONLY='*i1', TOP=F, Z=F), dict(HAS_ONLY=True, SLOTS=2, DTYPE=tl.float32, BLOCK_N=32, BLOCK_M=64), 4),
    gradient_kernel=(dict(T=F, IDS=I, W=F, ENTRY=I, BEGIN=I, ONLY='*i1', TOP=F, Z=F, GRAD=F),
                     dict(HAS_ONLY=True, SLOTS=2, DTYPE=tl.float32, BLOCK_N=32, BLOCK_M=64), 4),
    pair_kernel=(dict(S=F, TOP=F, C=F, W=F, Z=F, GRAD=F), dict(WITH_GRAD=True, BLOCK_N=128, BLOCK_K=64, BLOCK_J=32), 4),
    softmax_kernel=(dict(U=F, LOSS=F), dict(HAS_OWN=True, WITH_GRAD=True, DTYPE=tl.float32, BLOCK=4096), 8))
for name, (types, constants, warps) in KERNELS.items():
    fn = getattr(k, name)
    signature = {a: 'constexpr' if a in constants else types.get(a, 'i32') for a in fn.arg_names}
    source = ASTSource(fn=fn, signature=signature, constexprs={(fn.arg_names.index(a),): v for a, v in constants.items()})
    binary = compile(source, target=GPUTarget('cuda', int(sys.argv[1]), 32), options=dict(num_warps=warps))
    assert len(binary.asm['cubin']) > 1000 and binary.metadata.shared <= 227*1024 - (63*1024 if sys.argv[1] == '80' else 0)
    print(name, 'mma' in binary.asm['ptx'])
"""


@pytest.mark.parametrize('capability', [pytest.param('80', marks=pytest.mark.slow), '90'])
def test_every_kernel_compiles_for_a_card(capability, tmp_path):
    "In a process of its own: under the interpreter nothing is compiled."
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'} | {'TRITON_CACHE_DIR': str(tmp_path)}
    done = subprocess.run([sys.executable, '-c', COMPILE, capability], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(line.split() for line in done.stdout.splitlines())
    assert set(lines) == {'class_kernel', 'lse_kernel', 'gradient_kernel', 'pair_kernel', 'softmax_kernel'}
    assert lines['pair_kernel'] == 'True'  # on the tensor cores
