"""Identities of the losses on random problems (THEORY C1, C2, C3, C5, C8, C10), each with the case where its condition
is dropped."""
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles as o
from softnce.losses import (info_nce, linear_soft_target_info_nce, nll, soft_distribution_info_nce,
                            soft_target_cross_entropy, soft_target_info_nce)
from softnce.noise import ClosedForm
from softnce.targets import SparseTargets, mix, one_hot, smooth

SEED = st.integers(0, 10**6)
ROWS, CLASSES = st.integers(1, 6), st.integers(2, 6)
TAU = st.floats(.2, 5.)
EPSILON = st.floats(0., .9)
LAM = st.floats(0., 1.)


def rows(l, t, **kw): return soft_target_info_nce(l, t, reduction='none', **kw)


def hard_rows(y, k): return one_hot(y, k).double()


@given(ROWS, st.integers(0, 5), CLASSES, TAU, SEED)
def test_c1_one_matrix_product_is_the_triple_loop(n, m, k, tau, seed):
    x, t, eta = o.logits(n, k, seed), o.simplex(n, k, seed), o.noise(k, seed)
    more = o.simplex(m, k, seed + 1) if m else None
    loss = lambda l: rows(l, t, noise_probs=eta, temperature=tau, noise_samples=more)
    value, _ = o.same_value_and_grad(
        loss, lambda l: o.soft_target_info_nce(l, t, eta, tau, extra=() if more is None else more), x, tol=1e-11)
    s = x.detach()/tau - eta.log()
    u = s @ (t if more is None else torch.cat([t, more])).T
    o.same(value, torch.logsumexp(u, -1) - u.diagonal(), 1e-11)


@given(st.integers(2, 6), CLASSES, TAU, EPSILON, LAM, SEED)
def test_c2_smoothing_is_a_temperature(n, k, tau, eps, lam, seed):
    "(tau, eta, eps) equals (tau/(1-eps), eta^(1-eps), 0), for any background and after mixing too."
    x, eta, xi, hard = o.logits(n, k, seed), o.noise(k, seed), o.noise(k, seed + 7), hard_rows(o.ids(n, k, seed), k)
    power = eta**(1 - eps)
    for t in (hard, mix(hard, lam)):
        for background in (None, xi):
            o.same_value_and_grad(lambda l: rows(l, smooth(t, eps, background), noise_probs=eta, temperature=tau),
                                  lambda l: rows(l, t, noise_probs=power/power.sum(), temperature=tau/(1 - eps)), x,
                                  tol=1e-11)


def test_c2_needs_one_epsilon_and_the_power_of_the_noise():
    n, k = 5, 4
    x, eta, hard = o.logits(n, k).detach(), o.noise(k), hard_rows(torch.tensor([0, 1, 3, 0, 2]), k)
    eps = torch.tensor([0., .1, .2, .3, .4], dtype=torch.float64)
    varied = torch.cat([smooth(h[None], float(e)) for h, e in zip(hard, eps)])
    right = lambda e: rows(x, hard, noise_probs=eta**(1 - e)/(eta**(1 - e)).sum(), temperature=1/(1 - e))
    assert (rows(x, varied, noise_probs=eta) - right(.2)).abs().min() > 1e-3
    plain = rows(x, hard, noise_probs=eta, temperature=1/.8)
    assert (rows(x, smooth(hard, .2), noise_probs=eta) - plain).abs().max() > 1e-3
    cross = (soft_target_cross_entropy(x, smooth(hard, .2), reduction='none')
             - soft_target_cross_entropy(x, hard, temperature=1/.8, reduction='none'))
    assert cross.abs().max() > 1e-3          # soft target cross-entropy has no such identity


@given(ROWS, CLASSES, TAU, SEED)
def test_c3_class_counts_equal_the_whole_matrix(n, k, tau, seed):
    x, y, eta = o.logits(n, k, seed), o.ids(n, k, seed), o.noise(k, seed)
    counts = torch.bincount(y, minlength=k).double()

    def by_counts(l):
        s = l/tau - eta.log()
        return torch.log((counts*torch.exp(s)).sum(-1)) - s[torch.arange(n), y]

    hard = lambda l: info_nce(l, y, noise_probs=eta, temperature=tau, reduction='none')
    o.same_value_and_grad(hard, by_counts, x, tol=1e-11)
    o.same_value_and_grad(hard, lambda l: rows(l, hard_rows(y, k), noise_probs=eta, temperature=tau), x, tol=1e-11)


def test_c3_counts_are_the_batchs():
    x, y = o.logits(5, 3).detach(), torch.tensor([0, 0, 0, 1, 0])
    assert (info_nce(x, y, reduction='none') - nll(x, y, reduction='none')).abs().min() > 1e-3


