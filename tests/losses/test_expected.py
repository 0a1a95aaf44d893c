"""`expected_info_nce`, the mean of Eq. (30) over the draw of the positive: a literal oracle for every kind of target
and source, its optimum by enumeration, its modules, ranks and micro-batches."""
import copy
import itertools
import math
import pickle

import pytest
import torch

import oracles as o
from softnce.contrast import set_backend
from softnce.distributed import micro_batch_noise
from softnce.losses import (ExpectedInfoNCE, InfoNCE, expected_info_nce, info_nce, linear_expected_info_nce,
                            sample_labels, soft_distribution_info_nce, soft_target_cross_entropy, soft_target_info_nce)
from softnce.noise import ClosedForm, Fresh, InBatch, Queue
from softnce.targets import SparseTargets, one_hot, smooth

N, K, TAU, SEED = 3, 4, .7, 5


# ---------------------------------------------------------------- the oracle
def literal(logits, targets, noise, noise_probs=None, temperature=1.):
    "sum_k alpha_k [log(exp s_k + sum_m exp s_(y_m)) - s_k] by loops; `noise`: the noise labels of each row."
    s, out = o.scores(logits, noise_probs, temperature), []
    for i in range(len(logits)):
        total = 0.
        for k in range(logits.shape[1]):
            if targets[i, k] == 0: continue  # a class without mass costs nothing, also where its score is -inf
            candidates = [s[i][k]] + [s[i][int(y)] for y in noise[i] if s[i][int(y)] > -math.inf]
            total = total + targets[i, k]*(o.log_sum_exp(candidates) - s[i][k])
        out.append(total)
    return torch.stack(out)


def infinite_noise(logits, targets, law, noise_probs, temperature):
    "The same with a mean over noise labels from `law` in place of their sum, as their number grows."
    s = o.scores(logits, noise_probs, temperature)
    return torch.stack([o.log_sum_exp([s[i][k] + law[k].log() for k in range(len(law))]) - o.energy(targets[i], s[i])
                        for i in range(len(logits))])


def without(labels, i): return [*labels[:i], *labels[i+1:]]


# ---------------------------------------------------------------- kinds of targets
def sparse(epsilon):
    indices = torch.tensor([[0, 2], [3, 3], [1, 0]])  # a class may stand twice
    return SparseTargets(indices, o.simplex(N, 2, 4), epsilon, K)


def targets_of(kind):
    "The targets, and the same as rows."
    t = {'ids': lambda: torch.tensor([2, 0, 2]), 'dense': lambda: o.simplex(N, K, 1),
         'zeros': lambda: torch.tensor([[.5, .5, 0, 0], [0, 1., 0, 0], [0, 0, .3, .7]], dtype=torch.float64),
         'sparse': lambda: sparse(0.), 'smoothed': lambda: sparse(.2), 'float32': lambda: sparse(.2).to(torch.float32),
         'varied': lambda: sparse(torch.tensor([0., .1, .4], dtype=torch.float64))}[kind]()
    if isinstance(t, SparseTargets): return t, o.dense_sparse(t.indices, t.weights.double(), t.epsilon, K)
    return t, o.dense(t, K)


KINDS = 'ids', 'dense', 'zeros', 'sparse', 'smoothed', 'varied', 'float32'


# ---------------------------------------------------------------- sources
SOFT = o.simplex(2, K, 21)
ETA = o.noise(K, 7)


def queue():
    q = Queue(3)
    for rows in (torch.tensor([1, 2]), torch.tensor([3, 0])):
        expected_info_nce(torch.zeros(2, K, dtype=torch.float64), rows, noise_samples=q)
    return q


ALL = [[y] for y in range(K)]
TWO = [list(y) for y in itertools.combinations_with_replacement(range(K), 2)]
SOURCES = {  # a source, in the same state each time; what labels it can give; whether the other rows' join them
    'batch': (lambda: None, [[]], True), 'in-batch': (lambda: InBatch(ranks='own'), [[]], True),
    'ids': (lambda: torch.tensor([1, 3, 3]), [[1, 3, 3]], True), 'soft': (lambda: SOFT, TWO, True),
    'sparse': (lambda: SparseTargets(torch.tensor([[1, 2]]), o.simplex(1, 2, 2), .1, K), ALL, True),
    'queue': (queue, [[2, 3, 0]], True), 'fresh': (lambda: Fresh(2, generator=o.generator(3)), TWO, False),
    'mixed fresh': (lambda: Fresh(2, .6, .3, generator=o.generator(4)), TWO, False),
}


