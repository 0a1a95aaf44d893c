"""Targets from a teacher's top classes and from votes, and the noise distribution of soft targets."""
import math

import mpmath
import pytest
import torch

import oracles as o
from softnce.losses import soft_target_cross_entropy
from softnce.noise import empirical_noise
from softnce.targets import SparseTargets, one_hot, smooth


# ---------------------------------------------------------------- the top of a teacher
def top_of(p, size): return (x := p.log().topk(size)).indices, x.values


def with_uniform_rest(p, size):
    "Row by row: the top classes keep their probabilities, the others share the rest alike."
    out = torch.zeros_like(p)
    for i, row in enumerate(p):
        order = sorted(range(len(row)), key=lambda k: -float(row[k]))
        rest = math.fsum(float(row[k]) for k in order[size:])
        for place, k in enumerate(order): out[i, k] = row[k] if place < size else rest/(len(row) - size)
    return out


@pytest.mark.parametrize('size', [1, 2, 5, 6])
@pytest.mark.parametrize('seed', [0, 1])
def test_uniform_rest(size, seed):
    p = o.simplex(7, 6, seed)
    t = SparseTargets.from_log_probs(*top_of(p, size), 6)
    o.same(t.dense(), with_uniform_rest(p, size) if size < 6 else p)
    assert t.dtype == torch.float64 and (t.weights >= 0).all()
    SparseTargets(t.indices, t.weights, t.epsilon, 6)  # what is made passes the checks


@pytest.mark.parametrize('size', [1, 3])
def test_renormalised(size):
    p = o.simplex(4, 6)
    t = SparseTargets.from_log_probs(*top_of(p, size), 6, rest='renormalise')
    kept = torch.where(p >= p.topk(size).values[:, -1:], p, 0.)
    o.same(t.dense(), kept/kept.sum(1, keepdim=True))
    assert t.epsilon == 0.


def test_empty_slots():
    "A slot of -inf lists no class: its class is one of the others."
    p = torch.tensor([[.5, .3, .1, .06, .04], [.9, .04, .03, .02, .01]], dtype=torch.float64)
    ids, log_probs = torch.tensor([[0, 1], [0, 4]]), torch.tensor([[.5, .3], [.9, 0.]], dtype=torch.float64).log()
    wanted = torch.stack([with_uniform_rest(p[:1], 2)[0], with_uniform_rest(p[1:], 1)[0]])
    o.same(SparseTargets.from_log_probs(ids, log_probs, 5).dense(), wanted)


def test_a_uniform_teacher():
    for dtype in (torch.float32, torch.float64):
        t = SparseTargets.from_log_probs(torch.tensor([[3, 1]]), torch.full((1, 2), 1/7, dtype=dtype).log(), 7)
        torch.testing.assert_close(t.dense(), torch.full((1, 7), 1/7, dtype=dtype))


def case(name):
    "Log-probabilities (1, 50,000) in float64, with a tail far below the rounding of fp32's sums."
    x = 1.5*torch.randn(1, 50_000, generator=o.generator(1), dtype=torch.float64)
    if name == 'one sure class': x[0, 7] += 29.
    else: x[0, 7:10] += torch.tensor([24.5, 25.2, 23.7], dtype=torch.float64)
    return x.log_softmax(1)