@given(st.integers(2, 8), CLASSES, TAU, LAM, EPSILON, SEED)
def test_c5_mixed_pairs_by_gathers_and_by_counts(n, k, tau, lam, eps, seed):
    """U from two gathers; with one lam and one eps sum_m exp U[i,m] = e1_i' C e2_i (times the background, the same for
    every m)."""
    x, eta, a = o.logits(n, k, seed), o.noise(k, seed), o.ids(n, k, seed)
    b = a.flip(0)
    dense = smooth(mix(hard_rows(a, k), lam), eps)
    weights = torch.tensor([lam, 1 - lam], dtype=torch.float64).expand(n, 2)
    sparse = SparseTargets(torch.stack([a, b], -1), weights, epsilon=eps, num_classes=k)
    kw = dict(noise_probs=eta, temperature=tau)
    o.same_value_and_grad(lambda l: rows(l, sparse, **kw), lambda l: rows(l, dense, **kw), x, tol=1e-11)
    s = x.detach()/tau - eta.log()
    count = torch.zeros(k, k, dtype=torch.float64)
    for i, j in zip(a, b): count[i, j] += 1
    e1, e2 = torch.exp((1 - eps)*lam*s), torch.exp((1 - eps)*(1 - lam)*s)
    pairs = torch.stack([sum(e1[i, p]*count[p, q]*e2[i, q] for p, q in itertools.product(range(k), repeat=2))
                         for i in range(n)])
    partition = torch.exp(rows(x.detach(), sparse, **kw) + (dense*s).sum(-1))
    torch.testing.assert_close(partition, pairs*torch.exp(eps*s.mean(-1)), rtol=1e-11, atol=0)


def test_c5_needs_one_lam():
    n, k = 4, 3
    x, a = o.logits(n, k).detach(), torch.tensor([0, 1, 2, 0])
    lam = torch.tensor([.1, .9, .5, .7], dtype=torch.float64)
    count = torch.zeros(k, k, dtype=torch.float64)
    for i, j in zip(a, a.flip(0)): count[i, j] += 1
    partition = torch.exp(rows(x, mix(hard_rows(a, k), lam), noise_probs=torch.full((k,), 1/k, dtype=torch.float64))
                          + (mix(hard_rows(a, k), lam)*(x + torch.tensor(3.).double().log())).sum(-1))
    s = x + torch.tensor(3.).double().log()
    pairs = torch.einsum('ip,pq,iq->i', torch.exp(.55*s), count, torch.exp(.45*s))
    assert (partition - pairs).abs().min() > 1e-3


@given(st.integers(2, 8), CLASSES, TAU, SEED)
def test_c8_gathered_candidates_give_the_global_batch(n, k, tau, seed):
    """Two halves, each with the other's targets as extra candidates: the mean of their losses is the global batch's,
    gradient included."""
    n = n + n % 2
    x, t, y, eta = o.logits(n, k, seed), o.simplex(n, k, seed), o.ids(n, k, seed), o.noise(k, seed)
    h, kw = n//2, dict(noise_probs=eta, temperature=tau)

    def halves(loss, a):
        return lambda l: (loss(l[:h], a[:h], noise_samples=a[h:], **kw)
                          + loss(l[h:], a[h:], noise_samples=a[:h], **kw))/2

    o.same_value_and_grad(halves(soft_target_info_nce, t), lambda l: soft_target_info_nce(l, t, **kw), x, tol=1e-11)
    o.same_value_and_grad(halves(info_nce, y), lambda l: info_nce(l, y, **kw), x, tol=1e-11)


def test_c8_needs_the_gathered_candidates():
    x, t = o.logits(6, 4).detach(), o.simplex(6, 4)
    apart = (soft_target_info_nce(x[:3], t[:3]) + soft_target_info_nce(x[3:], t[3:]))/2
    assert (apart - soft_target_info_nce(x, t)).abs() > 1e-3


@given(ROWS, st.integers(0, 4), CLASSES, TAU, SEED)
def test_c10_gradient(n, m, k, tau, seed):
    "dL/dl = (P - I) alpha/(N tau), the sum over candidates."
    x, t, eta = o.logits(n, k, seed), o.simplex(n, k, seed), o.noise(k, seed)
    more = o.simplex(m, k, seed + 1) if m else None
    (grad,) = torch.autograd.grad(soft_target_info_nce(x, t, noise_probs=eta, temperature=tau, noise_samples=more), x)
    every = [*t] if more is None else [*t, *more]
    for i, s in enumerate(o.scores(x.detach(), eta, tau)):
        u = [o.energy(a, s) for a in every]
        top = o.log_sum_exp(u)
        wanted = sum((torch.exp(v - top) - float(j == i))*a for j, (v, a) in enumerate(zip(u, every)))/(n*tau)
        o.same(grad[i], wanted, 1e-11)
    assert grad.sum(-1).abs().max() < 1e-11       # rows of alpha sum to one, so a shift of the logits has no gradient


