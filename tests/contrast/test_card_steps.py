"""What a step on a card must not do, seen without one: tensors that say they are on a card, and have no memory."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from softnce import soft_target_cross_entropy, soft_target_info_nce
from softnce.contrast import exact_products
from softnce.losses import expected_info_nce
from softnce.noise import ClosedForm, Fresh
from softnce.targets import SparseTargets, mix, set_value_checks, smooth

COPIES = {'lift_fresh', 'lift_fresh_copy', '_local_scalar_dense', 'nonzero', 'is_nonzero', 'equal', 'item'}


class Seen(TorchDispatchMode):
    def __enter__(self):
        self.names = set()
        return super().__enter__()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        devices = {getattr(a, 'device', None) for a in args}
        moved = name in ('_to_copy', 'copy_') and devices != {torch.device('cuda', 0)}
        self.names.add('a copy between devices' if moved else name)
        return func(*args, **(kwargs or {}))


def mixed(y): return smooth(mix(SparseTargets.from_labels(y, 5), .3), .1)


STEPS = {
    'ids': lambda x, y: soft_target_info_nce(x, y),
    'one lambda': lambda x, y: soft_target_info_nce(x, mixed(y)),
    'dense': lambda x, y: soft_target_info_nce(x, mixed(y).dense()),
    'fresh': lambda x, y: soft_target_info_nce(x, mixed(y), noise_samples=Fresh(7, .3, .1)),
    'closed form': lambda x, y: soft_target_info_nce(x, mixed(y), noise_samples=ClosedForm(.3, .1)),
    'cross-entropy': lambda x, y: soft_target_cross_entropy(x, mixed(y), temperature=.7),
    'the mean over the draw': lambda x, y: expected_info_nce(x, y),
}


@pytest.mark.parametrize('name', STEPS)
def test_nothing_is_copied_from_the_host_and_nothing_waits(name):
    "So a step can be captured as a CUDA graph, with the checks of values off."
    with FakeTensorMode(), set_value_checks(False):
        x, y = torch.randn(4, 5, device='cuda', requires_grad=True), torch.randint(5, (4,), device='cuda')
        with Seen() as seen: loss = STEPS[name](x, y)
    assert loss.device.type == 'cuda' and not seen.names & (COPIES | {'a copy between devices'})


def test_a_copy_from_the_host_would_be_seen():
    with FakeTensorMode(), Seen() as seen: torch.ones(2, device='cuda') + torch.tensor([1., 2.]).to('cuda')
    assert seen.names & (COPIES | {'a copy between devices'})


def test_products_are_exact_in_a_block_and_as_they_were_behind_it():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('high')
        with exact_products(): assert torch.get_float32_matmul_precision() == 'highest'
        assert torch.get_float32_matmul_precision() == 'high'
        with pytest.raises(KeyError), exact_products(): raise KeyError
        assert torch.get_float32_matmul_precision() == 'high'
    finally: torch.set_float32_matmul_precision(before)


def test_parts_of_one_batch_keep_their_one_row_of_weights():
    "By the memory that they show, which no look at a card has to compare."
    whole = mixed(torch.tensor([0, 1, 2, 3]))
    joined = SparseTargets.cat([whole[:1], whole[1:]])
    assert joined.weights.stride(0) == 0 and torch.equal(joined.dense(), whole.dense())
    other = SparseTargets.cat([whole, mix(SparseTargets.from_labels(torch.tensor([1, 2]), 5), .4)])
    assert other.weights.stride(0) != 0 and other.weights[-1].tolist() == pytest.approx([.4, .6])