def noise_tuples(source, dense):
    "Every list of noise labels that the rows can have: a list of them for each row."
    _, more, in_batch = SOURCES[source]
    own = itertools.product(*[[y for y in range(K) if row[y] > 0] for row in dense]) if in_batch else [None]
    return [[[*(without(y, i) if in_batch else []), *rest] for i in range(N)] for y in own for rest in more]


def found_labels(source, x, t, dense, **kw):
    "The noise labels that explain the losses of every row: up to order one list, of all that could be drawn."
    got = expected_info_nce(x.detach(), t, noise_samples=SOURCES[source][0](), reduction='none',
                            generator=o.generator(SEED), **kw)
    scores = (x.detach()/kw['temperature'] - kw['noise_probs'].log()).exp()
    tuples = noise_tuples(source, dense)
    z = torch.tensor([[scores[i, noise].sum() for i, noise in enumerate(rows)] for rows in tuples])[..., None]
    losses = (dense*((scores + z).log() - scores.log())).sum(-1)
    hits = {tuple(tuple(sorted(row)) for row in tuples[h])
            for h in (losses - got).abs().amax(1).lt(1e-10).nonzero()[:, 0]}
    assert len(hits) == 1
    return hits.pop()


# ---------------------------------------------------------------- value and gradient
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_source_and_reduction(kind, source, reduction):
    (t, dense), x = targets_of(kind), o.logits(N, K, 2)
    kw = dict(noise_probs=ETA, temperature=TAU)
    noise = found_labels(source, x, t, dense, **kw)
    wanted = lambda l: o.reduced(literal(l, dense, noise, ETA, TAU), reduction)
    kw |= dict(reduction=reduction)
    loss = lambda l: expected_info_nce(l, t, noise_samples=SOURCES[source][0](), generator=o.generator(SEED), **kw)
    o.same_value_and_grad(loss, wanted, x)
    with set_backend('reference'): o.same_value_and_grad(loss, wanted, x)
    z, w, b = o.logits(N, 2, 5), o.logits(K, 2, 6), o.logits(1, K, 7)[0]
    linear = lambda z, w, b: linear_expected_info_nce(z, w, t, bias=b, noise_samples=SOURCES[source][0](),
                                                      generator=o.generator(SEED), **kw)
    o.same_value_and_grad(linear, lambda z, w, b: wanted(o.linear_logits(z, w, b)), z, w, b)


@pytest.mark.parametrize('kind', KINDS[:-1])  # the mass of targets that were rounded to fp32 is not one
@pytest.mark.parametrize('source, law', [(ClosedForm(), ETA), (ClosedForm(.6), ETA),
                                         (ClosedForm(.6, .3), .7*ETA + .3/K)], ids=str)
def test_closed_form_is_the_limit(kind, source, law):
    (t, dense), x = targets_of(kind), o.logits(N, K, 2)
    kw = dict(noise_probs=ETA, temperature=TAU)
    wanted = lambda l: infinite_noise(l, dense, law, **kw)
    o.same_value_and_grad(lambda l: expected_info_nce(l, t, noise_samples=source, reduction='none', **kw), wanted, x)
    z, w = o.logits(N, 2, 5), o.logits(K, 2, 6)
    linear = lambda z, w: linear_expected_info_nce(z, w, t, noise_samples=source, reduction='none', **kw)
    o.same_value_and_grad(linear, lambda z, w: wanted(o.linear_logits(z, w)), z, w)


def test_closed_form_is_soft_cross_entropy():
    (t, dense), x = targets_of('dense'), o.logits(N, K, 2)
    o.same_value_and_grad(lambda l: expected_info_nce(l, t, noise_probs=ETA, noise_samples=ClosedForm()),
                          lambda l: soft_target_cross_entropy(l, t) + (dense @ ETA.log()).mean(), x)


