"""A head whose classes are spread over ranks, against sums written out over all classes."""
import pytest
import torch

import literal_sums as o
from literal_sums import F64, INF
from softnce.contrast import vocab_parallel_cross_entropy, vocab_parallel_logits
from softnce.targets import SparseTargets

N, K = 6, 11
PARTS = {1: (11,), 2: (4, 7), 3: (5, 0, 6), 4: (1, 2, 3, 5)}  # classes of each rank, one of which may have none
LOGITS = o.normal(N, K)
IDS = torch.tensor([0, 3, 4, 10, 7, 5])
WEIGHTS = torch.tensor([[.7, .3]], dtype=F64).expand(N, 2)


def targets(kind):
    "Targets of all classes."
    if kind == 'ids': return IDS
    epsilon = {'sparse': 0., 'smoothed': .1, 'an epsilon each': torch.linspace(0, .5, N, dtype=F64)}.get(kind, .2)
    rows = SparseTargets(torch.stack([IDS, IDS.flip(0)], 1), WEIGHTS, epsilon, K)
    return rows.dense() if kind == 'dense' else rows


def literal(kind, epsilon, temperature, logits):
    "-sum_k alpha_k log softmax_k, a row and a class at a time."
    alpha, rows = targets(kind), []
    alpha = torch.eye(K, dtype=F64)[alpha] if kind == 'ids' else alpha if kind == 'dense' else alpha.dense()
    for a, l in zip((1-epsilon)*alpha + epsilon/K, logits/temperature):
        z = o.log_sum_exp([x for x in l if x > -INF])
        rows.append(sum(w*(z - x) for w, x in zip(a, l) if w > 0))
    return torch.stack(rows)


def on_rank(rank, kind, size, epsilon, temperature, dtype, masked=None, known=False):
    "Losses, and gradients by this rank's logits, weighted by the rows' numbers."
    start = sum(PARTS[size][:rank])
    mine = slice(start, start + PARTS[size][rank])
    logits = LOGITS.to(dtype, copy=True)
    if masked is not None: logits[:, masked] = -INF
    logits, t = logits[:, mine].clone().requires_grad_(), targets(kind)
    t, classes = t[:, mine] if kind == 'dense' else t, (start, K) if known else None
    loss = vocab_parallel_cross_entropy(logits, t, label_smoothing=epsilon, temperature=temperature, reduction='none',
                                        classes=classes)
    (loss*torch.arange(1., N + 1)).sum().backward()
    return loss.detach(), logits.grad


def wanted(kind, epsilon, temperature, logits):
    logits = logits.clone().requires_grad_()
    loss = literal(kind, epsilon, temperature, logits)
    (loss*torch.arange(1., N + 1)).sum().backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize('size', PARTS)
@pytest.mark.parametrize('kind', ['ids', 'sparse', 'smoothed', 'an epsilon each', 'dense'])
def test_at_any_number_of_ranks(pool, size, kind):
    loss, gradient = wanted(kind, .1, .7, LOGITS)
    found = pool.run(size, on_rank, kind, size, .1, .7, F64, None, size == 2)
    for each, _ in found: torch.testing.assert_close(each, loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.cat([g for _, g in found], 1), gradient, rtol=1e-13, atol=1e-13)


def test_the_smoothing_is_that_of_all_classes(pool):
    "With each rank's own number of classes in its place the loss would be another."
    one, four = (pool.run(size, on_rank, 'ids', size, .3, 1., F64)[0][0] for size in (1, 4))
    torch.testing.assert_close(one, four, rtol=1e-13, atol=1e-13)


def test_masked_classes_and_16_bits(pool):
    "A class that no target names costs nothing; bf16 logits are computed in fp32, and have a gradient in bf16."
    x = LOGITS.clone()
    x[:, 9] = -INF
    loss, gradient = wanted('sparse', 0., 1., x.bfloat16().double())
    found = pool.run(2, on_rank, 'sparse', 2, 0., 1., torch.bfloat16, 9)
    assert found[0][0].dtype == torch.float32 and found[0][1].dtype == torch.bfloat16
    torch.testing.assert_close(found[0][0].double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([g for _, g in found], 1).double(), gradient, rtol=2**-7, atol=1e-6)


def test_a_row_without_a_possible_class():
    x = torch.full((2, 3), -INF, requires_grad=True)
    loss = vocab_parallel_cross_entropy(x, torch.tensor([0, 1]), reduction='none')
    assert (loss == INF).all()
    loss.sum().backward()
    assert x.grad.isfinite().all()


def head(rank, size):
    start = sum(PARTS[size][:rank])
    z = o.normal(N, 3, seed=1).requires_grad_()
    W = o.normal(K, 3, seed=2)[start:start + PARTS[size][rank]].requires_grad_()
    vocab_parallel_cross_entropy(vocab_parallel_logits(z, W), IDS).backward()
    return z.grad, W.grad


@pytest.mark.parametrize('size', [1, 3])
def test_a_head(pool, size):
    "The gradient by the embeddings is the same on all ranks, that by the weight is the rank's."
    z, W = o.normal(N, 3, seed=1).requires_grad_(), o.normal(K, 3, seed=2).requires_grad_()
    literal('ids', 0., 1., z @ W.T).mean().backward()
    found = pool.run(size, head, size)
    for dz, _ in found: torch.testing.assert_close(dz, z.grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.cat([dW for _, dW in found]), W.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize('change, message', [
    (dict(logits=torch.zeros(2)), 'logits must be floats of shape'),
    (dict(targets=torch.full((2, 3), -1.)), 'targets must not be negative'),
    (dict(targets=torch.zeros(2, 4)), 'targets must be class ids, SparseTargets, or probabilities of this rank'),
    (dict(targets=torch.tensor([0, 3])), 'targets'),
    (dict(temperature=0.), 'temperature must be positive'),
    (dict(reduction='max'), "reduction must be 'none', 'mean' or 'sum'"),
    (dict(label_smoothing=1.5), 'label_smoothing'),
    (dict(classes=(2, 4)), 'classes must be the first class of this rank'),
])
def test_errors_name_the_argument(change, message):
    given = dict(logits=torch.zeros(2, 3), targets=torch.tensor([0, 2])) | change
    with pytest.raises(ValueError, match=message):
        vocab_parallel_cross_entropy(given.pop('logits'), given.pop('targets'), **given)
