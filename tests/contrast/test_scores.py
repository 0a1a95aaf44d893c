"Which sum a loss takes; every sum against the literal loss; and what holds for all: masks, shifts, sure rows, no rows."
import itertools

import pytest
import torch
import torch.nn.functional as F

import literal_sums as o
from literal_sums import F64, INF
from softnce import ClosedForm, Fresh, SparseTargets, mix, one_hot, smooth
from softnce.candidates import AllClasses, gather_candidates, gather_noise_labels, parts_of
from softnce.contrast import ROUTES, Logits, contrast, position_posterior, set_backend
from softnce.contrast.scores import LinearScores, candidate_scores, logit_scores, written_out
from softnce.losses import (expected_info_nce, info_nce, linear_expected_info_nce, linear_soft_target_cross_entropy,
                            linear_soft_target_info_nce, nll, soft_target_cross_entropy, soft_target_info_nce)
from softnce.noise import noise_of
from softnce.targets import check_targets

BACKENDS = 'torch', 'reference'
N, K = 6, 5
ETA = torch.tensor([.3, .1, .2, .25, .15], dtype=F64)
X = o.normal(N, K, seed=5)


def hard(dtype=F64): return SparseTargets.from_labels(o.classes(K, N, seed=3), K, dtype)


def targets(kind, dtype=F64):
    one, lam = smooth(mix(hard(dtype), .3), .1), o.uniform(N, seed=4).to(dtype)
    unsmoothed = mix(hard(dtype), .3)
    return {'ids': hard().indices[:, 0], 'hard': hard(dtype), 'smoothed': smooth(hard(dtype), .2), 'one lam': one,
            'unsmoothed': unsmoothed, 'each lam': mix(hard(dtype), lam),
            'each epsilon': SparseTargets(one.indices, one.weights, lam, K),
            'padded': SparseTargets.cat([unsmoothed[:3], hard(dtype)[3:]]), 'dense': one.dense()}[kind]


KINDS = 'ids', 'hard', 'smoothed', 'one lam', 'unsmoothed', 'each lam', 'each epsilon', 'padded', 'dense'
SOURCES = {
    'in batch': lambda kind: None,
    'given': lambda kind: targets(kind)[:4],
    'given dense': lambda kind: o.uniform(4, K).softmax(1),
    'fresh': lambda kind: Fresh(7, generator=o.generator()),
    'fresh mixed': lambda kind: Fresh(7, .4, .1, generator=o.generator()),
    'closed form': lambda kind: ClosedForm(),
    'closed form mixed': lambda kind: ClosedForm(.3, .2),
}


# ---------------------------------------------------------------- the table of routes
CLASSES, COUNTS, SPARSE, DENSE, CLOSED = 'sum_classes', 'sum_counts', 'sum_sparse', 'sum_dense', 'sum_expectation'
ROUTE_OF = {  # of logits, by kind of targets and source; the columns are 'ids', 'hard', 'smoothed', and all others
    'cross-entropy': dict(ids=CLASSES, hard=CLASSES, smoothed=CLASSES, sparse=CLASSES, dense=CLASSES),
    'in batch': dict(ids=COUNTS, hard=COUNTS, smoothed=COUNTS, sparse=SPARSE, dense=DENSE),
    'given': dict(ids=COUNTS, hard=COUNTS, smoothed=COUNTS, sparse=SPARSE, dense=DENSE),
    'given dense': dict(ids=DENSE, hard=DENSE, smoothed=DENSE, sparse=DENSE, dense=DENSE),
    'fresh': dict(ids=COUNTS, hard=COUNTS, smoothed=SPARSE, sparse=SPARSE, dense=SPARSE),
    'fresh mixed': dict(ids=SPARSE, hard=SPARSE, smoothed=SPARSE, sparse=SPARSE, dense=SPARSE),
    'closed form': dict(ids=CLOSED, hard=CLOSED, smoothed=CLOSED, sparse=CLOSED, dense=CLOSED),
    'closed form mixed': dict(ids=CLOSED, hard=CLOSED, smoothed=CLOSED, sparse=CLOSED, dense=CLOSED),
    'drawn labels': {column: 'sum_labels' for column in ('ids', 'hard', 'smoothed', 'sparse', 'dense')},
}