def test_no_noise_probs_is_uniform():
    t, x = targets_of('dense')[0], o.logits(N, K, 2)
    loss = lambda eta: lambda l: expected_info_nce(l, t, noise_probs=eta, noise_samples=torch.tensor([1, 2]),
                                                   generator=o.generator(1))
    o.same_value_and_grad(loss(None), loss(torch.full((K,), .25, dtype=torch.float64)), x)


def test_one_hot_targets_are_info_nce():
    y, x = torch.tensor([2, 0, 2]), o.logits(N, K, 2)
    for source in (lambda: None, queue, lambda: torch.tensor([1, 1]), lambda: Fresh(3, generator=o.generator(1))):
        for t in (y, one_hot(y, K).double(), SparseTargets.from_labels(y, K, torch.float64)):
            o.same_value_and_grad(lambda l: expected_info_nce(l, t, noise_probs=ETA, noise_samples=source(),
                                                              reduction='none'),
                                  lambda l: info_nce(l, y, noise_probs=ETA, noise_samples=source(),
                                                     reduction='none'), x)


def test_it_is_the_mean_of_the_sampled_loss():
    "Over the positive's draw, with the noise labels of the same draws: fresh ones, which do not depend on it."
    (t, dense), x = targets_of('dense'), o.logits(N, K, 2)
    def fresh(): return Fresh(3, generator=o.generator(8))
    loss = expected_info_nce(x, t, noise_probs=ETA, noise_samples=fresh(), reduction='none')
    def at(k): return soft_distribution_info_nce(x, torch.full((N,), k), noise_probs=ETA, noise_samples=fresh(),
                                                 reduction='none')
    o.same(loss, sum(dense[:, k]*at(k) for k in range(K)))


def test_noise_labels_follow_the_targets_of_the_other_rows():
    "The mean over many draws is that over every draw, by its probability; a row's own label does not enter."
    (t, dense), x = targets_of('smoothed'), o.logits(N, K, 2).detach()
    def at(y): return literal(x, dense, [without(y, i) for i in range(N)], ETA)
    exact = sum(math.prod(float(dense[i, y[i]]) for i in range(N))*at(y)
                for y in itertools.product(range(K), repeat=N))
    g = o.generator(0)
    draws = torch.stack([expected_info_nce(x, t, noise_probs=ETA, reduction='none', generator=g) for _ in range(4000)])
    assert ((draws.mean(0) - exact).abs() < 4*draws.std(0)/math.sqrt(4000)).all()


def test_labels_of_a_queue_are_drawn_again_at_each_call():
    q, x, rows = Queue(8), o.logits(N, K, 2), targets_of('dense')[0]
    expected_info_nce(x, rows, noise_samples=q)
    assert torch.equal(q.targets, rows)  # the rows' targets, not the labels of one call
    with torch.no_grad(): values = {expected_info_nce(x, torch.tensor([0, 1, 2]), noise_samples=q).item()
                                    for _ in range(20)}
    assert len(values) > 5


# ---------------------------------------------------------------- what the other losses promise
def shift(x): return x + torch.tensor([[1e4], [-3e3], [7.]], dtype=x.dtype)


@pytest.mark.parametrize('kind', KINDS)
def test_a_shift_of_a_row_changes_nothing(kind):
    t, x = targets_of(kind)[0], torch.randint(-8, 8, (N, K), generator=o.generator(3)).float()/4
    loss = lambda l: expected_info_nce(l, t, noise_samples=torch.tensor([1, 2]), generator=o.generator(1),
                                       reduction='none')
    (v1, (g1,)), (v2, (g2,)) = o.value_and_grad(loss, x), o.value_and_grad(lambda l: loss(shift(l)), x)
    assert torch.equal(v1, v2) and torch.equal(g1, g2)


