"""What a step on a card must not do, seen without one: tensors that say they are on a card, and have no memory."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import literal_sums as o
from softnce import soft_target_cross_entropy, soft_target_info_nce
from softnce.candidates import gather_candidates
from softnce.contrast import exact_products, set_backend
from softnce.losses import expected_info_nce
from softnce.noise import ClosedForm, Fresh, Queue
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


def test_products_are_exact_where_the_newer_flag_was_set():
    "Beside which PyTorch refuses to say what the older one is."
    flags = torch.backends.cuda.matmul
    try:
        flags.fp32_precision = 'tf32'
        with pytest.raises(RuntimeError, match='mix'): torch.get_float32_matmul_precision()
        with exact_products(): assert flags.fp32_precision == 'ieee'
        assert flags.fp32_precision == 'tf32'
    finally: flags.fp32_precision = 'ieee'
    assert torch.get_float32_matmul_precision() == 'highest'


def test_parts_of_one_batch_keep_their_one_row_of_weights():
    "By the memory that they show, which no look at a card has to compare."
    whole = mixed(torch.tensor([0, 1, 2, 3]))
    joined = SparseTargets.cat([whole[:1], whole[1:]])
    assert joined.weights.stride(0) == 0 and torch.equal(joined.dense(), whole.dense())
    other = SparseTargets.cat([whole, mix(SparseTargets.from_labels(torch.tensor([1, 2]), 5), .4)])
    assert other.weights.stride(0) != 0 and other.weights[-1].tolist() == pytest.approx([.4, .6])


# ---------------------------------------------------------------- candidates that share one lambda, without a look
LAMBDAS = {'agree': ([.3, .3, .3], True), 'one differs': ([.3, .4, .3], False)}


def mixed_batches(lambdas, device='cpu', dtype=torch.float32):
    hard = [SparseTargets.from_labels(torch.randint(5, (4,), device=device), 5, dtype) for _ in lambdas]
    return [smooth(mix(y, lam), .1) for y, lam in zip(hard, lambdas)]


@pytest.mark.parametrize('case', LAMBDAS)
def test_a_queue_knows_on_a_card_whether_all_rows_share_one_lambda(case):
    "From numbers of the host, on tensors that have no memory; batches come from the host, too."
    lambdas, agree = LAMBDAS[case]
    host = mixed_batches(lambdas[:1])
    with FakeTensorMode(allow_non_fake_inputs=True), set_value_checks(False):
        eta, queue = torch.full((5,), .2, device='cuda'), Queue(100)
        batches = [t.to('cuda') for t in host] + mixed_batches(lambdas[1:], 'cuda')
        with Seen() as seen: found = [gather_candidates(t, queue, eta) for t in batches]
    assert [len(c.rows.ids) for c in found] == [4, 8, 12]
    assert found[-1].one_weight == agree and (found[-1].rows.weights.stride(0) == 0) == agree
    assert found[-1].rows.share is None and not seen.names & (COPIES | {'a copy between devices'})


@pytest.mark.parametrize('backend', ['torch', 'triton'])
@pytest.mark.parametrize('case', LAMBDAS)
def test_the_loss_of_a_queue_is_the_literal_one_by_either_route(case, backend, monkeypatch):
    "And a kernel of pairs is launched where, and only where, all rows share one lambda."
    lambdas, agree = LAMBDAS[case]
    torch.manual_seed(0)
    x, (first, *batches), queue, launched = torch.randn(4, 5), mixed_batches(lambdas*8), Queue(1000), []
    if backend == 'triton':
        triton_pairs = pytest.importorskip('softnce.contrast.triton_pairs')
        run = triton_pairs.pair_sums
        monkeypatch.setattr(triton_pairs, 'pair_sums', lambda *a: launched.append(len(a[1].ids)) or run(*a))
        monkeypatch.setattr(SparseTargets, 'one_weight', property(lambda t: t.weights.stride(0) == 0))  # as on a card
    with set_backend(backend):
        for t in (first, *batches[:-1]): soft_target_info_nce(x, t, noise_samples=queue)
        launched.clear()
        rows = [t.dense().double() for t in (batches[-1], first, *batches[:-1])]
        def literal(x):
            others = o.sums_over_candidates(x, torch.cat(rows), rows[0], True)
            return torch.nn.functional.softplus(others)
        def loss(x):
            full = SparseTargets.cat([first, *batches[:-1]])
            return soft_target_info_nce(x, batches[-1], noise_samples=full, reduction='none')
        for a, b in zip(o.value_and_gradients(loss, x), o.value_and_gradients(literal, x.double())):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
        stepped = soft_target_info_nce(x, batches[-1], noise_samples=queue, reduction='none')
        torch.testing.assert_close(stepped.double(), literal(x.double()), rtol=1e-5, atol=1e-6)
    if backend == 'triton': assert launched == ([96, 96] if agree else [])


def test_what_the_host_knows_of_a_row_of_weights():
    y = SparseTargets.from_labels(torch.tensor([0, 1, 2, 3]), 5)
    t = smooth(mix(y, .25), .1)
    assert y.host_row == (1.,) and t.host_row == (.25, .75)
    assert mix(t, .5).host_row == (.125, .375, .125, .375)
    for other in (t.detach(), t.clone(), t.to(torch.float32), t[1:3], SparseTargets.cat([t, t[:1], t[:0]])):
        assert other.host_row == t.host_row and torch.equal(other.weights, t.weights[:1].expand(len(other), -1))
    unknown = t.to(torch.float64), mix(y, torch.tensor(.25)), mix(y, torch.rand(4)), t[[0, 1]], \
        SparseTargets(t.indices, t.weights, .1, 5), SparseTargets.cat([t, mix(y, .3)]), SparseTargets.cat([t, y])
    assert [other.host_row for other in unknown] == [None]*7
    t.weights = torch.rand(4, 2).softmax(1)
    assert t.host_row is None  # what was known was of other weights
    learnt = SparseTargets(y.indices, torch.ones(4, 1, requires_grad=True), 0., 5)
    assert learnt.host_row is None and SparseTargets.cat([y, learnt]).requires_grad


def test_rows_of_one_class_join_pairs_that_are_one_class():
    y = SparseTargets.from_labels(torch.tensor([0, 1]), 5)
    for batches in ([y, mix(y, 1.)], [mix(y, 1.), y]):
        joined = SparseTargets.cat(batches)
        assert joined.host_row == (1., 0.) and joined.weights.stride(0) == 0
        assert torch.equal(joined.dense(), torch.cat([b.dense() for b in batches]))


def test_a_number_of_the_host_does_not_compile_anew():
    "A compiled step over mixed batches, each with a lambda of its own: one graph."
    graphs = []
    def count(graph, inputs):
        graphs.append(graph)
        return graph
    step = torch.compile(lambda x, t: soft_target_cross_entropy(x, SparseTargets.cat([t, t])), backend=count)
    x = torch.randn(8, 5)
    for t in mixed_batches([.3, .4, .5, .6]): step(x, t)
    before = len(graphs)
    for t in mixed_batches([.7, .8, .9]): step(x, t)
    assert len(graphs) == before
