"""softnce.targets: Eq. (2) and (13), mixing, and sparse targets that are the same targets."""
import pytest
import torch

import oracles as o
from softnce.losses import linear_soft_target_info_nce, soft_target_cross_entropy, soft_target_info_nce
from softnce.noise import ClosedForm, Fresh, Queue
from softnce.targets import SparseTargets, mix, one_hot, smooth


def sparse_problem(rows, slots, num_classes, seed=0, epsilon=0.):
    idx = torch.randint(num_classes, (rows, slots), generator=o.generator(seed))
    return SparseTargets(idx, o.simplex(rows, slots, seed), epsilon=epsilon, num_classes=num_classes)


@pytest.mark.parametrize('n, k', [(1, 2), (5, 3), (3, 21841)])
def test_one_hot(n, k):
    y = o.ids(n, k)
    a = one_hot(y, k)
    assert a.shape == (n, k) and a.is_floating_point()
    for i in range(n):
        assert a[i, y[i]] == 1. and a[i].sum() == 1. and (a[i] != 0).sum() == 1


@pytest.mark.parametrize('epsilon', [0., .1, .5, 1.])
@pytest.mark.parametrize('background', [False, True])
def test_smooth_is_equation_2_and_13(epsilon, background):
    n, k = 4, 5
    a, xi = o.simplex(n, k), o.noise(k) if background else None
    got = smooth(a, epsilon, xi)
    for i in range(n):
        for j in range(k):
            wanted = (1 - epsilon)*a[i, j] + epsilon*(xi[j] if background else 1/k)
            assert abs(got[i, j] - wanted) < 1e-15
    o.same(got.sum(-1), torch.ones(n, dtype=torch.float64))


def test_smoothed_one_hot_weights():
    """The weight of the true class is 1 - (K-1) eps/K. What is printed after (12), 1 - (K-1/K) eps, is not a weight
    that sums to one."""
    k, eps = 4, .2
    a = smooth(one_hot(torch.tensor([2]), k).double(), eps)[0]
    assert abs(a[2] - (1 - (k - 1)*eps/k)) < 1e-15 and abs(a[0] - eps/k) < 1e-15
    assert abs((1 - (k - 1/k)*eps) + (k - 1)*eps/k - 1) > 1e-3


def test_smooth_twice_is_smooth_once():
    a = o.simplex(3, 4)
    o.same(smooth(smooth(a, .1), .2), smooth(a, 1 - .9*.8))


def test_mix_literally():
    n, k = 5, 3
    a, perm = o.simplex(n, k), torch.tensor([3, 0, 4, 4, 1])
    per_row = torch.tensor([0., .25, .5, .9, 1.], dtype=torch.float64)
    for lam in (.3, per_row):
        for p in (None, perm):
            got = mix(a, lam, p)
            for i in range(n):
                weight = lam if isinstance(lam, float) else lam[i]
                partner = n - 1 - i if p is None else int(p[i])
                o.same(got[i], weight*a[i] + (1 - weight)*a[partner], 1e-15)


def test_mix_ends_and_order():
    a = o.simplex(4, 3)
    assert torch.equal(mix(a, 1.), a)
    assert torch.equal(mix(a, 0.), a.flip(0))
    assert (mix(a, .3) - mix(a, .7)).abs().max() > 1e-3      # lam belongs to the row itself, not to its partner


@pytest.mark.parametrize('per_row', [False, True])
def test_sparse_dense_literally(per_row):
    eps = torch.tensor([0., .1, .5, 1.], dtype=torch.float64) if per_row else .2
    t = sparse_problem(4, 3, 5, epsilon=eps)
    wanted = o.dense_sparse(t.indices, t.weights, eps, 5)
    assert len(t) == 4
    o.same(t.dense().double(), wanted)


def test_sparse_repeated_indices_add():
    t = SparseTargets(torch.tensor([[1, 1, 0]]), torch.tensor([[.5, .25, .25]], dtype=torch.float64), num_classes=3)
    o.same(t.dense(), torch.tensor([[.25, .75, 0.]], dtype=torch.float64))


@pytest.mark.parametrize('eps_a, eps_b', [(0., 0.), (.1, .1), (.1, .3),
                                          (.1, torch.tensor([.2, .4], dtype=torch.float64))])
@pytest.mark.parametrize('slots', [2, 3])
def test_sparse_cat(eps_a, eps_b, slots):
    a, b = sparse_problem(3, 2, 5, 0, eps_a), sparse_problem(2, slots, 5, 1, eps_b)
    both = SparseTargets.cat([a, b])
    assert len(both) == 5
    o.same(both.dense(), torch.cat([a.dense(), b.dense()]))