@pytest.mark.parametrize('kind', ['zeros', 'sparse', 'ids'])
@pytest.mark.parametrize('form', ['logits', 'linear', 'reference'])
def test_masked_classes_cost_nothing_where_no_target_has_mass(kind, form):
    x = o.logits(N, K, 2).detach()
    t, dense = targets_of(kind)
    mask = dense == 0
    if form == 'linear': mask = mask.all(0, keepdim=True) | torch.zeros_like(mask)  # the bias masks a class in all rows
    noise = torch.tensor([0, 1, 2, 3])
    masked = x.masked_fill(mask, -math.inf)
    source = Fresh(4)
    source.draw = lambda eta: noise
    if form == 'linear':
        bias = torch.zeros(K, dtype=torch.float64).masked_fill(mask[0], -math.inf)
        loss = lambda l: linear_expected_info_nce(l, torch.eye(K, dtype=torch.float64), t, bias=bias,
                                                  noise_samples=source, reduction='none')
    else: loss = lambda l: expected_info_nce(l + (masked - x), t, noise_samples=source, reduction='none')
    with set_backend('reference' if form == 'reference' else None): value, (grad,) = o.value_and_grad(loss, x)
    o.same(value, literal(masked, dense, [noise]*N))
    assert grad.isfinite().all() and (grad[mask] == 0).all()


@pytest.mark.parametrize('kind', ['dense', 'smoothed', 'varied'])
def test_mass_on_a_masked_class_is_an_infinite_loss(kind):
    x, t = o.logits(N, K, 2).detach(), targets_of(kind)[0]
    x[1, 1] = -math.inf
    found = expected_info_nce(x, t, reduction='none', generator=o.generator(1))
    assert found[1] == math.inf and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize('backend', [None, 'reference'])
@pytest.mark.parametrize('loss', [expected_info_nce, soft_target_cross_entropy, soft_target_info_nce])
def test_many_masked_classes_and_rows_of_their_own_epsilon(loss, backend):
    "In fp32 a sum of scores of masked classes overflows; a row without smoothing does not see it."
    x = torch.zeros(2, 100).masked_fill(torch.arange(100) >= 3, -math.inf)
    t = SparseTargets(torch.tensor([[0], [1]]), torch.ones(2, 1), torch.tensor([0., .5]), 100)
    with set_backend(backend): found = loss(x, t, reduction='none')
    assert found[0].isfinite() and found[1] == math.inf


def test_a_single_row_without_noise_is_zero():
    for t in (targets_of('dense')[0][:1], sparse(.2)[:1]):
        value, (grad,) = o.value_and_grad(lambda l: expected_info_nce(l, t), o.logits(1, K, 2))
        assert value.abs() < 1e-14 and grad.abs().max() < 1e-14


@pytest.mark.parametrize('copies', [0, 1, 5])
def test_a_row_that_is_sure_keeps_its_digits(copies):
    "Value and gradient in fp32 against float64, also where `copies` noise labels are the own one."
    noise = torch.tensor([0]*copies + [1, 2])
    def loss(dtype): return o.value_and_grad(lambda l: expected_info_nce(l, torch.tensor([0]), noise_samples=noise,
                                                                         reduction='none'),
                                             torch.tensor([[30., 0., -5.]], dtype=dtype))
    (v1, (g1,)), (v2, (g2,)) = loss(torch.float32), loss(torch.float64)
    torch.testing.assert_close(v1.double(), v2, rtol=1e-5, atol=0)
    torch.testing.assert_close(g1.double(), g2, rtol=1e-5, atol=0)
    assert g2[0, 0] < 0


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(dtype):
    t, x = targets_of('smoothed')[0].to(torch.float32), o.logits(N, K, 2).detach().to(dtype)
    loss = lambda l: expected_info_nce(l, t, generator=o.generator(1), reduction='none')
    (v1, (g1,)), (v2, (g2,)) = o.value_and_grad(loss, x), o.value_and_grad(loss, x.float())
    assert v1.dtype == torch.float32 and g1.dtype == dtype
    torch.testing.assert_close(v1, v2)
    torch.testing.assert_close(g1.float(), g2, rtol=1e-2, atol=1e-3)