def every_loss(t, y, eta, tau, more):
    "Each loss as a function of logits, one value a row."
    kw = dict(noise_probs=eta, temperature=tau)
    return {'nll': lambda l: nll(l, y, temperature=tau, reduction='none'),
            'soft_target_cross_entropy': lambda l: soft_target_cross_entropy(l, t, temperature=tau, reduction='none'),
            'info_nce': lambda l: info_nce(l, y, reduction='none', **kw),
            'info_nce, extra': lambda l: info_nce(l, y, noise_samples=more.argmax(-1), reduction='none', **kw),
            'soft_distribution_info_nce': lambda l: soft_distribution_info_nce(l, hard_rows(y, l.shape[1]),
                                                                               reduction='none', **kw),
            'soft_target_info_nce': lambda l: rows(l, t, **kw), 'extra': lambda l: rows(l, t, noise_samples=more, **kw),
            'closed': lambda l: rows(l, t, noise_samples=ClosedForm(.3, .1), **kw),
            'linear': lambda l: linear_soft_target_info_nce(l, torch.eye(l.shape[1]).double(), t, reduction='none',
                                                            **kw)}


LOSS = st.sampled_from(['nll', 'soft_target_cross_entropy', 'info_nce', 'info_nce, extra', 'soft_distribution_info_nce',
                        'soft_target_info_nce', 'extra', 'closed', 'linear'])


def ingredients(n, k, seed):
    return dict(t=o.simplex(n, k, seed), y=o.ids(n, k, seed), eta=o.noise(k, seed), more=o.simplex(3, k, seed + 1))


@given(LOSS, ROWS, CLASSES, TAU, st.floats(-50, 50), SEED)
def test_a_shift_of_the_logits_changes_nothing(name, n, k, tau, shift, seed):
    x, loss = o.logits(n, k, seed).detach(), every_loss(tau=tau, **ingredients(n, k, seed))[name]
    by_row = shift*torch.linspace(-1, 1, n, dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(x + by_row), loss(x), rtol=1e-10, atol=1e-11)


@given(LOSS, st.integers(2, 6), CLASSES, TAU, SEED)
def test_the_order_of_the_batch_does_not_matter(name, n, k, tau, seed):
    x, parts = o.logits(n, k, seed).detach(), ingredients(n, k, seed)
    order = torch.randperm(n, generator=o.generator(seed))
    moved = {**parts, 't': parts['t'][order], 'y': parts['y'][order]}
    o.same(every_loss(tau=tau, **moved)[name](x[order]), every_loss(tau=tau, **parts)[name](x)[order], 1e-11)


def test_rows_must_keep_their_own_target():
    x, t = o.logits(4, 3).detach(), o.simplex(4, 3)
    assert (rows(x, t.roll(1, 0)) - rows(x, t)).abs().max() > 1e-3


@given(LOSS, ROWS, CLASSES, TAU, SEED)
def test_the_names_of_the_classes_do_not_matter(name, n, k, tau, seed):
    x, parts = o.logits(n, k, seed).detach(), ingredients(n, k, seed)
    order = torch.randperm(k, generator=o.generator(seed))
    renamed = dict(t=parts['t'][:, order], y=torch.argsort(order)[parts['y']], eta=parts['eta'][order],
                   more=parts['more'][:, order])
    o.same(every_loss(tau=tau, **renamed)[name](x[:, order]), every_loss(tau=tau, **parts)[name](x), 1e-11)


@given(LOSS, ROWS, CLASSES, TAU, SEED)
def test_no_noise_probs_is_uniform(name, n, k, tau, seed):
    x, parts = o.logits(n, k, seed), ingredients(n, k, seed)
    loss = lambda eta: every_loss(tau=tau, **{**parts, 'eta': eta})[name]
    o.same_value_and_grad(loss(None), loss(torch.full((k,), 1/k, dtype=torch.float64)), x, tol=1e-11)


@given(ROWS, CLASSES, TAU, LAM, EPSILON, SEED)
def test_closed_form_factorises_as_enumerated(n, k, tau, lam, eps, seed):
    x, t, eta = o.logits(n, k, seed), o.simplex(n, k, seed), o.noise(k, seed)
    o.same_value_and_grad(lambda l: rows(l, t, noise_probs=eta, temperature=tau, noise_samples=ClosedForm(lam, eps)),
                          lambda l: o.closed_form(l, t, eta, tau, lam, eps), x, tol=1e-11)


@given(st.integers(1, 8), CLASSES, st.integers(1, 12), SEED)
def test_chunks_are_the_whole(n, k, chunk, seed):
    x, t = o.logits(n, k, seed), o.simplex(n, k, seed)
    o.same_value_and_grad(lambda l: rows(l, t, chunk_size=chunk), lambda l: rows(l, t), x)


@pytest.mark.parametrize('n', [1, 5])
def test_loss_is_at_least_zero_and_nce_at_most_its_spread(n):
    "-log of a probability is positive for every row, and at most log(candidates) plus the spread of the energies."
    x, t = o.logits(n, 4).detach(), o.simplex(n, 4)
    value, u = rows(x, t), x @ t.T
    assert (value >= 0).all() and (value <= torch.log(torch.tensor(float(n))) + u.amax(-1) - u.amin(-1) + 1e-12).all()
