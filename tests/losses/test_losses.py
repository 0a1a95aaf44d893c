"""softnce.losses against the literal oracles: value and gradient, shapes, precisions, reductions, noise sources,
posteriors, optima, modules."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import oracles as o
from softnce.losses import (NLL, InfoNCE, SoftDistributionInfoNCE, SoftTargetCrossEntropy, SoftTargetInfoNCE, info_nce,
                            linear_soft_target_info_nce, nll, soft_distribution_info_nce, soft_target_cross_entropy,
                            soft_target_info_nce)
from softnce.noise import ClosedForm, Fresh, Queue
from softnce.targets import SparseTargets, one_hot, smooth

SHAPES = [(1, 2), (1, 5), (5, 2), (4, 4), (7, 3), (3, 11)]
LAM, EPS = .3, .1


# ---------------------------------------------------------------- one problem, every loss
def problem(n, k, seed=0, scale=1.):
    return dict(x=o.logits(n, k, seed, scale), t=o.simplex(n, k, seed), y=o.ids(n, k, seed), eta=o.noise(k, seed))


SIMPLE = {   # name -> (the package's loss, its oracle), both: (logits, problem, options) -> one value a row
    'nll': (lambda l, p, tau, **kw: nll(l, p['y'], temperature=tau, **kw),
            lambda l, p, tau: o.nll(l, p['y'], tau)),
    'soft_target_cross_entropy': (lambda l, p, tau, **kw: soft_target_cross_entropy(l, p['t'], temperature=tau, **kw),
                                  lambda l, p, tau: o.soft_target_cross_entropy(l, p['t'], tau)),
    'info_nce': (lambda l, p, tau, **kw: info_nce(l, p['y'], noise_probs=p['eta'], temperature=tau, **kw),
                 lambda l, p, tau: o.info_nce(l, p['y'], p['eta'], tau)),
    'soft_distribution_info_nce':      # one-hot targets leave nothing to chance
        (lambda l, p, tau, **kw: soft_distribution_info_nce(l, one_hot(p['y'], l.shape[1]).double(),
                                                            noise_probs=p['eta'], temperature=tau, **kw),
         lambda l, p, tau: o.info_nce(l, p['y'], p['eta'], tau)),
    'soft_target_info_nce': (lambda l, p, tau, **kw: soft_target_info_nce(l, p['t'], noise_probs=p['eta'],
                                                                          temperature=tau, **kw),
                             lambda l, p, tau: o.soft_target_info_nce(l, p['t'], p['eta'], tau)),
}


@pytest.mark.parametrize('name', SIMPLE)
@pytest.mark.parametrize('n, k', SHAPES)
def test_value_and_gradient(name, n, k):
    loss, oracle = SIMPLE[name]
    for seed, (scale, tau) in enumerate([(.1, 1.), (1., .7), (1., 3.)]):
        p = problem(n, k, seed, scale)
        o.same_value_and_grad(lambda l: loss(l, p, tau, reduction='none'), lambda l: oracle(l, p, tau), p['x'])


@pytest.mark.parametrize('name', SIMPLE)
@pytest.mark.parametrize('scale, tau', [(100., 1.), (1., 1e-3), (1e4, 1.)])
def test_extreme_logits(name, scale, tau):
    "Finite, and the truth up to the rounding of scores of that size; the gradient's scale is 1/tau."
    loss, oracle = SIMPLE[name]
    p = problem(6, 5, 0, scale)
    (v1, (g1,)), (v2, (g2,)) = (o.value_and_grad(f, p['x']) for f in
                                (lambda l: loss(l, p, tau, reduction='none'), lambda l: oracle(l, p, tau)))
    assert v1.isfinite().all() and g1.isfinite().all()
    size = scale/tau
    torch.testing.assert_close(v1, v2, rtol=1e-12, atol=4e-15*size)
    torch.testing.assert_close(g1, g2, rtol=1e-12, atol=1e-14*size/tau)


@pytest.mark.parametrize('scale, tau', [(1e4, 1.), (1., 1e-3), (100., 1.)])
def test_extreme_logits_against_exact_arithmetic(scale, tau):
    p = problem(4, 3, 1, scale)
    got = soft_target_info_nce(p['x'], p['t'], noise_probs=p['eta'], temperature=tau, reduction='none').detach()
    wanted = o.mp_soft_target_info_nce(p['x'].detach(), p['t'], p['eta'], tau)
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=4e-15*scale/tau)


@pytest.mark.parametrize('name', ['nll', 'soft_target_cross_entropy', 'info_nce', 'soft_target_info_nce'])
def test_single_precision_at_logits_of_ten_thousand(name):
    loss, _ = SIMPLE[name]
    p = problem(6, 5, 0, 1e4)
    low = {a: b.detach().float() if b.is_floating_point() else b for a, b in p.items()}
    wide = {a: b.double() if b.is_floating_point() else b for a, b in low.items()}
    value, (grad,) = o.value_and_grad(lambda l: loss(l, low, 1., reduction='none'), low['x'])
    truth, (slope,) = o.value_and_grad(lambda l: loss(l, wide, 1., reduction='none'), wide['x'])
    assert value.dtype == grad.dtype == torch.float32 and grad.isfinite().all()
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e4*1e-6)
    assert (grad.double() - slope).abs().max() < .05  # scores rounded to 1e-3: probabilities good to a few per cent


@pytest.mark.parametrize('name', SIMPLE)
def test_reductions(name):
    loss, oracle = SIMPLE[name]
    p = problem(5, 4)
    rows = oracle(p['x'], p, .7).detach()
    assert loss(p['x'], p, .7, reduction='none').shape == (5,)
    for reduction in ('mean', 'sum'):
        o.same_value_and_grad(lambda l: loss(l, p, .7, reduction=reduction),
                              lambda l: o.reduced(list(oracle(l, p, .7)), reduction), p['x'])
    o.same(loss(p['x'], p, .7).detach(), rows.mean())


@pytest.mark.parametrize('name', SIMPLE)
def test_gradcheck(name):
    loss, _ = SIMPLE[name]
    p = problem(4, 3)
    assert torch.autograd.gradcheck(lambda l: loss(l, p, .7, reduction='none'), (p['x'],))


@pytest.mark.parametrize('name', SIMPLE)
def test_many_classes(name):
    loss, oracle = SIMPLE[name]
    p = problem(3, 21841)
    o.same_value_and_grad(lambda l: loss(l, p, .7, reduction='none'), lambda l: oracle(l, p, .7), p['x'])


@pytest.mark.parametrize('name', ['info_nce', 'soft_target_info_nce'])
def test_no_noise_probs_is_uniform(name):
    p = problem(5, 4)
    without, with_ = ({**p, 'eta': eta} for eta in (None, torch.full((4,), .25, dtype=torch.float64)))
    loss, oracle = SIMPLE[name]
    o.same_value_and_grad(lambda l: loss(l, without, .7, reduction='none'), lambda l: oracle(l, with_, .7), p['x'])
    assert (loss(p['x'], p, .7) - loss(p['x'], without, .7)).abs() > 1e-3


def test_class_ids_are_one_hot_targets():
    p = problem(5, 4)
    hard = o.dense(p['y'], 4)
    for f in (lambda t: lambda l: soft_target_info_nce(l, t, noise_probs=p['eta'], reduction='none'),
              lambda t: lambda l: soft_target_cross_entropy(l, t, reduction='none'),
              lambda t: lambda l: soft_distribution_info_nce(l, t, noise_probs=p['eta'], reduction='none'),
              lambda t: lambda l: linear_soft_target_info_nce(l, torch.eye(4, dtype=torch.float64), t,
                                                              noise_probs=p['eta'], reduction='none')):
        o.same_value_and_grad(f(p['y']), f(hard), p['x'])
    o.same_value_and_grad(lambda l: soft_target_cross_entropy(l, p['y']), lambda l: F.cross_entropy(l, p['y']), p['x'])
    o.same_value_and_grad(lambda l: soft_target_info_nce(l, p['y'], noise_probs=p['eta'], reduction='none'),
                          lambda l: o.info_nce(l, p['y'], p['eta']), p['x'])


def test_a_single_row_against_itself_is_zero():
    p = problem(1, 4)
    for name in ('info_nce', 'soft_target_info_nce', 'soft_distribution_info_nce'):
        value, (grad,) = o.value_and_grad(lambda l: SIMPLE[name][0](l, p, 1.), p['x'])
        assert abs(value) < 1e-14 and grad.abs().max() < 1e-14


def test_energy_form():
    "Eq. (12): -sum_k alpha_k log(e^{s_k} / sum_l e^{alpha_l . s}) is Eq. (11), because the targets sum to one."
    p = problem(4, 3)

    def energy_form(l):
        out = []
        for alpha, s in zip(p['t'], o.scores(l, p['eta'], .7)):
            partition = sum(torch.exp(o.energy(a, s)) for a in p['t'])
            out.append(-sum(alpha[k]*torch.log(torch.exp(s[k])/partition) for k in range(3)))
        return torch.stack(out)

    o.same_value_and_grad(lambda l: SIMPLE['soft_target_info_nce'][0](l, p, .7, reduction='none'), energy_form, p['x'])


# ---------------------------------------------------------------- noise sources
def source_case(kind, p, k):
    "(a function that makes the noise source in the same state each time, the oracle's loss)."
    kw = dict(noise_probs=p['eta'], temperature=.7)
    few, more = o.simplex(1, k, 11), o.simplex(9, k, 12)
    if kind == 'none': return lambda: None, lambda l: o.soft_target_info_nce(l, p['t'], **kw)
    if kind == 'one': return lambda: few, lambda l: o.soft_target_info_nce(l, p['t'], extra=few, **kw)
    if kind == 'extra': return lambda: more, lambda l: o.soft_target_info_nce(l, p['t'], extra=more, **kw)
    if kind == 'sparse':
        i, w = torch.randint(k, (3, 2), generator=o.generator(13)), o.simplex(3, 2, 13)
        e = torch.tensor([.1, 0., .4], dtype=torch.float64)
        return (lambda: SparseTargets(i, w, epsilon=e, num_classes=k),
                lambda l: o.soft_target_info_nce(l, p['t'], extra=o.dense_sparse(i, w, e, k), **kw))
    if kind == 'ids':
        y = o.ids(3, k, 14)
        return lambda: y, lambda l: o.soft_target_info_nce(l, p['t'], extra=y, **kw)
    if kind == 'queue':
        def queue():
            q = Queue(5)
            for rows in (more[:3], more[3:7]):
                soft_target_info_nce(o.logits(len(rows), k, 15).detach(), rows, noise_samples=q, **kw)
            return q
        return queue, lambda l: o.soft_target_info_nce(l, p['t'], extra=more[2:7], **kw)
    if kind == 'closed':
        return lambda: ClosedForm(LAM, EPS), lambda l: o.closed_form(l, p['t'], lam=LAM, epsilon=EPS, **kw)
    if kind == 'closed_hard': return lambda: ClosedForm(), lambda l: o.closed_form(l, p['t'], **kw)
    if kind == 'fresh': return lambda: Fresh(2, LAM, EPS, generator=o.generator(3)), the_drawn_one(p, k, 2, **kw)
    raise KeyError(kind)


def the_drawn_one(p, k, size, **kw):
    """The oracle for the one set of noise targets, of all that Fresh can draw, that explains the losses of every row;
    the others do not."""
    drawable = [t for *_, t in o.noise_targets(k, LAM, EPS)]
    got = soft_target_info_nce(p['x'].detach(), p['t'], noise_samples=Fresh(size, LAM, EPS, generator=o.generator(3)),
                               reduction='none', **kw)
    matches = [drawn for drawn in itertools.combinations_with_replacement(drawable, size)
               if (o.soft_target_info_nce(p['x'].detach(), p['t'], fresh=drawn, **kw) - got).abs().max() < 1e-11]
    assert len(matches) == 1
    return lambda l: o.soft_target_info_nce(l, p['t'], fresh=matches[0], **kw)


SOURCES = ['none', 'one', 'extra', 'sparse', 'ids', 'queue', 'closed', 'closed_hard', 'fresh']


@pytest.mark.parametrize('kind', SOURCES)
@pytest.mark.parametrize('n, k', [(1, 3), (5, 3), (3, 2)])
@pytest.mark.parametrize('chunk_size', [None, 2])
def test_soft_target_info_nce_with_every_source(kind, n, k, chunk_size):
    p = problem(n, k, 3)
    make, oracle = source_case(kind, p, k)
    kw = dict(noise_probs=p['eta'], temperature=.7, reduction='none', chunk_size=chunk_size)
    loss = lambda l: soft_target_info_nce(l, p['t'], noise_samples=make(), **kw)
    o.same_value_and_grad(loss, oracle, p['x'])


@pytest.mark.parametrize('kind', SOURCES)
@pytest.mark.parametrize('n, k', [(1, 3), (5, 3)])
@pytest.mark.parametrize('with_bias', [False, True])
def test_linear_with_every_source(kind, n, k, with_bias):
    "Through logits made by loops; gradients of embeddings, weight and bias."
    d, inputs = 4, [o.logits(n, 4, 20), o.logits(k, 4, 21)] + [o.logits(1, k, 22)[0]]*with_bias
    p = problem(n, k, 3)
    p['x'] = o.linear_logits(*inputs)
    make, oracle = source_case(kind, p, k)

    def loss(z, w, b=None):
        return linear_soft_target_info_nce(z, w, p['t'], bias=b, noise_probs=p['eta'], temperature=.7,
                                           noise_samples=make(), reduction='none')

    o.same_value_and_grad(loss, lambda *a: oracle(o.linear_logits(*a)), *inputs)
    assert inputs[1].shape == (k, d)


@pytest.mark.parametrize('kind', SOURCES)
def test_gradcheck_with_every_source(kind):
    n, k = 4, 3
    p, z, w = problem(n, k, 3), o.logits(n, 2, 20), o.logits(k, 2, 21)
    b = o.logits(1, k, 22).detach()[0].requires_grad_()
    make, _ = source_case(kind, {**p, 'x': p['x']}, k)
    kw = dict(noise_probs=p['eta'], temperature=.7, reduction='none')
    for chunk_size in (None, 3):
        assert torch.autograd.gradcheck(
            lambda l: soft_target_info_nce(l, p['t'], noise_samples=make(), chunk_size=chunk_size, **kw), (p['x'],))
    assert torch.autograd.gradcheck(
        lambda z, w, b: linear_soft_target_info_nce(z, w, p['t'], bias=b, noise_samples=make(), **kw), (z, w, b))


@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_linear_reductions_and_many_classes(reduction):
    n, k = 3, 21841
    p, z, w = problem(n, k), o.logits(n, 4, 20), o.logits(k, 4, 21)
    o.same_value_and_grad(
        lambda z, w: linear_soft_target_info_nce(z, w, p['t'], noise_probs=p['eta'], reduction=reduction),
        lambda z, w: o.reduced(o.soft_target_info_nce((z[:, None, :]*w).sum(-1), p['t'], p['eta']), reduction)
        if reduction != 'none' else o.soft_target_info_nce((z[:, None, :]*w).sum(-1), p['t'], p['eta']), z, w)


def info_nce_sources(p, k, seed=3):
    past, kw = o.ids(6, k, 31), dict(noise_probs=p['eta'], temperature=.7)

    def queue():
        q = Queue(4)
        for part in (past[:2], past[2:]): info_nce(o.logits(len(part), k).detach(), part, noise_samples=q, **kw)
        return q

    drawn = lambda: Fresh(3, generator=o.generator(seed))
    got = info_nce(p['x'].detach(), p['y'], noise_samples=drawn(), reduction='none', **kw)
    fits = [c for c in itertools.combinations_with_replacement(range(k), 3)
            if (o.info_nce(p['x'].detach(), p['y'], fresh=c, **kw) - got).abs().max() < 1e-11]
    assert len(fits) == 1
    hard = o.dense(p['y'], k)
    return {'none': (lambda: None, lambda l: o.info_nce(l, p['y'], **kw)),
            'ids': (lambda: past, lambda l: o.info_nce(l, p['y'], extra=past, **kw)),
            'one': (lambda: past[:1], lambda l: o.info_nce(l, p['y'], extra=past[:1], **kw)),
            'queue': (queue, lambda l: o.info_nce(l, p['y'], extra=past[2:], **kw)),
            'fresh': (drawn, lambda l: o.info_nce(l, p['y'], fresh=fits[0], **kw)),
            'closed': (lambda: ClosedForm(), lambda l: o.closed_form(l, hard, **kw))}


@pytest.mark.parametrize('kind', ['none', 'ids', 'one', 'queue', 'fresh', 'closed'])
@pytest.mark.parametrize('n, k', [(1, 3), (5, 3), (6, 4), (4, 7)])
def test_info_nce_with_every_source(kind, n, k):
    p = problem(n, k, 3)
    make, oracle = info_nce_sources(p, k)[kind]
    loss = lambda l: info_nce(l, p['y'], noise_probs=p['eta'], temperature=.7, noise_samples=make(), reduction='none')
    o.same_value_and_grad(loss, oracle, p['x'])
    assert torch.autograd.gradcheck(loss, (p['x'],))


def test_info_nce_is_the_class_count_form():
    "-s_y + log sum_k c_k e^{s_k} with the batch's label counts (brief), and Eq. (5) over the batch: the same."
    p = problem(7, 4)
    counts = torch.bincount(p['y'], minlength=4).double()

    def by_counts(l):
        s = l/.7 - p['eta'].log()
        return torch.logsumexp(s + counts.log(), -1) - s[torch.arange(7), p['y']]

    o.same_value_and_grad(lambda l: SIMPLE['info_nce'][0](l, p, .7, reduction='none'), by_counts, p['x'])


# ---------------------------------------------------------------- soft distribution InfoNCE: labels really drawn
def test_soft_distribution_is_info_nce_of_a_drawn_labelling():
    """Of all K^N labellings exactly one explains every row's loss; its gradient is the gradient; a seeded generator
    repeats it."""
    n, k = 4, 3
    p, seen = {**problem(n, k), 't': o.simplex(n, k, peak=.3)}, set()
    for seed in range(12):
        loss = lambda l: soft_distribution_info_nce(l, p['t'], noise_probs=p['eta'], temperature=.7,
                                                    generator=o.generator(seed), reduction='none')
        got = loss(p['x'].detach())
        assert torch.equal(got, loss(p['x'].detach()))
        fits = [y for y in itertools.product(range(k), repeat=n)
                if (o.info_nce(p['x'].detach(), y, p['eta'], .7) - got).abs().max() < 1e-11]
        assert len(fits) == 1
        o.same_value_and_grad(loss, lambda l: o.info_nce(l, fits[0], p['eta'], .7), p['x'])
        seen.add(fits[0])
    assert len(seen) > 6


@pytest.mark.parametrize('kind', ['dense', 'sparse', 'smoothed_ids'])
def test_soft_distribution_labels_follow_the_targets(kind):
    "All rows share their logits, so the loss of a row names its label; each row's label is drawn from its own target."
    n, k, eta = 20000, 3, torch.tensor([.2, .5, .3], dtype=torch.float64)
    base = torch.tensor([[.7, .2, .1], [.1, .3, .6]], dtype=torch.float64)
    t = base.repeat(n//2, 1)
    if kind == 'sparse': t = SparseTargets(torch.arange(k).expand(n, k), t, num_classes=k)
    if kind == 'smoothed_ids':
        t = smooth(SparseTargets(torch.tensor([[0], [2]]).repeat(n//2, 1), torch.ones(n, 1, dtype=torch.float64),
                                 num_classes=k), .3)
        base = torch.tensor([[.8, .1, .1], [.1, .1, .8]], dtype=torch.float64)
    row = torch.tensor([.5, -1., 2.], dtype=torch.float64)
    loss = soft_distribution_info_nce(row.expand(n, k), t, noise_probs=eta, generator=o.generator(0), reduction='none')
    s = row - eta.log()
    const = loss.min() + s.max()  # the batch's log partition; the best class has the smallest loss
    label = (loss[:, None] - (const - s)).abs().argmin(-1)
    for g in (0, 1):
        seen = torch.bincount(label[g::2], minlength=k).double()
        assert float(((seen - n/2*base[g])**2/(n/2*base[g])).sum()) < 20
    total = torch.bincount(label, minlength=k).double()
    o.same(loss, torch.log((total*s.exp()).sum()) - s[label], 1e-10)  # and the batch's drawn labels are the candidates


def test_soft_distribution_draws_the_extra_targets_too():
    "Every y_k of Eq. (30) is a label: soft extra targets (another device's, say) are drawn from, not used as they are."
    n, k = 3, 3
    p, more, seen = problem(n, k), o.simplex(2, k, 9, peak=.3), set()
    hard = one_hot(p['y'], k).double()
    for seed in range(8):
        got = soft_distribution_info_nce(p['x'].detach(), hard, noise_probs=p['eta'], noise_samples=more,
                                         generator=o.generator(seed), reduction='none')
        fits = [e for e in itertools.combinations_with_replacement(range(k), 2)
                if (o.info_nce(p['x'].detach(), p['y'], p['eta'], extra=e) - got).abs().max() < 1e-11]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 1


def test_soft_distribution_draws_without_a_generator_from_the_global_state():
    p = problem(30, 5)
    run = lambda: soft_distribution_info_nce(p['x'].detach(), p['t'])
    torch.manual_seed(1)
    a = run()
    torch.manual_seed(1)
    assert torch.equal(a, run()) and not torch.equal(a, run())


# ---------------------------------------------------------------- chunks
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_chunks(reduction):
    n = 11
    p, more = problem(n, 5), o.simplex(4, 5, 9)
    kw = dict(noise_probs=p['eta'], temperature=.7, noise_samples=more, reduction=reduction)
    run = lambda chunk, l: soft_target_info_nce(l, p['t'], chunk_size=chunk, **kw)
    whole, (slope,) = o.value_and_grad(lambda l: run(None, l), p['x'])
    for chunk in (1, 2, 3, 10, 11, 12, 1000):
        value, (grad,) = o.value_and_grad(lambda l: run(chunk, l), p['x'])
        o.same(value, whole)
        o.same(grad, slope)
        if chunk >= n: assert torch.equal(value, whole) and torch.equal(grad, slope)


def test_chunks_change_neither_the_draws_nor_the_queue():
    p = problem(7, 4)
    kw = dict(noise_probs=p['eta'], reduction='none')
    run = lambda chunk, source: soft_target_info_nce(p['x'].detach(), p['t'], noise_samples=source, chunk_size=chunk,
                                                     **kw)
    for make in (lambda: Fresh(3, LAM, EPS, generator=o.generator(0)), lambda: Queue(5)):
        a, b = make(), make()
        for _ in range(3): o.same(run(2, a), run(None, b))


# ---------------------------------------------------------------- low precision
def plain(logits, targets, eta, tau=1., extra=None):
    "The arithmetic of the paper's Figure 2 in the dtype it is given, with a matrix product for its N x N x K tensor."
    s = logits/tau - eta.log()
    u = s @ (targets if extra is None else torch.cat([targets, extra])).T
    return F.cross_entropy(u, torch.arange(len(u)), reduction='none')


def plain_cross_entropy(logits, targets, tau=1.): return -(targets*torch.log_softmax(logits/tau, -1)).sum(-1)


def rounded(p, dtype): return {a: b.detach().to(dtype) if b.is_floating_point() else b for a, b in p.items()}


def exact(p):
    "In float64, with rows of the simplex that sum to one again after rounding: what a loss reads rounded targets as."
    wide = rounded(p, torch.float64)
    return {a: b/b.sum(-1, keepdim=True) if a in ('t', 'eta', 'more') else b for a, b in wide.items()}


PRECISE = {   # name -> (loss, plain version in the inputs' own dtype)
    'soft_target_info_nce': (lambda l, p, tau: soft_target_info_nce(l, p['t'], noise_probs=p['eta'], temperature=tau,
                                                                    reduction='none'),
                             lambda l, p, tau: plain(l, p['t'], p['eta'], tau)),
    'chunked': (lambda l, p, tau: soft_target_info_nce(l, p['t'], noise_probs=p['eta'], temperature=tau,
                                                       reduction='none', chunk_size=7),
                lambda l, p, tau: plain(l, p['t'], p['eta'], tau)),
    'extra': (lambda l, p, tau: soft_target_info_nce(l, p['t'], noise_probs=p['eta'], temperature=tau,
                                                     reduction='none', noise_samples=p['more']),
              lambda l, p, tau: plain(l, p['t'], p['eta'], tau, p['more'])),
    'info_nce': (lambda l, p, tau: info_nce(l, p['y'], noise_probs=p['eta'], temperature=tau, reduction='none'),
                 lambda l, p, tau: plain(l, F.one_hot(p['y'], l.shape[1]).to(l.dtype), p['eta'], tau)),
    'closed': (lambda l, p, tau: soft_target_info_nce(l, p['t'], noise_probs=p['eta'], temperature=tau,
                                                      reduction='none', noise_samples=ClosedForm()),
               lambda l, p, tau: plain_cross_entropy(l, p['t'], tau) + (p['t']*p['eta'].log()).sum(-1)),
    'linear': (lambda l, p, tau: linear_soft_target_info_nce(l, p['w'], p['t'], noise_probs=p['eta'], temperature=tau,
                                                             reduction='none'),
               lambda l, p, tau: plain(l @ p['w'].T, p['t'], p['eta'], tau)),
    'soft_target_cross_entropy': (lambda l, p, tau: soft_target_cross_entropy(l, p['t'], temperature=tau,
                                                                              reduction='none'),
                                  lambda l, p, tau: plain_cross_entropy(l, p['t'], tau)),
    'nll': (lambda l, p, tau: nll(l, p['y'], temperature=tau, reduction='none'),
            lambda l, p, tau: plain_cross_entropy(l, F.one_hot(p['y'], l.shape[1]).to(l.dtype), tau)),
}


def precise_problem(seed=0, scale=1.):
    "With extra noise targets, and an orthogonal weight for the linear head: its logits have the scale of the others."
    return {**problem(40, 30, seed, scale), 'more': o.simplex(6, 30, 77),
            'w': torch.linalg.qr(o.logits(30, 30, 5).detach())[0]}


def test_plain_is_the_oracle():
    p = problem(5, 4)
    o.same(plain(p['x'], p['t'], p['eta'], .7), o.soft_target_info_nce(p['x'], p['t'], p['eta'], .7))
    o.same(plain_cross_entropy(p['x'], p['t'], .7), o.soft_target_cross_entropy(p['x'], p['t'], .7))
    o.same(PRECISE['closed'][1](p['x'], p, .7), o.closed_form(p['x'], p['t'], p['eta'], .7))


@pytest.mark.parametrize('name', PRECISE)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('autocast', [False, True])
def test_low_precision_is_no_worse_than_plain(name, dtype, autocast):
    """Against float64 on the same rounded inputs, worst of several problems: our error is at most the plain version's
    in that dtype plus a few roundings: of the scores for the value; of probabilities for the gradient (in units of
    1/tau)."""
    loss, simple = PRECISE[name]
    for scale, shift, tau in [(.1, 0, 1.), (1., 0, 1.), (100., 0, 1.), (1., 0, .05), (1e4, 0, 1.), (1., 1e4, 1.),
                              (1., 0, 1e-3)]:
        if dtype != torch.float32 and max(scale, shift, 1/tau) > 100: continue  # beyond what plain half survives
        worst = torch.zeros(4, dtype=torch.float64)
        for seed in range(6):
            p = precise_problem(seed, scale)
            p = rounded({**p, 'x': p['x'].detach() + shift}, dtype)
            wide = exact(p)
            truth, (slope,) = o.value_and_grad(lambda l: simple(l, wide, tau), wide['x'])
            value, (grad,) = o.value_and_grad(lambda l: loss(l, p, tau), p['x'], autocast=autocast)
            rough, (steep,) = o.value_and_grad(lambda l: simple(l, p, tau), p['x'])
            assert value.dtype == torch.float32 and grad.dtype == dtype
            errors = [value - truth, rough - truth, tau*(grad - slope), tau*(steep - slope)]
            worst = torch.maximum(worst, torch.stack([e.abs().max() for e in errors]))
        off, plain_off, grad_off, grad_plain_off = worst.tolist()
        assert off <= plain_off + 2e-6 + 5e-7*scale/tau, (scale, shift, tau, off, plain_off)  # no term in the shift
        added = 1e-8*(scale + shift)/tau if name == 'info_nce' else 0.  # log counts - log eta, added to large scores
        twice = 1.25 if dtype == torch.float32 else 1.5  # a 16-bit gradient is rounded when stored, and when weighted
        assert grad_off <= twice*grad_plain_off + 6e-6 + added, (scale, shift, tau, grad_off, grad_plain_off)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_are_computed_in_single_precision(dtype):
    "Not merely no worse: the error is that of float32, and temperature 1e-3 does not overflow a half."
    p = rounded(problem(40, 30), dtype)
    for tau in (1., 1e-3):
        value = soft_target_info_nce(p['x'], p['t'], noise_probs=p['eta'], temperature=tau, reduction='none')
        truth = plain(*(exact(p)[a] for a in ('x', 't', 'eta')), tau)
        assert value.isfinite().all() and (value.double() - truth).abs().max() < 3e-6*(1 + 1/tau)
        assert (plain(p['x'], p['t'], p['eta']).double()
                - plain(*(p[a].double() for a in ('x', 't', 'eta')))).abs().max() > 1e-3


@pytest.mark.parametrize('name', PRECISE)
def test_autocast_changes_nothing(name):
    "Single-precision inputs under autocast: the same value and gradient as outside, not bfloat16 products."
    p = rounded(precise_problem(), torch.float32)
    loss = lambda l: PRECISE[name][0](l, p, .7)
    value, (grad,) = o.value_and_grad(loss, p['x'])
    inside, (slope,) = o.value_and_grad(loss, p['x'], autocast=True)
    assert value.dtype == inside.dtype == torch.float32
    torch.testing.assert_close(inside, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', PRECISE)
def test_backward_inside_autocast_is_no_worse_than_plain(name):
    "torch advises against it and rounds the products of the backward pass; the plain version, inside too, is the bar."
    loss, simple = PRECISE[name]
    p = rounded(precise_problem(), torch.float32)
    wide = rounded(p, torch.float64)
    _, (slope,) = o.value_and_grad(lambda l: simple(l, wide, .7), wide['x'])
    off, plain_off = (float((o.value_and_grad(lambda l: f(l, p, .7), p['x'], autocast=True,
                                              autocast_backward=True)[1][0] - slope).abs().max())
                      for f in (loss, simple))
    assert off <= 1.25*plain_off + 4e-6


@pytest.mark.parametrize('name', SIMPLE)
def test_result_dtype(name):
    loss, _ = SIMPLE[name]
    p = problem(4, 3)
    for dtype, wanted in ((torch.float64, torch.float64), (torch.float32, torch.float32),
                          (torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        q = rounded(p, dtype)
        value, (grad,) = o.value_and_grad(lambda l: loss(l, q, 1.), q['x'])
        assert value.dtype == wanted and grad.dtype == dtype
    mixed = {**rounded(p, torch.float32), 'x': p['x']}
    assert loss(p['x'], mixed, 1.).dtype == torch.float64


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_smoothed_targets_rounded_to_half_are_accepted(dtype):
    t = smooth(one_hot(o.ids(8, 1000), 1000), .1).to(dtype)
    assert soft_target_info_nce(o.logits(8, 1000).detach().to(dtype), t).isfinite()
    assert soft_target_cross_entropy(o.logits(8, 1000).detach().to(dtype), t).isfinite()


# ---------------------------------------------------------------- posteriors over positions, hard labels
def joint(seed=0, rows=3, k=3):
    "p(x) and p(y|x) on a small space, and the label marginal."
    px, pyx = o.noise(rows, seed), o.simplex(rows, k, 40 + seed, peak=1.)
    return px, pyx, px @ pyx


def test_position_posterior_of_labels():
    "Eq. (7)-(9) for labels, with one noise label and with three: every tuple, Bayes' rule against exp(-loss)."
    eta, p = o.noise(3, 1), o.simplex(1, 3, 41)[0]
    for m in (1, 3):
        for t in itertools.product(range(3), repeat=m + 1):
            like = [o.likelihood([float(p[y]) for y in t], [float(eta[y]) for y in t], j) for j in range(m + 1)]
            loss = info_nce(p.log()[None], torch.tensor(t[:1]), noise_probs=eta, noise_samples=torch.tensor(t[1:]))
            assert abs(math.exp(-float(loss)) - o.posterior_by_bayes(like)[0]) < 1e-12
    without = info_nce(p.log()[None], torch.tensor([0]), noise_samples=torch.tensor([1]))
    like = [o.likelihood([float(p[y]) for y in (0, 1)], [float(eta[y]) for y in (0, 1)], j) for j in range(2)]
    assert abs(math.exp(-float(without)) - o.posterior_by_bayes(like)[0]) > 1e-3  # no posterior without the correction


def test_position_posterior_of_soft_distributions():
    "Eq. (26)-(28), (30): the positive's law is p_eps; every tuple, Bayes' rule against exp(-loss)."
    eps, xi, eta, p = .3, o.noise(3, 2), o.noise(3, 1), o.simplex(1, 3, 41)[0]
    p_eps = smooth(p[None], eps, xi)[0]
    for t in itertools.product(range(3), repeat=3):
        pe, en = [float(p_eps[y]) for y in t], [float(eta[y]) for y in t]
        like = [o.likelihood(pe, en, j) for j in range(3)]
        assert abs(pe[0]/en[0]*math.prod(en) - like[0]) < 1e-15                                       # (26), 2nd form
        assert abs(math.prod(en)*sum(a/b for a, b in zip(pe, en))/3 - sum(like)/3) < 1e-15            # (27)
        loss = info_nce(p_eps.log()[None], torch.tensor(t[:1]), noise_probs=eta, noise_samples=torch.tensor(t[1:]))
        assert abs(math.exp(-float(loss)) - o.posterior_by_bayes(like)[0]) < 1e-12                    # (28), (30)


def test_where_soft_distribution_info_nce_ends():
    """Eq. (31): positives from p_eps, noise xi = eta: the scores end at log((1-eps) p/xi + eps), up to a constant; by
    Newton's method on the package's loss over every tuple, from scores of zero."""
    eps, xi, p = .3, [.5, .2, .3], [.6, .3, .1]
    limit = torch.tensor([1.14, 1.35, 1.6/3], dtype=torch.float64)  # (1-eps) p/xi + eps, by hand
    px, noise = torch.ones(1, dtype=torch.float64), torch.tensor(xi, dtype=torch.float64)
    def ends(law):
        s = torch.zeros(1, 3, dtype=torch.float64)
        run = lambda s: expected_info_nce(s[None], px, torch.tensor([law], dtype=torch.float64), noise, 2)
        for _ in range(7):
            hessian = torch.autograd.functional.hessian(run, s[0]) + torch.ones(3, 3)
            s = s - torch.linalg.solve(hessian, torch.func.grad(run)(s[0]))
        return s[0].softmax(0)
    smoothed = ends([(1 - eps)*a + eps*b for a, b in zip(p, xi)])
    o.same(smoothed, limit/limit.sum(), 1e-10)
    assert (ends(p) - smoothed).abs().max() > .04  # labels drawn from p end elsewhere


# ---------------------------------------------------------------- optima in expectation, by enumeration
def expected_info_nce(scores, px, law, eta, negatives):
    """E over x, y_0 ~ law(.|x) and y_1..y_N ~ eta of Eq. (5), all tuples; logits chosen so that the package's scores
    are `scores`."""
    total = 0.
    for x in range(len(px)):
        for t in itertools.product(range(len(eta)), repeat=negatives + 1):
            weight = px[x]*law[x, t[0]]*math.prod(float(eta[y]) for y in t[1:])
            total = total + weight*info_nce((scores[x] + eta.log())[None], torch.tensor(t[:1]), noise_probs=eta,
                                            noise_samples=torch.tensor(t[1:]))
    return total


@pytest.mark.parametrize('negatives', [1, 2])
def test_optimum_of_info_nce_is_the_log_ratio(negatives):
    px, pyx, _ = joint()
    eta, offset = o.noise(3, 3), torch.tensor([[.4], [-1.], [2.]], dtype=torch.float64)
    run = lambda s: expected_info_nce(s, px, pyx, eta, negatives)
    best = torch.log(pyx/eta) + offset
    value, (grad,) = o.value_and_grad(run, best)
    assert grad.abs().max() < 1e-13
    for seed in range(3): assert run(best + .3*o.logits(3, 3, 50 + seed).detach()) > value + 1e-4
    assert o.value_and_grad(run, pyx.log())[1][0].abs().max() > 1e-3       # log p without the noise is not an optimum


def test_optimum_of_in_batch_info_nce():
    """Two rows drawn from the joint: the batch's labels are noise from p(y), so the optimum is log p(y|x)/p(y)
    whatever `noise_probs` says."""
    px, pyx, py = joint()

    def run(s):
        total = 0.
        for (a, i), (b, j) in itertools.product(itertools.product(range(3), repeat=2), repeat=2):
            weight = px[a]*pyx[a, i]*px[b]*pyx[b, j]
            total = total + weight*info_nce((s + py.log())[[a, b]], torch.tensor([i, j]), noise_probs=py)
        return total

    assert o.value_and_grad(run, torch.log(pyx/py) + torch.tensor([[1.], [0.], [-2.]]))[1][0].abs().max() < 1e-13
    assert o.value_and_grad(run, torch.log(pyx/o.noise(3, 3)))[1][0].abs().max() > 1e-3


# ---------------------------------------------------------------- modules and their read-out
MODULES = {
    'NLL': (lambda p, **kw: NLL(temperature=.7, **kw), lambda l, p, **kw: nll(l, p['y'], temperature=.7, **kw), 'y'),
    'SoftTargetCrossEntropy': (lambda p, **kw: SoftTargetCrossEntropy(temperature=.7, **kw),
                               lambda l, p, **kw: soft_target_cross_entropy(l, p['t'], temperature=.7, **kw), 't'),
    'InfoNCE': (lambda p, **kw: InfoNCE(noise_probs=p['eta'], temperature=.7, **kw),
                lambda l, p, **kw: info_nce(l, p['y'], noise_probs=p['eta'], temperature=.7, **kw), 'y'),
    'SoftDistributionInfoNCE': (lambda p, **kw: SoftDistributionInfoNCE(noise_probs=p['eta'], temperature=.7, **kw),
                                lambda l, p, **kw: soft_distribution_info_nce(l, p['t'], noise_probs=p['eta'],
                                                                              temperature=.7, **kw), 't'),
    'SoftTargetInfoNCE': (lambda p, **kw: SoftTargetInfoNCE(noise_probs=p['eta'], temperature=.7, **kw),
                          lambda l, p, **kw: soft_target_info_nce(l, p['t'], noise_probs=p['eta'], temperature=.7,
                                                                  **kw), 't'),
}


@pytest.mark.parametrize('name', MODULES)
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_modules_are_the_functions(name, reduction):
    module, function, target = MODULES[name]
    p = problem(5, 4)
    m = module(p, reduction=reduction)
    assert isinstance(m, torch.nn.Module)
    torch.manual_seed(5)
    got, (g1,) = o.value_and_grad(lambda l: m(l, p[target]), p['x'])
    torch.manual_seed(5)
    wanted, (g2,) = o.value_and_grad(lambda l: function(l, p, reduction=reduction), p['x'])
    assert torch.equal(got, wanted) and torch.equal(g1, g2)


@pytest.mark.parametrize('name', ['InfoNCE', 'SoftTargetInfoNCE'])
def test_modules_take_a_noise_source(name):
    module, function, target = MODULES[name]
    p = problem(4, 3)
    for make in (lambda: Queue(3), lambda: Fresh(3, generator=o.generator(0)), lambda: ClosedForm(),
                 lambda: o.ids(3, 3, 5)):
        a, b = module(p, noise_samples=make()), make()
        for _ in range(2): o.same(a(p['x'], p[target]), function(p['x'], p, noise_samples=b))


@pytest.mark.parametrize('name', ['InfoNCE', 'SoftDistributionInfoNCE', 'SoftTargetInfoNCE'])
def test_noise_is_a_buffer(name):
    p = rounded(problem(4, 3), torch.float32)
    m = MODULES[name][0](p)
    held = list(m.state_dict().values())
    assert len(held) >= 1
    assert any(v.shape == (3,) and (torch.equal(v, p['eta']) or torch.equal(v, p['eta'].log())) for v in held)
    assert not list(m.parameters())
    assert all(v.dtype == torch.float64 for v in copy.deepcopy(m).double().state_dict().values()
               if v.is_floating_point())
    assert all(v.device.type == 'meta' for v in copy.deepcopy(m).to('meta').state_dict().values())
    other = MODULES[name][0]({'eta': torch.tensor([.1, .1, .8])})
    other.load_state_dict(m.state_dict())
    torch.manual_seed(0)
    a = other(p['x'], p[MODULES[name][2]])
    torch.manual_seed(0)
    assert torch.equal(a, m(p['x'], p[MODULES[name][2]]))


@pytest.mark.parametrize('name', ['InfoNCE', 'SoftTargetInfoNCE', 'SoftDistributionInfoNCE'])
def test_modules_without_noise_probs(name):
    cls = {'InfoNCE': InfoNCE, 'SoftTargetInfoNCE': SoftTargetInfoNCE,
           'SoftDistributionInfoNCE': SoftDistributionInfoNCE}[name]
    p, m = problem(4, 3), cls()
    torch.manual_seed(0)
    a = m(p['x'], p[MODULES[name][2]])
    torch.manual_seed(0)
    b = cls(noise_probs=torch.full((3,), 1/3, dtype=torch.float64))(p['x'], p[MODULES[name][2]])
    o.same(a, b)
    o.same(m.probs(p['x']).sum(-1), torch.ones(4, dtype=torch.float64))


def test_probs_of_hard_label_losses():
    """At the population optimum s = log p/eta + const (InfoNCE, eta = p(y)) and l/tau = log p + const (NLL) `probs` is
    the truth."""
    px, pyx, py = joint()
    offset = torch.tensor([[.4], [-1.], [2.]], dtype=torch.float64)
    o.same(InfoNCE(noise_probs=py, temperature=.7).probs(.7*(torch.log(pyx/py) + offset + py.log())), pyx)
    o.same(NLL(temperature=.7).probs(.7*(pyx.log() + offset)), pyx)
    assert (InfoNCE(noise_probs=py).probs(torch.log(pyx/py)) - pyx).abs().max() > 1e-3


def smoothing_optimum(name, eps, tau):
    """Logits at the population optimum of each loss for labels smoothed by eps, candidates' labels from the marginal
    p(y) = eta."""
    px, pyx, py = joint()
    p_eps, eta_eps = (1 - eps)*pyx + eps/3, (1 - eps)*py + eps/3
    offset = torch.tensor([[.4], [-1.], [2.]], dtype=torch.float64)
    s = {'SoftTargetCrossEntropy': p_eps.log(), 'SoftDistributionInfoNCE': torch.log(p_eps/eta_eps) + py.log(),
         'SoftTargetInfoNCE': (torch.log(pyx/py))/(1 - eps) + py.log()}[name]
    return tau*(s + offset), pyx, py, px


@pytest.mark.parametrize('name', ['SoftTargetCrossEntropy', 'SoftDistributionInfoNCE', 'SoftTargetInfoNCE'])
@pytest.mark.parametrize('eps', [0., .1, .5])
@pytest.mark.parametrize('tau', [1., .7])
def test_probs_undo_smoothing(name, eps, tau):
    x, pyx, py, _ = smoothing_optimum(name, eps, tau)
    m = SoftTargetCrossEntropy(temperature=tau) if name == 'SoftTargetCrossEntropy' else \
        {'SoftDistributionInfoNCE': SoftDistributionInfoNCE,
         'SoftTargetInfoNCE': SoftTargetInfoNCE}[name](noise_probs=py, temperature=tau)
    o.same(m.probs(x, epsilon=eps), pyx)
    if eps: assert (m.probs(x) - pyx).abs().max() > 1e-2          # read without the smoothing it is something else


def test_the_smoothed_optima_are_optima():
    """The population losses have gradient zero where `probs` was checked: soft cross-entropy, soft target InfoNCE with
    infinitely many candidates,"""
    eps = .3
    x, pyx, py, px = smoothing_optimum('SoftTargetCrossEntropy', eps, 1.)
    mean_target = (1 - eps)*pyx + eps/3
    slope = lambda f, x: o.value_and_grad(f, x)[1][0].abs().max()
    assert slope(lambda l: (px*soft_target_cross_entropy(l, mean_target, reduction='none')).sum(), x) < 1e-14
    x = smoothing_optimum('SoftTargetInfoNCE', eps, 1.)[0]
    closed = lambda l: (px*soft_target_info_nce(l, mean_target, noise_probs=py, noise_samples=ClosedForm(epsilon=eps),
                                                reduction='none')).sum()
    assert slope(closed, x) < 1e-14 and slope(closed, smoothing_optimum('SoftTargetInfoNCE', 0., 1.)[0]) > 1e-3


def test_the_soft_distribution_optimum_is_one():
    "and soft distribution InfoNCE in batches of two, all labellings: the candidates' law is (1-eps) p(y) + eps/K."
    eps = .3
    x, pyx, py, px = smoothing_optimum('SoftDistributionInfoNCE', eps, 1.)
    p_eps = (1 - eps)*pyx + eps/3

    def run(l):
        total = 0.
        for (a, i), (b, j) in itertools.product(itertools.product(range(3), repeat=2), repeat=2):
            total = total + px[a]*p_eps[a, i]*px[b]*p_eps[b, j]*info_nce(l[[a, b]], torch.tensor([i, j]),
                                                                         noise_probs=py)
        return total

    assert o.value_and_grad(run, x)[1][0].abs().max() < 1e-13
    assert o.value_and_grad(run, smoothing_optimum('SoftDistributionInfoNCE', 0., 1.)[0])[1][0].abs().max() > 1e-3


@pytest.mark.parametrize('lam', [1., .3])
@pytest.mark.parametrize('eps, noise_eps', [(0., 0.), (.2, .2), (.2, 0.), (.2, .1)])
def test_probs_with_independent_noise(lam, eps, noise_eps):
    """Infinitely many noise targets: at the optimum E[alpha|x] = E[alpha e^(alpha.s)]/E[e^(alpha.s)] over them (THEORY
    C7), here enumerated for any scores s; `probs` reads the p(y|x) behind E[alpha|x] = (1-eps) p + eps/K."""
    eta, s = o.noise(3), o.logits(4, 3, 9, .5).detach()
    pairs = list(o.noise_targets(3, lam, noise_eps))
    weight = torch.stack([eta[a]*eta[b]*torch.exp((s*t).sum(-1)) for a, b, t in pairs], -1)
    mean_target = weight/weight.sum(-1, keepdim=True) @ torch.stack([t for *_, t in pairs])
    p = (mean_target - eps/3)/(1 - eps)
    assert (p > 0).all()
    source, x = ClosedForm(lam, noise_eps), s + eta.log()
    loss = lambda l: soft_target_info_nce(l, mean_target, noise_probs=eta, noise_samples=source)
    assert o.value_and_grad(loss, x)[1][0].abs().max() < 1e-15
    o.same(SoftTargetInfoNCE(noise_probs=eta, noise_samples=source).probs(x, epsilon=eps), p)
    o.same(SoftTargetInfoNCE(noise_probs=eta, noise_samples=Fresh(7, lam, noise_eps)).probs(x, epsilon=eps), p)


@pytest.mark.parametrize('name', MODULES)
def test_probs_are_probabilities_away_from_the_optimum(name):
    p = problem(6, 5, 0, 3.)
    for eps in (0., .4):
        q = MODULES[name][0](p).probs(p['x'], epsilon=eps)
        assert q.shape == (6, 5) and (q >= 0).all() and abs(q.sum(-1) - 1).max() < 1e-12
    if name in ('NLL', 'SoftTargetCrossEntropy', 'InfoNCE'):
        assert torch.equal(MODULES[name][0](p).probs(p['x']).argmax(-1), p['x'].argmax(-1))


def test_probs_with_closed_form_noise_of_mixed_labels_is_the_mean_target():
    "At the population optimum of ClosedForm(lam, epsilon) the read-out is the mean target, its own smoothing undone."
    eta = torch.tensor([.5, .3, .2], dtype=torch.float64)
    loss = SoftTargetInfoNCE(noise_probs=eta, noise_samples=ClosedForm(lam=.7, epsilon=.1))
    logits = torch.tensor([[.3, -.8, .4]], dtype=torch.float64, requires_grad=True)
    mean_target = smooth(loss.probs(logits.detach()*1., epsilon=.1), .1)
    grad, = torch.autograd.grad(loss(logits, mean_target/mean_target.sum()), logits)
    torch.testing.assert_close(grad, torch.zeros(1, 3, dtype=torch.float64), rtol=0, atol=1e-14)
    other = SoftTargetInfoNCE(noise_probs=eta, noise_samples=ClosedForm(lam=1., epsilon=.1))
    wrong = smooth(other.probs(logits.detach(), epsilon=.1), .1)
    assert torch.autograd.grad(loss(logits, wrong), logits)[0].abs().max() > 1e-3