def test_sparse_to():
    t = sparse_problem(3, 2, 5, epsilon=torch.tensor([.1, .2, .3], dtype=torch.float64))
    low = t.to(torch.float32)
    assert low.dense().dtype == torch.float32 and not low.indices.is_floating_point()
    torch.testing.assert_close(low.dense().double(), t.dense(), rtol=1e-6, atol=1e-6)
    assert torch.equal(t.to('cpu').dense(), t.dense())
    meta = t.to('meta')
    assert meta.indices.device.type == meta.weights.device.type == 'meta'


@pytest.mark.parametrize('eps0', [0., .15])
def test_smooth_and_mix_of_sparse_are_sparse(eps0):
    t, perm = sparse_problem(4, 2, 5, epsilon=eps0), torch.tensor([2, 0, 3, 1])
    lam = torch.tensor([.1, .4, .8, 1.], dtype=torch.float64)
    for got, wanted in [(smooth(t, .3), smooth(t.dense(), .3)), (mix(t, .3), mix(t.dense(), .3)),
                        (mix(t, lam, perm), mix(t.dense(), lam, perm)),
                        (mix(smooth(t, .1), .6, perm), mix(smooth(t.dense(), .1), .6, perm)),
                        (smooth(mix(t, .6, perm), .1), smooth(mix(t.dense(), .6, perm), .1))]:
        assert isinstance(got, SparseTargets)
        o.same(got.dense(), wanted)


def test_one_epsilon_may_be_a_tensor_without_dimensions():
    t = sparse_problem(4, 2, 5, epsilon=torch.tensor(.1, dtype=torch.float64))
    o.same(t.dense(), o.dense_sparse(t.indices, t.weights, .1, 5))
    o.same(mix(smooth(t, .2), .3).dense(), mix(smooth(t.dense(), .2), .3))


def test_mix_of_sparse_rows_with_their_own_epsilon_is_refused():
    t = sparse_problem(4, 2, 5, epsilon=torch.tensor([0., .1, .2, .6], dtype=torch.float64))
    with pytest.raises(ValueError, match='targets must have one epsilon'): mix(t, .3)


@pytest.mark.parametrize('per_row', [False, True])
@pytest.mark.parametrize('name', ['cross_entropy', 'in_batch', 'extra', 'dense_extra', 'queue', 'fresh', 'closed',
                                  'chunked', 'linear'])
def test_sparse_equals_dense_in_every_loss(name, per_row):
    n, k = 4, 6
    eps = torch.tensor([0., .1, .3, 1.], dtype=torch.float64) if per_row else .1
    t, x, eta = sparse_problem(n, 2, k, 0, eps), o.logits(n, k), o.noise(k)
    more, past = sparse_problem(3, 3, k, 1, .2), sparse_problem(3, 2, k, 2, .1)
    w, b = o.logits(k, 2, 5), o.noise(k, 4)

    def loss(kind):
        form = (lambda a: a) if kind == 'sparse' else (lambda a: a.dense())
        kw = dict(noise_probs=eta, temperature=.7, reduction='none')
        if name == 'cross_entropy':
            return lambda l: soft_target_cross_entropy(l, form(t), temperature=.7, reduction='none')
        if name == 'linear':
            return lambda l: linear_soft_target_info_nce(l[:, :2], w.detach(), form(t), bias=b,
                                                         noise_samples=form(more), **kw)
        if name == 'queue':
            q = Queue(5)
            soft_target_info_nce(x.detach()[:3], form(past), noise_samples=q, **kw)
            return lambda l: soft_target_info_nce(l, form(t), noise_samples=q, **kw)
        source = {'in_batch': None, 'chunked': None, 'extra': form(more), 'dense_extra': more.dense(),
                  'fresh': Fresh(4, lam=.3, epsilon=.1, generator=o.generator(0)),
                  'closed': ClosedForm(lam=.3, epsilon=.1)}[name]
        return lambda l: soft_target_info_nce(l, form(t), noise_samples=source,
                                              chunk_size=3 if name == 'chunked' else None, **kw)

    o.same_value_and_grad(loss('sparse'), loss('dense'), x)


def test_sparse_in_many_classes():
    n, k = 3, 21841
    t, x = sparse_problem(n, 2, k, 0, .1), o.logits(n, k)
    f = lambda a: lambda l: soft_target_info_nce(l, a, noise_probs=o.noise(k), reduction='none')
    o.same_value_and_grad(f(t), f(t.dense()), x)