@pytest.mark.parametrize('name, tol', [('one sure class', 1e-5), ('three sure classes', .2)])
def test_tails_of_sparse_teachers_in_single_precision(name, tol):
    "The log of the tail from fp32 log-probabilities. Those of several sure classes hold it to 1e-7/tail only."
    log_probs = case(name)
    values, ids = log_probs.topk(32)
    with mpmath.workdps(50):
        tail = 1 - mpmath.fsum(mpmath.exp(mpmath.mpf(float(v))) for v in values[0])
        truth, of_fp32 = (float(mpmath.log(x)) for x in
                          (tail, 1 - mpmath.fsum(mpmath.exp(mpmath.mpf(float(v))) for v in values[0].float())))
    t = SparseTargets.from_log_probs(ids, values.float(), 50_000)
    found = (t.epsilon.double()*(1 - 32/50_000)).log().item()
    assert t.dtype == torch.float32 and truth < -13.5
    assert found == pytest.approx(of_fp32, abs=1e-5)  # nothing is lost beside what fp32 inputs lack
    assert found == pytest.approx(truth, abs=tol)
    others = torch.ones(50_000, dtype=torch.bool).index_fill(0, ids[0], False)
    torch.testing.assert_close(t.dense()[0, others].double().sum().log().item(), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_mass_above_one_by_rounding(dtype):
    p = torch.tensor([[.6, .4 + 1e-8]], dtype=torch.float64).log().to(dtype)
    t = SparseTargets.from_log_probs(torch.tensor([[0, 2]]), p, 4)
    dense = t.dense()
    assert (dense >= 0).all() and t.dtype == torch.float32
    torch.testing.assert_close(dense, torch.tensor([[.6, 0., .4, 0.]]), rtol=0, atol=2e-2)


def test_kl_is_not_negative():
    "Cross-entropy with the targets is least at the targets, to fp32: the KL of any student is not negative."
    teacher = (3*torch.randn(64, 1000, generator=o.generator(0))).log_softmax(1)
    ids = teacher.topk(8).indices
    t = SparseTargets.from_log_probs(ids, teacher.gather(1, ids), 1000)
    dense = t.dense().double()
    entropy = -(dense*dense.log()).sum(1)
    for student in (dense.log(), dense.log() + .1*torch.randn(64, 1000, generator=o.generator(1), dtype=torch.float64)):
        assert (soft_target_cross_entropy(student, t.to(torch.float64), reduction='none') - entropy).min() > -1e-6


@pytest.mark.parametrize('ids, log_probs, kw, message', [
    ([[4]], [[.01]], {}, 'ids must be the most probable classes'),
    ([[0, 0]], [[.4, .4]], {}, 'ids must hold a class once a row'),
    ([[0, 5]], [[.4, .4]], {}, r'ids must be in \[0, 5\)'),
    ([[0, 1]], [[.7, .7]], {}, r'log_probs must have a mass in \(0, 1\] in each row, got 1.4'),
    ([[0, 1]], [[0., 0.]], {}, r'log_probs must have a mass in \(0, 1\] in each row, got 0'),
    ([[0, 1]], [[.7]], {}, r'log_probs must be floats of shape \(1, 2\) like ids'),
    ([[0]], [[.7]], dict(rest='bucket'), "rest must be 'uniform' or 'renormalise', got 'bucket': as one bucket"),
    ([[0]], [[.7]], dict(rest='drop'), "rest must be 'uniform' or 'renormalise', got 'drop'"),
    ([0], [[.7]], {}, r'ids must have shape \(M, S\)'),
])
def test_errors_of_from_log_probs(ids, log_probs, kw, message):
    with pytest.raises(ValueError, match=message):
        SparseTargets.from_log_probs(torch.tensor(ids), torch.tensor(log_probs).log(), 5, **kw)


# ---------------------------------------------------------------- votes
@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.float32, torch.float64])
def test_counts(dtype):
    counts = torch.tensor([[0, 3, 1, 0], [5, 0, 0, 0], [1, 1, 1, 2]]).to(dtype)
    t = SparseTargets.from_counts(counts)
    assert t.indices.shape == (3, 4) and t.epsilon == 0. and t.dtype == (dtype
                                                                         if dtype.is_floating_point else torch.float32)
    torch.testing.assert_close(t.dense(), (counts.double()/counts.double().sum(1, keepdim=True)).to(t.dtype))
    assert SparseTargets.from_counts(counts[:2]).indices.shape == (2, 2)
    assert SparseTargets.from_counts(counts[:0]).shape == (0, 4)


def test_large_counts_are_exact():
    counts = torch.tensor([[2**24 + 1, 2**24 - 1]])
    assert SparseTargets.from_counts(counts.double()).dense()[0, 0] == (2**24 + 1)/2**25