def test_temperature_and_targets_have_gradients():
    (t, dense), x, tau = targets_of('dense'), o.logits(N, K, 2), torch.tensor(.7, dtype=torch.float64)
    noise = [[1, 2]]*N
    source = Fresh(2)
    source.draw = lambda eta: torch.tensor([1, 2])
    o.same_value_and_grad(lambda l, t, tau: expected_info_nce(l, t, noise_probs=ETA, temperature=tau,
                                                              noise_samples=source, reduction='none'),
                          lambda l, t, tau: literal(l, t, noise, ETA, tau), x, dense, tau)


def test_second_derivatives_and_transforms():
    t, x = targets_of('smoothed')[0], o.logits(N, K, 2)
    loss = lambda l: expected_info_nce(l, t, noise_probs=ETA, generator=o.generator(1), reduction='none')
    assert torch.autograd.gradcheck(loss, x) and torch.autograd.gradgradcheck(loss, x)
    o.same(torch.func.grad(lambda l: loss(l).sum())(x.detach()), torch.autograd.grad(loss(x).sum(), x)[0])


@pytest.mark.parametrize('kind', ['ids', 'dense', 'smoothed', 'varied'])
def test_many_rows_and_classes_in_blocks(kind):
    g = o.generator(0)
    ids, w = torch.randint(900, (700, 2), generator=g), o.simplex(700, 2, 3)
    epsilon = {'smoothed': .1, 'varied': torch.rand(700, generator=g, dtype=torch.float64)}.get(kind, 0.)
    t = SparseTargets(ids, w, epsilon, 900)
    t = {'ids': ids[:, 0], 'dense': t.dense()}.get(kind, t)
    x = torch.randn(700, 900, generator=g, dtype=torch.float64)
    loss = lambda l: expected_info_nce(l, t, noise_samples=torch.arange(50), generator=o.generator(1), reduction='none')
    found = o.value_and_grad(loss, x)
    with set_backend('reference'): wanted = o.value_and_grad(loss, x)
    o.same(found, wanted)


# ---------------------------------------------------------------- the linear form
@pytest.mark.parametrize('source', [None, torch.tensor([5, 5, 8]), Fresh(3)], ids=str)
def test_sparse_gradients(source):
    g = o.generator(0)
    z, w, b = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((N, 3), (50, 3), (50,)))
    eta, t = o.noise(50, 1), SparseTargets(torch.randint(50, (N, 2), generator=g), o.simplex(N, 2, 1), 0., 50)
    if isinstance(source, Fresh): source.draw = lambda eta: torch.tensor([1, 2, 3])
    kw = dict(noise_probs=eta, temperature=.7, noise_samples=source, reduction='none')
    loss = lambda sparse_grad: lambda z, w, b: linear_expected_info_nce(z, w, t, bias=b, generator=o.generator(2),
                                                                        sparse_grad=sparse_grad, **kw)
    v1, (gz, gw, gb) = o.value_and_grad(loss(True), z, w, b)
    v2, dense = o.value_and_grad(loss(False), z, w, b)
    assert gw.layout == torch.sparse_coo and gw._nnz() < 50
    for a, c in zip((v1, gz, gw.to_dense(), gb), (v2, *dense)): o.same(a, c)
    logits = lambda z, w, b: expected_info_nce(z @ w.T + b, t, generator=o.generator(2), **kw)
    o.same_value_and_grad(logits, loss(False), z, w, b)


def test_sparse_gradients_are_refused_where_they_would_be_dense():
    z, w = torch.zeros(N, 2), torch.zeros(K, 2)
    for t, source in ((o.simplex(N, K), None), (sparse(.1), None), (sparse(0.), ClosedForm())):
        with pytest.raises(ValueError, match='sparse_grad needs SparseTargets or class ids'):
            linear_expected_info_nce(z, w, t, noise_samples=source, sparse_grad=True)
    linear_expected_info_nce(z, w, sparse(0.), noise_samples=SOFT.float(), sparse_grad=True)  # its labels are hard