@pytest.fixture
def taken(monkeypatch):
    "The sums that the table names, in the order in which they were called."
    seen = []
    def recording(route):
        def record(scores, candidates):
            seen.append(route.__name__)
            return route(scores, candidates)
        return record
    for key, route in list(ROUTES.items()): monkeypatch.setitem(ROUTES, key, recording(route))
    return seen


def call(form, source, kind):
    "A loss of a kind of targets, a source, and logits or the linear form."
    t, W = targets(kind), o.normal(K, 3, seed=6)
    z = o.normal(N, 3, seed=7)
    if source == 'cross-entropy': return soft_target_cross_entropy(X, t) if form == 'logits' else \
        linear_soft_target_cross_entropy(z, W, t)
    if source == 'drawn labels':
        return expected_info_nce(X, t) if form == 'logits' else linear_expected_info_nce(z, W, t)
    noise = dict(noise_samples=SOURCES[source](kind), noise_probs=ETA)
    return soft_target_info_nce(X, t, **noise) if form == 'logits' else linear_soft_target_info_nce(z, W, t, **noise)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('source', ROUTE_OF)
def test_the_route_of_logits(source, kind, taken):
    call('logits', source, kind)
    column = kind if kind in ('ids', 'hard', 'smoothed', 'dense') else 'sparse'
    assert taken == [ROUTE_OF[source][column]]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('source', ROUTE_OF)
def test_the_route_of_a_linear_head(source, kind, taken):
    call('linear', source, kind)
    assert taken == [{'cross-entropy': 'sum_linear_classes', 'drawn labels': 'sum_linear_labels',
                      'closed form': 'sum_linear_expectation',
                      'closed form mixed': 'sum_linear_expectation'}.get(source, 'sum_linear')]


def test_every_row_of_the_table_is_taken_by_some_call(taken):
    for form, source, kind in itertools.product(('logits', 'linear'), ROUTE_OF, ('ids', 'one lam', 'dense')):
        call(form, source, kind)
    assert set(taken) >= {'sum_classes', 'sum_counts', 'sum_sparse', 'sum_dense', 'sum_expectation', 'sum_labels',
                          'sum_linear', 'sum_linear_classes', 'sum_linear_expectation', 'sum_linear_labels'}
    assert len(ROUTES) == 11 and all(len(key) == 2 for key in ROUTES)


# ---------------------------------------------------------------- every route is the literal loss
def as_rows(t):
    "Targets as lists of numbers."
    if isinstance(t, SparseTargets): t = t.dense()
    return (one_hot(t, K).double() if t.ndim == 1 else t).tolist()


def literal_loss(x, t, others, in_batch, log_eta=None, scale=1.):
    "-log of the own candidate's part among all: one loop over candidates."
    own, rows = as_rows(t), []
    for i, s in enumerate(o.scores(x, log_eta, scale)):
        terms = [o.energy(a, s) for m, a in enumerate(own) if in_batch and m != i]
        terms += [o.energy(own[i], s)] + [o.energy(a, s) for a in others]
        rows.append(o.log_sum_exp(terms) - o.energy(own[i], s))
    return torch.stack(rows)


def literal_closed_form(x, t, noise, eta, log_eta, scale):
    "The expectation over both labels of a noise target, enumerated."
    rows, own = [], as_rows(t)
    for i, s in enumerate(o.scores(x, log_eta, scale)):
        terms = []
        for a, b in itertools.product(range(K), repeat=2):
            alpha = torch.full((K,), noise.epsilon/K, dtype=F64)
            alpha[a] += (1-noise.epsilon)*noise.lam
            alpha[b] += (1-noise.epsilon)*(1-noise.lam)
            terms.append(o.energy(alpha.tolist(), s) + (eta[a]*eta[b]).log())
        rows.append(o.log_sum_exp(terms) - o.energy(own[i], s))
    return torch.stack(rows)


