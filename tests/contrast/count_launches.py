"""Counts the operations that a loss issues on a card, forward and backward, without one.

    python tests/contrast/count_launches.py write     every case, into results/launches.csv

Kernels are not run: a launch of Triton is noted where the interpreter would begin, and PyTorch's operations are noted
among them, but for those that only look at memory or ask for it. What a mode of PyTorch sees is what a card gets; an
operation of PyTorch's may be a few launches there (`multinomial` is).
"""
import csv
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

os.environ['TRITON_INTERPRET'] = '1'

from compile_kernels import NO_LAUNCH
from softnce.contrast import set_backend
from softnce.losses import ExpectedInfoNCE, InfoNCE, SoftDistributionInfoNCE, SoftTargetCrossEntropy, SoftTargetInfoNCE
from softnce.noise import ClosedForm
from softnce.targets import SparseTargets, mix, set_value_checks, smooth
from triton.runtime.interpreter import GridExecutor

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {'fp32': F32, 'bf16': BF16}
LEDGER = Path(__file__).parents[2]/'results'/'launches.csv'
COLUMNS = ['loss', 'targets', 'dtype', 'rows', 'classes', 'forward', 'backward', 'operations']


class Counted(TorchDispatchMode):
    "Names of operations that take a launch, and bytes of every new array."
    def __enter__(self):
        self.names, self.sizes = [], []
        return super().__enter__()
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, out = function.overloadpacket.__name__, function(*args, **(kwargs or {}))
        if name not in NO_LAUNCH: self.names.append(name)
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        outputs = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.sizes += [s.nbytes() for s in (x.untyped_storage() for x in outputs) if s.data_ptr() not in given]
        return out


@contextmanager
def as_on_a_card(seen):
    "Launches are noted instead; and whether all weights are equal is known from their stride, not by looking."
    call, one_weight = GridExecutor.__call__, SparseTargets.one_weight
    GridExecutor.__call__ = lambda self, *args, **kwargs: seen.names.append(self.fn.__name__)
    SparseTargets.one_weight = property(lambda self: self.weights.shape[1] == 1 or self.weights.stride(0) == 0)
    try: yield
    finally: GridExecutor.__call__, SparseTargets.one_weight = call, one_weight


def ids(y, K): return y
def one_lambda(y, K): return mix(SparseTargets.from_labels(y, K), .3)
def one_lambda_smoothed(y, K): return smooth(one_lambda(y, K), .1)
def each_lambda(y, K): return mix(SparseTargets.from_labels(y, K), torch.linspace(0, 1, len(y)))
def dense(y, K): return one_lambda_smoothed(y, K).dense()


LOSSES = {
    'cross-entropy': SoftTargetCrossEntropy(), 'InfoNCE': InfoNCE(), 'in batch': SoftTargetInfoNCE(),
    'closed form': SoftTargetInfoNCE(noise_samples=ClosedForm()),
    'closed form, mixed': SoftTargetInfoNCE(noise_samples=ClosedForm(.3, .1)),
    'mean over the draw': ExpectedInfoNCE(), 'drawn': SoftDistributionInfoNCE(),
}
CASES = [('cross-entropy', t, 1000) for t in (ids, one_lambda, one_lambda_smoothed, dense)] + [
    ('InfoNCE', ids, 1000), ('in batch', one_lambda, 1000), ('in batch', one_lambda_smoothed, 1000),
    ('in batch', one_lambda, 100), ('in batch', each_lambda, 1000), ('in batch', dense, 1000),
    ('closed form', one_lambda, 1000), ('closed form, mixed', one_lambda_smoothed, 1000),
    ('mean over the draw', ids, 1000), ('mean over the draw', one_lambda, 1000), ('drawn', one_lambda, 1000)]


def counted(loss, targets, N, K, dtype):
    "Names of the operations of the loss and of its gradient; bytes of the largest array, and of the logits."
    x, t = torch.randn(N, K).to(dtype).requires_grad_(), targets(torch.arange(N) % K, K)
    with set_backend('triton'), set_value_checks(False), Counted() as seen, as_on_a_card(seen):
        value = LOSSES[loss](x, t)
        forward, seen.names = seen.names, []
        gradient, = torch.autograd.grad(value, x)
    assert gradient.dtype == dtype and gradient.shape == x.shape
    return forward, seen.names, max(seen.sizes), x.untyped_storage().nbytes()


def rows():
    for loss, targets, K in CASES:
        for name, dtype in DTYPES.items():
            forward, backward, _, _ = counted(loss, targets, 1024, K, dtype)
            yield dict(loss=loss, targets=targets.__name__.replace('_', ' '), dtype=name, rows=1024, classes=K,
                       forward=len(forward), backward=len(backward), operations=' '.join([*forward, '|', *backward]))


def write():
    with open(LEDGER, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows())


if __name__ == '__main__':
    if sys.argv[1:] != ['write']: sys.exit(__doc__)
    write()