def test_nothing_of_size_k_but_the_head():
    "From embeddings of sparse targets no tensor has a row of K numbers."
    from torch.utils._python_dispatch import TorchDispatchMode
    shapes = set()
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.update(tuple(x.shape) for x in (out if isinstance(out, (tuple, list)) else [out])
                          if isinstance(x, torch.Tensor))
            return out
    z, w = torch.randn(6, 3, requires_grad=True), torch.randn(5000, 3, requires_grad=True)
    t = SparseTargets(torch.randint(5000, (6, 2)), torch.full((6, 2), .5), 0., 5000)
    with Watch(): linear_expected_info_nce(z, w, t, sparse_grad=True).backward()
    wide = {s for s in shapes if s and math.prod(s) > 5000}
    assert wide <= {(5000, 3)}


# ---------------------------------------------------------------- the optimum
def population(s, mu, law, size):
    "The mean of the loss over every tuple of `size` noise labels from `law`, for a row with mean target `mu`."
    total = 0.
    for y in itertools.product(range(len(law)), repeat=size):
        source = Fresh(size)
        source.draw = lambda eta: torch.tensor(y)
        total = total + math.prod(float(law[k]) for k in y)*expected_info_nce(s[None], mu[None], noise_samples=source)
    return total


@pytest.mark.parametrize('size', [1, 2, 4])
@pytest.mark.parametrize('seed', [0, 1])
def test_the_optimum_is_the_mean_target_for_every_number_of_noise_labels(size, seed):
    mu, law = o.simplex(1, 3, seed)[0], o.noise(3, seed)
    s = torch.zeros(3, dtype=torch.float64)
    loss = lambda s: population(torch.cat([s, s.new_zeros(1)]), mu, law, size)
    s = torch.zeros(2, dtype=torch.float64)
    for _ in range(40):
        step = torch.linalg.solve(torch.autograd.functional.hessian(loss, s),
                                  torch.autograd.functional.jacobian(loss, s))
        s = s - step/max(1., step.norm().item())
    scores = torch.cat([s, s.new_zeros(1)])
    torch.testing.assert_close((scores + law.log()).softmax(0), mu, rtol=0, atol=1e-10)
    logits = scores + law.log()  # of a loss with noise_probs: its scores are l - log eta
    torch.testing.assert_close(ExpectedInfoNCE(noise_probs=law, noise_samples=Fresh(size)).probs(logits[None])[0], mu,
                               rtol=0, atol=1e-10)


def slope(f, x): return o.value_and_grad(f, x)[1][0].abs().max()


@pytest.mark.parametrize('kind', ['teacher', 'votes'])
def test_in_batch_optimum_by_every_batch(kind):
    "Every pair of rows of a joint law of inputs and targets, and every draw: the gradient vanishes at E[alpha|x]."
    px, p = torch.tensor([.5, .3, .2], dtype=torch.float64), o.simplex(3, 3, 5)
    votes = [((e(i) + e(j))/2, (i, j)) for i, j in itertools.product(range(3), repeat=2)]
    rows = [(x, p[x], px[x]) for x in range(3)] if kind == 'teacher' else \
        [(x, a, px[x]*p[x, i]*p[x, j]) for x in range(3) for a, (i, j) in votes]
    marginal = px @ p

    def run(logits):
        total = 0.
        for (a, t, v), (b, u, w) in itertools.product(rows, repeat=2):
            for y in u.nonzero()[:, 0].tolist():  # the other row's label
                loss = literal(logits[[a]], t[None], [[y]], marginal)
                total = total + v*w*u[y]*loss.sum()
        return total

    best = ExpectedInfoNCE(noise_probs=marginal)
    offset = torch.tensor([[.4], [-1.], [2.]], dtype=torch.float64)
    assert slope(run, p.log() + offset) < 1e-14
    o.same(best.probs(p.log() + offset), p)
    assert slope(run, (p*marginal).log()) > 1e-3


def e(k): return torch.eye(3, dtype=torch.float64)[k]