def literal_of(source, kind, log_eta, scale):
    "The literal loss of a source, and its candidates beside the batch."
    noise, t = SOURCES[source](kind), targets(kind)
    eta = torch.full((K,), 1/K, dtype=F64) if log_eta is None else ETA
    if isinstance(noise, ClosedForm): return lambda x: literal_closed_form(x, t, noise, eta, log_eta, scale)
    if isinstance(noise, Fresh):
        drawn = as_rows(noise.draw(eta))
        return lambda x: literal_loss(x, t, drawn, False, log_eta, scale)
    return lambda x: literal_loss(x, t, [] if noise is None else as_rows(noise), True, log_eta, scale)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('source', SOURCES)
def test_every_route_is_the_literal_loss(source, kind, backend):
    for noise_probs, temperature in ((None, 1.), (ETA, .7)):
        log_eta = None if noise_probs is None else ETA.log()
        def loss(x):
            return soft_target_info_nce(x, targets(kind), noise_probs=noise_probs, temperature=temperature,
                                        noise_samples=SOURCES[source](kind), reduction='none')
        with set_backend(backend): o.assert_same(loss, literal_of(source, kind, log_eta, 1/temperature), X)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('source', SOURCES)
def test_every_route_of_a_linear_head_is_the_literal_loss(source, kind, backend):
    z, W, b = o.normal(N, 3, seed=7), o.normal(K, 3, seed=6), o.normal(K, seed=8)
    literal = literal_of(source, kind, ETA.log(), 1/.7)
    def loss(z, W, b):
        return linear_soft_target_info_nce(z, W, targets(kind), bias=b, noise_probs=ETA, temperature=.7,
                                           noise_samples=SOURCES[source](kind), reduction='none')
    with set_backend(backend): o.assert_same(loss, lambda z, W, b: literal(z @ W.T + b), z, W, b)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kind', KINDS)
def test_cross_entropy_is_the_literal_loss(kind, backend):
    def literal(x): return o.sums_over_classes(x, as_rows(targets(kind)), scale=2.)
    with set_backend(backend):
        for tau, factor in ((.5, 1), (1., 2)):
            def loss(x): return soft_target_cross_entropy(factor*x, targets(kind), temperature=tau, reduction='none')
            o.assert_same(loss, literal, X)


# ---------------------------------------------------------------- small and large, fast and plain
SIZES = [(6, 5), (256, 300)]  # below and above where PyTorch's own cross-entropy and one block of rows serve