@pytest.mark.parametrize('counts, message', [
    (torch.tensor([[1, 2], [0, 0]]), r'got none in rows \[1\]'),
    (torch.tensor([[1, -1]]), 'counts must be finite and not negative'),
    (torch.tensor([1, 2]), r'counts must be numbers of shape \(M, K\)'),
    (torch.tensor([[math.nan, 1.]]), 'counts must be finite'),
    ([[1, 2]], 'counts must be a tensor'), (torch.tensor([[True]]), 'counts must be numbers')])
def test_errors_of_from_counts(counts, message):
    with pytest.raises(ValueError, match=message): SparseTargets.from_counts(counts)


# ---------------------------------------------------------------- the noise distribution
def test_noise_of_soft_targets_is_their_mean():
    p, labels = o.simplex(9, 4, 3).float(), torch.tensor([0, 1, 2, 3, 3])
    torch.testing.assert_close(empirical_noise(p), p.mean(0))
    torch.testing.assert_close(empirical_noise(p, 4), p.mean(0))
    eps = torch.rand(9, generator=o.generator(1))
    for epsilon in (0., .3, eps):
        t = SparseTargets(torch.randint(4, (9, 2), generator=o.generator(2)), o.simplex(9, 2, 4).float(), epsilon, 4)
        torch.testing.assert_close(empirical_noise(t, floor=1e-9), t.dense().mean(0), rtol=1e-5, atol=1e-6)
    wanted = torch.tensor([1, 1, 1, 2])/5
    for found in (empirical_noise(labels, 4), empirical_noise(one_hot(labels, 4)),
                  empirical_noise(counts=torch.tensor([1, 1, 1, 2])),
                  empirical_noise(counts=torch.tensor([.5, .5, .5,
                                                       1.])), empirical_noise(SparseTargets.from_labels(labels, 4))):
        torch.testing.assert_close(found, wanted)
        assert found.dtype == torch.float32


def test_it_is_not_the_noise_of_the_argmax():
    votes = torch.tensor([[3, 2], [3, 2], [1, 4]])
    assert empirical_noise(SparseTargets.from_counts(votes))[0] == pytest.approx(7/15)
    assert empirical_noise(votes.argmax(1), 2)[0] == pytest.approx(2/3)


def test_floors_and_absent_classes():
    p = torch.tensor([[1., 0., 0.], [.8, .2, 0.]])
    torch.testing.assert_close(empirical_noise(p, floor=.05), torch.tensor([.9*.95, .1*.95, .05]))
    for call in (lambda: empirical_noise(p),
                 lambda: empirical_noise(smooth(SparseTargets.from_labels(torch.tensor([0, 1]), 3), 0.)),
                 lambda: empirical_noise(counts=torch.tensor([3, 1, 0]))):
        with pytest.raises(ValueError, match=r'must contain every class unless floor is given; absent: \[2\]'): call()


IDS = torch.tensor([0, 1])


@pytest.mark.parametrize('args, kw, message', [
    ((), {}, 'labels or counts must be given'),
    ((IDS, 2), dict(counts=IDS), 'one of them'),
    ((IDS,), {}, 'num_classes must be given with class ids'),
    ((torch.tensor([[.5, .5]]), 3), {}, 'num_classes must be 2'),
    ((torch.tensor([[.5, .6]]),), {}, 'labels must sum to 1'),
    ((torch.tensor([.5, .5]), 2), {}, 'labels must hold integer class ids'),
    ((IDS[None], 2), {}, 'labels must have shape'),
    ((), dict(counts=IDS[None]), r'counts must be a tensor of shape \(K,\)'),
    ((), dict(counts=-IDS), 'not negative'),
    ((IDS[:0], 2), {}, 'labels must not be empty')])
def test_errors_of_empirical_noise(args, kw, message):
    with pytest.raises(ValueError, match=message): empirical_noise(*args, **kw)