@pytest.mark.parametrize('eps', [0., .1, .5])
def test_probs_undo_smoothing(eps):
    "In-batch labels follow the smoothed marginal; those of Fresh and ClosedForm the law of the source."
    p, eta, x = o.simplex(3, 3, 5), o.noise(3, 2), torch.tensor([[.4], [-1.], [2.]], dtype=torch.float64)
    p_eps, batch_law = (1-eps)*p + eps/3, (1-eps)*eta + eps/3
    for source, law in ((None, batch_law), (Queue(3), batch_law), (Fresh(4), eta), (ClosedForm(), eta),
                        (Fresh(4, .7, .2), .8*eta + .2/3), (ClosedForm(.7, .2), .8*eta + .2/3)):
        module = ExpectedInfoNCE(noise_probs=eta, temperature=.7, noise_samples=source)
        logits = .7*((p_eps/law).log() + eta.log() + x)
        o.same(module.probs(logits, epsilon=eps), p)
        for row in range(3): assert slope(lambda l: population(l[row]/.7 - eta.log(), p_eps[row], law, 2),
                                          logits) < 1e-14


# ---------------------------------------------------------------- modules
@pytest.mark.parametrize('source', [lambda: None, lambda: Queue(4), lambda: Fresh(3), lambda: ClosedForm(),
                                    lambda: torch.tensor([1, 2])])
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_module_is_the_function(source, reduction):
    t, x = targets_of('smoothed')[0], o.logits(N, K, 2)
    module = ExpectedInfoNCE(ETA, TAU, source(), reduction, o.generator(3))
    kw = dict(noise_probs=ETA, temperature=TAU, noise_samples=source(), reduction=reduction, generator=o.generator(3))
    assert isinstance(module, InfoNCE)
    for _ in range(2):
        torch.manual_seed(1)
        got = o.value_and_grad(lambda l: module(l, t), x)
        torch.manual_seed(1)
        o.same(got, o.value_and_grad(lambda l: expected_info_nce(l, t, **kw), x))


def test_module_state():
    module = ExpectedInfoNCE(ETA, torch.nn.Parameter(torch.tensor(.7)), Queue(4))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.noise_probs, ETA) and other.temperature == module.temperature
    assert 'noise_probs' in module.state_dict() and len(list(module.parameters())) == 1
    assert all(v.device.type == 'meta' for v in module.to('meta').state_dict().values() if isinstance(v, torch.Tensor))


def test_errors():
    x = torch.zeros(N, K)
    for call, message in ((lambda: expected_info_nce(x, o.simplex(N, 3)),
                           'targets must have 4 classes like the logits, got 3'),
                          (lambda: expected_info_nce(x, torch.tensor([0, 1, 9])),
                           r'targets must be in \[0, 4\), got values from 0 to 9'),
                          (lambda: expected_info_nce(x, torch.zeros(3, dtype=torch.long), noise_samples='queue'),
                           'noise_samples must be'),
                          (lambda: expected_info_nce(x, torch.zeros(3, dtype=torch.long), reduction='avg'),
                           "reduction must be"),
                          (lambda: linear_expected_info_nce(x, torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)),
                           'weight must have shape'),
                          (lambda: ExpectedInfoNCE().probs(x, epsilon=1.), r'epsilon must be in \[0, 1\)')):
        with pytest.raises(ValueError, match=message): call()


# ---------------------------------------------------------------- ranks and micro-batches
PARTS = {'2 ranks': (6, 6), '3 uneven ranks': (7, 1, 4)}
ROWS = 12


def batch():
    g = o.generator(1)
    hard = torch.randint(K, (ROWS,), generator=g)
    soft = SparseTargets(torch.randint(K, (ROWS, 2), generator=g), o.simplex(ROWS, 2, 3), .1, K)
    return o.logits(ROWS, 3, 9).detach(), o.logits(3, K, 8).detach(), dict(ids=hard, sparse=soft, dense=soft.dense())


def labels_of(parts, kind):
    "The labels that the ranks draw."
    t, starts = batch()[2][kind], itertools.accumulate((0, *parts))
    return torch.cat([sample_labels(t[a:a+n], o.generator(rank)) for rank, (a, n) in enumerate(zip(starts, parts))])