def large(kind, n, k, dtype=torch.float32):
    "Targets of a kind over any number of classes; no mass on class 0 but where there is a background."
    y = SparseTargets.from_labels(torch.randint(1, k, (n,), generator=o.generator(1)), k, dtype)
    lam = torch.rand(n, generator=o.generator(2)).to(dtype)
    padded = SparseTargets.cat([mix(y, .3)[:n//2], y[n//2:]])
    return {'ids': y.indices[:, 0], 'hard': y, 'smoothed': smooth(y, .05), 'one lam': smooth(mix(y, .3), .05),
            'unsmoothed': mix(y, .3), 'each lam': mix(y, lam), 'each epsilon': smooth(mix(y, .3), .2*lam),
            'padded': padded, 'dense': smooth(mix(y, lam), .05).dense(), 'dense unsmoothed': padded.dense()}[kind]


LARGE = *KINDS, 'dense unsmoothed'
NO_BACKGROUND = 'ids', 'hard', 'unsmoothed', 'each lam', 'padded', 'dense unsmoothed'
LOSSES = {
    'cross-entropy': lambda l, t: soft_target_cross_entropy(l, t, reduction='none'),
    'in batch': lambda l, t: soft_target_info_nce(l, t, reduction='none'),
    'given': lambda l, t: soft_target_info_nce(l, t, noise_samples=t[:3], reduction='none'),
    'fresh': lambda l, t: soft_target_info_nce(l, t, noise_samples=Fresh(9, .6, generator=o.generator()),
                                               reduction='none'),
    'closed form': lambda l, t: soft_target_info_nce(l, t, noise_samples=ClosedForm(.6, .1), reduction='none'),
}


def double(t):
    "In float64, where rows that were rounded in fp32 sum to one again."
    if t.dtype == torch.int64: return t
    t = t.to(F64)
    return t/t.sum(1, keepdim=True) if isinstance(t, torch.Tensor) else t


def truth(loss, x, t):
    "By the plain formulas in float64, from the same numbers."
    with set_backend('reference'): return o.value_and_gradients(lambda x: loss(x, double(t)), x.double())


@pytest.mark.parametrize('kind', LARGE)
@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('n, k', SIZES)
def test_fast_and_plain_agree(n, k, name, kind):
    x, t = o.normal(n, k), double(large(kind, n, k))
    loss, wanted = LOSSES[name], truth(LOSSES[name], o.normal(n, k), t)
    for a, b in zip(o.value_and_gradients(lambda x: loss(x, t), x), wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('kind', NO_BACKGROUND)
@pytest.mark.parametrize('name', ['cross-entropy', 'in batch', 'given', 'fresh'])
@pytest.mark.parametrize('n, k', SIZES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_a_masked_class_is_as_if_it_were_not(n, k, name, kind, backend):
    "A score of -inf against one that is so low that its exponential is 0."
    x, t, loss = o.normal(n, k), double(large(kind, n, k)), LOSSES[name]
    masked, low = (x.masked_fill(torch.arange(k) == 0, value) for value in (-INF, -3000.))
    with set_backend(backend): rows, gradient = o.value_and_gradients(lambda x: loss(x, t), masked)
    wanted, slope = truth(loss, low, t)
    torch.testing.assert_close(rows, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-12)
    assert (gradient[:, 0] == 0).all()


@pytest.mark.parametrize('backend', [None, *BACKENDS])
@pytest.mark.parametrize('kind', LARGE)
@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('n, k', SIZES)
def test_a_shift_costs_no_more_digits_than_in_cross_entropy(n, k, name, kind, backend):
    "fp32 logits near 1e4: the error against float64 on the same numbers, beside that of `F.cross_entropy`."
    x, t = (o.normal(n, k) + 1e4).float(), large(kind, n, k)
    with set_backend(backend): rows, gradient = o.value_and_gradients(lambda x: LOSSES[name](x, t), x)
    wanted, slope = truth(LOSSES[name], x, t)
    y = large('ids', n, k)
    plain, exact = F.cross_entropy(x, y, reduction='none'), F.cross_entropy(x.double(), y, reduction='none')
    assert (rows - wanted).abs().max() <= 6*max((plain - exact).abs().max(), 2**-21)  # 2**-21: of a number above 4
    assert (gradient - slope).abs().max() <= 4e-6


@pytest.mark.parametrize('backend', [None, *BACKENDS])
@pytest.mark.parametrize('kind', ['hard', 'smoothed', 'dense', 'each lam'])
@pytest.mark.parametrize('scale', [20., 30.])
def test_sure_rows_keep_their_relative_accuracy(kind, scale, backend):
    "Every row of N=256, K=300 is sure of its own target; scores of 30 are rounded to 2e-6 of a loss."
    n, k = 256, 300
    y = SparseTargets.from_labels(torch.randperm(k, generator=o.generator())[:n], k)
    lam = .7 + .3*torch.rand(n, generator=o.generator(1))
    t = {'hard': y, 'smoothed': smooth(y, .05), 'dense': smooth(y, .05).dense(),
         'each lam': smooth(mix(y, lam), .05)}[kind]
    x = scale*(t if isinstance(t, torch.Tensor) else t.dense()) + .1*o.normal(n, k).float()
    def mean(x, t): return soft_target_info_nce(x, t)[None]
    wanted, slope = truth(mean, x, t)
    with set_backend(backend): value, gradient = o.value_and_gradients(lambda x: mean(x, t), x)
    assert 0 < wanted < 1e-2
    torch.testing.assert_close(value.double(), wanted, rtol=4e-6, atol=0)
    assert (gradient.double() - slope).norm() <= 4e-6*slope.norm()


@pytest.mark.parametrize('kind', LARGE)
@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('n', [0, 1])
def test_no_rows_and_one(n, name, kind):
    x, t = o.normal(n, 7).requires_grad_(), double(large(kind, 2, 7))[:n]
    for backend in (None, *BACKENDS):
        with set_backend(backend): rows = LOSSES[name](x, t)
        assert rows.shape == (n,) and rows.dtype == F64
        gradient, = torch.autograd.grad(rows.sum(), x)
        assert gradient.shape == (n, 7) and gradient.isfinite().all()
        assert name != 'in batch' or (rows.abs() < 1e-12).all()  # a row against itself alone


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', LARGE)
@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('scale', [.1, 1., 100.])
def test_low_precision_is_that_of_the_logits(dtype, kind, name, scale):
    x, t = (scale*o.normal(40, 30)).to(dtype), large(kind, 40, 30)
    rows, gradient = o.value_and_gradients(lambda x: LOSSES[name](x, t), x)
    wanted, slope = truth(LOSSES[name], x, t)
    assert rows.dtype == torch.float32 and gradient.dtype == dtype
    size, eps = max(1., scale), torch.finfo(dtype).eps
    torch.testing.assert_close(rows.double(), wanted, rtol=2e-6, atol=2e-6*size)
    torch.testing.assert_close(gradient.double(), slope, rtol=eps, atol=2*eps**2 + 4e-6*size)


# ---------------------------------------------------------------- scores, posteriors, and calls without a loss
def test_contrast_of_candidates_that_were_gathered_by_hand():
    t = targets('one lam')
    eta, log_eta = noise_of(ETA, K, X)
    rows = contrast(Logits(X, 2., log_eta), gather_candidates(t, None, eta))
    torch.testing.assert_close(rows, soft_target_info_nce(X, t, noise_probs=ETA, temperature=.5, reduction='none'))
    z, W = o.normal(N, 3), o.normal(K, 3)
    rows = contrast(LinearScores(z, W), AllClasses(parts_of(t)))
    torch.testing.assert_close(rows, soft_target_cross_entropy(z @ W.T, t, reduction='none'))
    labels = gather_noise_labels(t, None, eta, o.generator())
    torch.testing.assert_close(contrast(Logits(X), labels), contrast(LinearScores(X, torch.eye(K, dtype=F64)), labels))


def test_scores_written_out():
    for tau in (2., torch.tensor(2., dtype=F64)):
        torch.testing.assert_close(written_out(logit_scores(X, tau, ETA.log())), X/2 - ETA.log())
    assert written_out(logit_scores(X.bfloat16(), 1.)).dtype == torch.float32


@pytest.mark.parametrize('kind', KINDS)
def test_candidate_scores_and_posterior(kind):
    t = targets(kind)
    rows = as_rows(t)
    u = torch.stack([torch.stack([o.energy(a, s) for a in rows]) for s in X])
    torch.testing.assert_close(candidate_scores(X, check_targets(t, None, K, X)), u, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(position_posterior(X, t), u.softmax(1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('call, message', [
    (lambda: contrast(Logits(X), None), 'NoneType'),
    (lambda: position_posterior(X[0], targets('ids')), r'scores must have shape \(N, K\), got \(5,\)'),
    (lambda: position_posterior(X, torch.ones(2, 3, dtype=F64)/3), 'candidates must have 5 classes .*, got 3'),
    (lambda: logit_scores(X, torch.ones(2)), r'temperature must be one floating-point number, got .* shape \(2,\)'),
    (lambda: logit_scores(X, -1.), 'temperature must be positive and finite, got -1.0'),
    (lambda: logit_scores(X, INF), 'temperature must be positive and finite, got inf'),
    (lambda: logit_scores(X.long(), 1.), 'logits must be floating point, got dtype torch.int64'),
    (lambda: logit_scores(X.to_sparse(), 1.), 'logits must be a dense tensor, got layout'),
    (lambda: logit_scores(X[:, :0], 1.), r'logits must have shape \(N, K\), got \(6, 0\)'),
])
def test_errors(call, message):
    with pytest.raises((ValueError, KeyError), match=message): call()


def test_labels_only():
    y = targets('ids')
    torch.testing.assert_close(nll(X, y), soft_target_cross_entropy(X, y))
    torch.testing.assert_close(info_nce(X, y), soft_target_info_nce(X, y))