def of_rank(rank, parts, kind, name):
    "A rank's losses and gradient, summed over the ranks; `labels`: two rows at a time, labels drawn beforehand."
    import torch.distributed as dist
    x, w, targets = batch()
    rows, w = slice(sum(parts[:rank]), sum(parts[:rank+1])), w.requires_grad_()
    t, labels = targets[kind][rows], labels_of(parts, kind)[rows]
    steps = [slice(i, i+2) for i in range(0, len(labels), 2)] if name == 'labels' else [slice(0, len(labels))]
    source = {'batch': InBatch(ranks='all'), 'labels': None, 'extra': torch.tensor([1, 1]),
              'fresh': Fresh(5, generator=o.generator(rank), ranks='all')}[name]
    sources = [source]
    if name in ('labels', 'extra'): sources = micro_batch_noise([labels[s] for s in steps], source, ranks='all')
    value = sum(expected_info_nce(x[rows][s] @ w, t[s], noise_probs=ETA, noise_samples=q, reduction='sum',
                                  generator=o.generator(rank))
                for s, q in zip(steps, sources))
    found = torch.cat([value.detach()[None], torch.autograd.grad(value, w)[0].flatten()])
    dist.all_reduce(found)
    return found


@pytest.mark.parametrize('kind', ['ids', 'sparse', 'dense'])
@pytest.mark.parametrize('name', ['batch', 'labels', 'extra', 'fresh'])
@pytest.mark.parametrize('world', PARTS)
def test_ranks_and_micro_batches_are_the_global_batch(pool, world, name, kind):
    parts = PARTS[world]
    x, w, targets = batch()
    t = targets[kind]
    dense = t.dense() if isinstance(t, SparseTargets) else o.dense(t, K)
    labels, extra = labels_of(parts, kind).tolist(), [1, 1] if name == 'extra' else []
    noise = [[*without(labels, i), *extra] for i in range(ROWS)]
    if name == 'fresh': noise = [Fresh(5, generator=o.generator(0)).draw(ETA).indices[:, 0].tolist()]*ROWS
    w.requires_grad_()
    value = literal(x @ w, dense, noise, ETA).sum()
    grad, = torch.autograd.grad(value, w)
    wanted = torch.cat([value.detach()[None], grad.flatten()])
    for found in pool.run(len(parts), of_rank, parts, kind, name): o.same(found, wanted)


def test_micro_batches_of_soft_targets_draw_their_labels_by_themselves():
    "The noise labels of a micro-batch follow the other rows' targets: the mean over draws is that of the large batch."
    x, t = o.logits(4, K, 3).detach(), smooth(one_hot(torch.tensor([0, 1, 2, 2]), K).double(), .3)
    g = o.generator(0)
    def large(): return expected_info_nce(x, t, reduction='none', generator=g)
    def small():
        parts = zip(x.split(2), t.split(2), micro_batch_noise(t.split(2)))
        return torch.cat([expected_info_nce(l, u, noise_samples=s, reduction='none', generator=g) for l, u, s in parts])
    a, b = (torch.stack([f() for _ in range(1500)]) for f in (large, small))
    assert ((a.mean(0) - b.mean(0)).abs() < 4*(a.var(0) + b.var(0)).div(1500).sqrt()).all()
    def naive():
        parts = zip(x.split(2), t.split(2))
        return torch.cat([expected_info_nce(l, u, reduction='none', generator=g) for l, u in parts])
    wrong = torch.stack([naive() for _ in range(200)])
    assert ((a.mean(0) - wrong.mean(0)).abs() > .1).all()


def test_evaluation_leaves_a_queue_alone():
    q = Queue(9)
    with torch.no_grad(): expected_info_nce(o.logits(N, K), targets_of('dense')[0], noise_samples=q)
    assert q.targets is None


def alone(rank):
    "In evaluation and in training."
    if rank: return None
    logits, t = o.logits(N, K), targets_of('ids')[0]
    with torch.no_grad(): evaluated = expected_info_nce(logits, t)
    return torch.stack([evaluated, expected_info_nce(logits, t).detach()])


def test_a_rank_may_be_alone(pool):
    found = pool.run(2, alone, timeout=5)[0]
    o.same(found, alone(0))
    o.same(found[0], found[1])
