"""One independent check for every numbered equation of the paper: `pytest tests/test_equations.py -k "eq[17]"`.

Each is written from the paper's text with plain loops in float64 and compared with the package afterwards. Means over
tuples are exact: sums over every tuple of labels, Gauss quadrature over the simplex for Eq. (4). Where an equation is
wrong as printed, `fails` states by how much; the corrected form holds at 1e-12. An equation that only defines something
is checked in its use.
"""
import itertools
import math
from functools import cache

import numpy as np
import pytest
import scipy.stats
import torch

from softnce.experiments import gmm
from softnce.theory import gradients
from softnce.theory import information
from softnce import losses
from softnce.contrast import scores
from softnce.noise import ContinuousCategorical, Fresh
from softnce.targets import one_hot, smooth

CHECKS = {}


def equation(*numbers):
    "Register a check under its equation numbers."
    def register(check):
        assert not CHECKS.keys() & set(numbers), numbers
        CHECKS.update(dict.fromkeys(numbers, check))
        return check
    return register


@pytest.mark.parametrize('number', range(1, 54))
def test_eq(number): CHECKS[number]()


def test_every_number_has_a_check():
    assert sorted(CHECKS) == list(range(1, 54))


def without(function, **forced):
    "The function with some arguments overruled: a loss that forgets them."
    return lambda *args, **given: function(*args, **{**given, **forced})


@pytest.mark.parametrize('number, room, name, mutant', [
    (11, losses, 'soft_target_info_nce', without(losses.soft_target_info_nce, noise_probs=None)),
    (11, losses, 'soft_target_info_nce', without(losses.soft_target_info_nce, noise_samples=None)),
    (31, losses, 'soft_distribution_info_nce', without(losses.soft_distribution_info_nce, noise_probs=None)),
    (31, losses, 'soft_distribution_info_nce', without(losses.soft_distribution_info_nce, temperature=2.)),
    (51, information, 'info_nce_bound', lambda loss, n, **_: math.log(n + 2) - loss),
    (51, losses, 'info_nce', without(losses.info_nce, noise_probs=None)),
    (52, information, 'soft_conditional_entropy', lambda joint, eps: information.conditional_entropy(joint)),
    (52, information, 'soft_conditional_entropy', lambda joint, eps: information.mutual_information(joint))])
def test_a_check_can_fail(number, room, name, mutant, monkeypatch):
    "A loss or a bound with one thing wrong does not pass."
    monkeypatch.setattr(room, name, mutant)
    with pytest.raises(AssertionError): CHECKS[number]()


# ---------------------------------------------------------------- tools
def t(x): return torch.tensor(x, dtype=torch.float64)
def floats(x): return x.tolist()


def holds(got, wanted, tol=1e-12):
    torch.testing.assert_close(torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(wanted, dtype=torch.float64),
                               rtol=tol, atol=tol)


def fails(printed, true, by):
    "The printed form is off by `by`, given to four digits: the largest difference of the two."
    off = (torch.as_tensor(printed, dtype=torch.float64)
           - torch.as_tensor(true, dtype=torch.float64)).abs().max().item()
    assert abs(off - by) <= 6e-4*by, off


def gradient(function, x): return torch.func.grad(function)(t(x) if isinstance(x, list) else x)
def dot(a, b): return sum(x*y for x, y in zip(a, b, strict=True))
def exps(x): return [torch.exp(v) if torch.is_tensor(v) else math.exp(v) for v in x]


# ---------------------------------------------------------------- one data point, three classes
P, ETA, UNIFORM = [.6, .3, .1], [.5, .2, .3], [1/3]*3
RATIO = [p/e for p, e in zip(P, ETA)]                     # p(i|x)/eta(i)
TUPLE = [[.8, .1, .1], [.2, .5, .3], [.1, .1, .8]]        # soft targets alpha_1..alpha_3
S = [1., 2., -.5]                                         # scores s(z, y_1..3) of a model
Z, W = [.4, -1.1], [[.5, .3], [-.2, .9], [1.2, .1]]       # embedding and label embeddings
EPS = .2


def delta(label, k=3): return [float(i == label) for i in range(k)]
def smoothed(p, eps, xi=UNIFORM): return [(1 - eps)*a + eps*b for a, b in zip(p, xi)]
def energy(alpha, s): return dot(alpha, s)
def softmax(x): return [e/sum(exps(x)) for e in exps(x)]


# ---------------------------------------------------------------- Eqs. (1)-(3)
@equation(1)
def _():
    logits = [dot(Z, w) for w in W]
    for k in range(3):
        q = math.exp(logits[k])/sum(math.exp(l) for l in logits)
        holds(losses.nll(t([logits]), torch.tensor([k])), -math.log(q))
        holds(losses.nll(t([logits])*3, torch.tensor([k]), temperature=3.), -math.log(q))
    # "assumes a degenerate conditional": the mean of (1) over labels drawn from p is least at p, and not at the most
    # probable label
    mean_nll = lambda l: sum(p*-torch.log_softmax(l, 0)[k] for k, p in enumerate(P))
    holds(gradient(mean_nll, [math.log(p) for p in P]), [0.]*3)
    fails(softmax([math.log(p) for p in P]), delta(0), by=.4)


@equation(2)
def _():
    for k in range(3):
        by_hand = [(1 - EPS)*(1. if l == k else 0.) + EPS/3 for l in range(3)]
        holds(smooth(one_hot(torch.tensor([k]), 3).double(), EPS)[0], by_hand)
        holds(sum(by_hand), 1.)
        holds(by_hand[k], 1 - 2*EPS/3)  # the weight of the true class, 1-(K-1)eps/K; for the printed one see Eq. (12)
    xi = [.1, .2, .7]
    holds(smooth(torch.eye(3, dtype=torch.float64), EPS, t(xi)), [smoothed(delta(k), EPS, xi) for k in range(3)])


@equation(3)
def _():
    log_q = [math.log(q) for q in softmax(S)]
    for k in range(3):
        alpha = smoothed(delta(k), EPS)
        by_hand = -sum(alpha[l]*log_q[l] for l in range(3))
        holds(losses.soft_target_cross_entropy(t([S]), t([alpha])), by_hand)
        holds(losses.soft_target_cross_entropy(2*t([S]), t([alpha]), temperature=2.), by_hand)
        holds(losses.soft_target_cross_entropy(t([S]), t([delta(k)])), -log_q[k])  # eps = 0: Eq. (1)


# ---------------------------------------------------------------- Eq. (4), by quadrature
NODES, WEIGHTS = np.polynomial.legendre.leggauss(24)
NODES, WEIGHTS = ((NODES + 1)/2).tolist(), (WEIGHTS/2).tolist()
SIMPLEX = [([u, (1 - u)*v, (1 - u)*(1 - v)], a*b*(1 - u))
           for (u, a), (v, b) in itertools.product(zip(NODES, WEIGHTS), repeat=2)]


def unnormalised(alpha, lam): return math.prod(l**a for l, a in zip(lam, alpha))
def density(alpha, lam): return unnormalised(alpha, lam)/normaliser(tuple(lam))


@cache
def normaliser(lam): return math.fsum(w*unnormalised(alpha, lam) for alpha, w in SIMPLEX)


def textbook(lam):
    return sum(l/math.prod(math.log(l) - math.log(m) for j, m in enumerate(lam) if j != i) for i, l in enumerate(lam))


@equation(4)
def _():
    law = ContinuousCategorical(t(P))
    holds(textbook(P), normaliser(tuple(P)))
    for alpha in TUPLE: holds(law.log_prob(t(alpha)), math.log(density(alpha, P)))
    mean = [math.fsum(w*alpha[i]*density(alpha, P) for alpha, w in SIMPLEX) for i in range(3)]
    holds(law.mean, mean)
    fails(mean, P, by=.1962)  # the mean is not the parameter
    # a smoothed label has equal parameters: the textbook form divides by zero there, the integral does not
    lam = smoothed(delta(0), EPS)
    with pytest.raises(ZeroDivisionError): textbook(lam)
    holds(ContinuousCategorical(t(lam)).log_normalizer, math.log(normaliser(tuple(lam))))
    # and a label itself has no such law
    with pytest.raises(ValueError, match='probs must be positive'): ContinuousCategorical(t(delta(0)))


# ---------------------------------------------------------------- Eq. (5)
def eq5(s, labels, tau=1.):
    "Labels k_0..k_N of the tuple, the positive first: N+1 terms in the sum."
    return -math.log(math.exp(s[labels[0]]/tau)/sum(math.exp(s[k]/tau) for k in labels))


@equation(5)
def _():
    tau, labels = .5, [0, 2, 1, 1]
    logits = [dot(Z, w) for w in W]
    s = [l/tau - math.log(e) for l, e in zip(logits, ETA)]  # s(z, y; tau, eta), as defined below Eq. (5)
    package = losses.info_nce(t([logits]), torch.tensor(labels[:1]),
                              noise_probs=t(ETA), temperature=tau, noise_samples=torch.tensor(labels[1:]))
    holds(package, eq5(s, labels))
    fails(eq5(s, labels, tau), package, by=1.243)  # exp(s/tau) as printed: the temperature divides twice
    # at the optimum, s = log(p/eta), exp(z.y/tau) is proportional to p; with the temperature twice it is not
    once = [tau*(math.log(r) + math.log(e)) for r, e in zip(RATIO, ETA)]
    twice = [tau*(tau*math.log(r) + math.log(e)) for r, e in zip(RATIO, ETA)]
    holds(softmax([l/tau for l in once]), P)
    fails(softmax([l/tau for l in twice]), P, by=.07932)
    # without the positive in the sum the loss would have no lower bound
    raised = [s[0] + 50, *s[1:]]
    without = math.log(sum(math.exp(s[k]) for k in labels[1:])) - raised[0]
    assert eq5(raised, labels) >= 0 and without < -40


@equation(6)
def _():
    by_hand = [math.exp(dot(Z, w))/sum(math.exp(dot(Z, v)) for v in W) for w in W]
    holds(gmm.conditional(t([Z]), t(W))[0], by_hand)
    # Eq. (1) is its likelihood
    for k in range(3): holds(losses.nll(t([[dot(Z, w) for w in W]]), torch.tensor([k])), -math.log(by_hand[k]))
    # used: the labels of the toy experiment
    points, labels = gmm.sample_labels(t([Z]), t(W), 20_000, np.random.default_rng(0))
    frequencies = np.bincount(np.asarray(labels), minlength=3)/20_000
    assert np.abs(frequencies - by_hand).max() < .01 and np.unique(points).tolist() == [0]


# ---------------------------------------------------------------- Eqs. (7)-(9)
def eq7(T, k): return density(T[k], P)*math.prod(density(a, ETA) for i, a in enumerate(T) if i != k)
def eq8(T): return math.prod(density(a, ETA) for a in T)*sum(density(a, P)/density(a, ETA) for a in T)/len(T)
def eq9(T, k):
    return math.prod(r**a for r, a in zip(RATIO, T[k]))/sum(math.prod(r**a for r, a in zip(RATIO, row)) for row in T)


@equation(7)
def _():
    for k in range(3):
        holds(eq7(TUPLE, k), density(TUPLE[k], P)/density(TUPLE[k], ETA)*math.prod(density(a, ETA) for a in TUPLE))
        data, noise = (ContinuousCategorical(t(law)).log_prob(t(TUPLE)) for law in (P, ETA))
        holds((data[k] - noise[k] + noise.sum()).exp(), eq7(TUPLE, k))
    # a density over tuples
    holds(math.fsum(w*density(a, P) for a, w in SIMPLEX)*math.fsum(w*density(a, ETA) for a, w in SIMPLEX), 1.)


@equation(8)
def _():
    holds(eq8(TUPLE), sum(eq7(TUPLE, k) for k in range(3))/3)
    data, noise = (ContinuousCategorical(t(law)).log_prob(t(TUPLE)) for law in (P, ETA))
    holds((noise.sum() + (data - noise).logsumexp(0)).exp()/3, eq8(TUPLE))


@equation(9)
def _():
    bayes = [eq7(TUPLE, k)/3/eq8(TUPLE) for k in range(3)]
    holds([eq9(TUPLE, k) for k in range(3)], bayes)  # the normalisers of the densities cancel
    for c in (0., 5.):  # and so does a factor that depends on x
        holds(scores.position_posterior(t([[math.log(r) + c for r in RATIO]]), t(TUPLE))[0], bayes)


# ---------------------------------------------------------------- Eqs. (10)-(12)
def of_one_tuple(s, T, k):
    "The package's loss of a tuple; uniform noise is a constant."
    return losses.soft_target_info_nce(t([s]), t([T[k]]), noise_samples=t([a for i, a in enumerate(T) if i != k]))


def eq10(s, T, k): return torch.exp(energy(T[k], s))/sum(torch.exp(energy(row, s)) for row in T)


ALPHAS, LAW = t([a for a, _ in SIMPLEX]), t([w for _, w in SIMPLEX])
DATA = LAW*t([density(a, P) for a, _ in SIMPLEX])
NOISE = LAW*t([density(a, ETA) for a, _ in SIMPLEX])


def mean_over_pairs(function):
    "E over tuples with N = 1: the positive from CC(p), one noise target from CC(eta), by quadrature."
    def mean(s):
        u = ALPHAS @ s
        return DATA @ function(u[:, None], u[None, :]) @ NOISE
    return mean


@equation(10)
def _():
    truth = t(RATIO).log()
    for k in range(3): holds(of_one_tuple(S, TUPLE, k), -eq10(t(S), TUPLE, k).log())
    # without the mean over tuples: the maximum for one tuple is at infinity, whatever p is
    assert [round(eq10(c*t(delta(0)), TUPLE, 0).item(), 4) for c in (1, 10, 100)] == [.4889, .9966, 1.]
    # with the mean, but before the logarithm, the truth is no maximum: a steeper model has a larger value
    posterior = mean_over_pairs(lambda own, other: torch.sigmoid(own - other))
    fails(gradient(lambda c: posterior(c*truth), t(1.)), 0., by=.02093)
    holds(gradient(mean_over_pairs(lambda own, other: torch.nn.functional.softplus(other - own)), truth), [0.]*3)


COARSE, COARSE_WEIGHTS = (v.tolist() for v in np.polynomial.legendre.leggauss(5))
FEW = [([(1+u)/2, (1-u)*(1+v)/4, (1-u)*(1-v)/4], a*b*(1-u)/8)                 # the simplex by 25 points
       for (u, a), (v, b) in itertools.product(zip(COARSE, COARSE_WEIGHTS), repeat=2)]


def package_mean(logits, eta=ETA):
    "The package's loss of a positive from CC(P) and one noise target from CC(ETA), its mean by quadrature."
    total = 0.
    for (a, v), (b, w) in itertools.product(FEW, repeat=2):
        loss = losses.soft_target_info_nce(logits[None], t([a]), noise_probs=t(eta), noise_samples=t([b]))
        total = total + v*density(a, P)*w*density(b, ETA)*loss
    return total


@equation(11)
def _():
    # the optimum of the package's loss under CC targets is the truth: logits log p with the noise correction
    slope = gradient(package_mean, [math.log(p) for p in P])
    holds(slope, [0.]*3, tol=1e-7)                                                     # what 25 points can hold
    fails(gradient(package_mean, [math.log(p/q) for p, q in zip(P, ETA)]), [0.]*3, by=.02127)
    eta, logits = t([.4, .4, .2]), t([S, [0., 1., 1.], [.3, -1., 2.]])
    rows = losses.soft_target_info_nce(logits, t(TUPLE), noise_probs=eta, temperature=.7, reduction='none')
    for i in range(3):
        s = [l/.7 - math.log(e) for l, e in zip(floats(logits[i]), floats(eta))]
        holds(rows[i], -math.log(math.exp(energy(TUPLE[i], s))/sum(math.exp(energy(a, s)) for a in TUPLE)))
    # exp(alpha.s) is the density ratio up to a factor only
    truth = t(RATIO).log()
    fails(torch.exp(t(TUPLE[0]) @ (truth + 3.)), density(TUPLE[0], P)/density(TUPLE[0], ETA), by=20.46)


def eq12(s, T, k):
    below = sum(exps([energy(a, s) for a in T]))
    return -sum(T[k][i]*(s[i] - (torch.log(below) if torch.is_tensor(below) else math.log(below)))
                for i in range(len(s)))


@equation(12)
def _():
    for k in range(3): holds(eq12(S, TUPLE, k), -eq10(t(S), TUPLE, k).log())  # as the weights sum to one
    # the smoothing weight printed below it, against Eq. (2)
    K, eps = 4, .3
    true, printed = (1 - eps) + eps/K, 1 - (K - 1/K)*eps
    holds(1 - (K - 1)*eps/K, true)
    fails(printed, true, by=.9)
    assert printed < 0
    # footnote 2: q(k|z) does not sum to one
    fails(sum(exps(S))/sum(math.exp(energy(a, S)) for a in TUPLE), 1., by=.6877)


@equation(13)
def _():
    soft = smoothed(P, EPS)
    holds(smooth(t([P]), EPS)[0], soft)
    # the mean of Eq. (2) over labels k
    holds([sum(P[k]*smoothed(delta(k), EPS)[l] for k in range(3)) for l in range(3)], soft)
    # used: labels drawn from it, Eq. (30)
    draws = losses.sample_labels(t([P]*20_000)*(1 - EPS) + EPS/3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.bincount(draws).double()/20_000, t(soft), rtol=0, atol=.01)


# ---------------------------------------------------------------- Eqs. (14)-(18): a finite joint of z and y
JOINT = [[.32, .13, .05], [.05, .20, .25]]
# of x and y; z merges the first two x, and the last two
FINE = [[.20, .03, .02], [.12, .10, .03], [.03, .17, .05], [.02, .03, .20]]
DETERMINISTIC = [[.5, 0., 0.], [0., .3, 0.], [0., 0., .2]]
SKEWED = [[.45, .05], [.45, .05]]                                          # labels independent of z
TABLES = (JOINT, FINE, DETERMINISTIC, SKEWED)


def cells(joint): return [(z, y) for z in range(len(joint)) for y in range(len(joint[0]))]
def pz(joint): return [sum(row) for row in joint]
def py(joint): return [sum(col) for col in zip(*joint, strict=True)]
def product(joint): return [[a*b for b in py(joint)] for a in pz(joint)]
def mix(a, b, eps): return [[(1 - eps)*v + eps*w for v, w in zip(r, q)] for r, q in zip(a, b)]
def soften(joint, eps, xi=None): return mix(joint, [[z*y for y in xi or py(joint)] for z in pz(joint)], eps)
def given_z(joint): return [[v/total for v in row] for row, total in zip(joint, pz(joint))]
def entropy(p): return -sum(v*math.log(v) for v in p if v > 0)
def mean(weights, f): return sum(weights[z][y]*f(z, y) for z, y in cells(weights) if weights[z][y] > 0)
def entropy_given_z(joint): return -mean(joint, lambda z, y: math.log(given_z(joint)[z][y]))
def information_of(joint): return mean(joint, lambda z, y: math.log(joint[z][y]/product(joint)[z][y]))


def ratios(soft, eta=None):
    eta = eta or py(soft)
    return [[v/e for v, e in zip(row, eta)] for row in given_z(soft)]


def mean_over_tuples(soft, num_noise, f, eta=None):
    "E over z, y_0 from `soft` and num_noise labels from eta (the label marginal): every tuple, one by one."
    eta, total = eta or py(soft), 0.
    for z, y0 in cells(soft):
        for noise in itertools.product(range(len(eta)), repeat=num_noise):
            weight = soft[z][y0]*math.prod(eta[y] for y in noise)
            if weight: total = total + weight*f(z, (y0, *noise))
    return total


def best_loss(soft, num_noise, eta=None):
    r = ratios(soft, eta)
    return mean_over_tuples(soft, num_noise, lambda z, ys: -math.log(r[z][ys[0]]/sum(r[z][y] for y in ys)), eta)


def critic_loss(soft, num_noise):
    "Mean of Eq. (30) for scores (Z, K)."
    return lambda s: mean_over_tuples(soft, num_noise, lambda z, ys: torch.logsumexp(s[z, list(ys)], 0) - s[z, ys[0]])


@equation(14)
def _():
    soft = soften(JOINT, EPS)
    r, loss = t(ratios(soft)), critic_loss(soft, 2)
    holds(gradient(loss, r.log()), torch.zeros(2, 3))                     # stationary, and the loss is convex in s
    holds(loss((r*t([[3.], [.2]])).log()), loss(r.log()))                 # the factor may depend on z
    holds(information.optimal_info_nce(t(JOINT), EPS, 2), loss(r.log()))
    # exp(s/tau) as printed, with tau in s already: what softmax(z.y/tau) then is at the optimum of the first z
    tau, target = .5, given_z(soft)[0]
    twice = [tau*math.log(v) + math.log(e) for v, e in zip(floats(r[0]), py(soft))]
    holds(softmax([math.log(v) + math.log(e) for v, e in zip(floats(r[0]), py(soft))]), target)
    fails(softmax(twice), target, by=.1066)


@equation(15)
def _():
    for table, eps, n in itertools.product((JOINT, DETERMINISTIC), (0., EPS, 1.), (1, 2, 4)):
        soft = soften(table, eps)
        loss, expectation = best_loss(soft, n), mean(soft, lambda z, y: math.log(ratios(soft)[z][y]))
        # log(N+1) holds and is larger
        assert loss >= math.log(n + 1) - expectation - 1e-13 > math.log(n) - expectation
        holds((information.info_nce_bound(t(loss), n), information.info_nce_bound(t(loss), n, as_printed=True)),
              (math.log(n + 1) - loss, math.log(n) - loss))
        if eps == 1.: holds(loss, math.log(n + 1) - expectation)                           # and is attained
    # log N as printed: off by log(1+1/N) there
    fails(math.log(4) - best_loss(soften(JOINT, 1.), 4), 0., by=.2231)
    soft = soften(JOINT, EPS)
    r = ratios(soft)
    single = min(-math.log(r[z][ys[0]]/sum(r[z][y] for y in ys)) for z in range(2)
                 for ys in itertools.product(range(3), repeat=3))
    right = math.log(2) - information_of(soft)
    # without the mean over tuples it is false
    assert single < right
    fails(single, right, by=.1425)


@equation(16)
def _():
    for table, eps in itertools.product(TABLES, (0., EPS, 1.)):
        soft = soften(table, eps)
        left = mean(soft, lambda z, y: math.log(given_z(soft)[z][y]/py(table)[y]))
        holds(left, information_of(table) + entropy_given_z(table) - entropy_given_z(soft))
        holds(information.soft_information(t(table), eps), left)
        holds((information.mutual_information(t(table)), information.conditional_entropy(t(table))),
              (information_of(table), entropy_given_z(table)))
    soft = soften(SKEWED, .5, [.5, .5])  # uniform noise where classes are unbalanced
    left = mean(soft, lambda z, y: math.log(given_z(soft)[z][y]/py(SKEWED)[y]))
    right = information_of(SKEWED) + entropy_given_z(SKEWED) - entropy_given_z(soft)
    fails(right, left, by=.4394)
    holds(information.soft_information(t(SKEWED), .5, t([.5, .5])), right)


@equation(17)
def _():  # the definition, and its use in Eq. (16): H_eps goes from H(Y|Z) to H(Y)
    for table, eps in itertools.product(TABLES, (0., EPS, .7)):
        soft = soften(table, eps)
        by_hand = -sum(soft[z][y]*math.log(soft[z][y]/pz(table)[z]) for z, y in cells(soft) if soft[z][y] > 0)
        holds(information.soft_conditional_entropy(t(table), eps), by_hand)
        holds(information.soft_conditional_entropy(t(table), 0.), entropy_given_z(table))
        holds(information.soft_conditional_entropy(t(table), 1.), entropy(py(table)))
        assert entropy_given_z(table) - 1e-14 <= by_hand <= entropy(py(table)) + 1e-14


def bound_holds(table, eps, n):
    left = information_of(table) + entropy_given_z(table) - entropy_given_z(soften(table, eps))
    right = math.log(n + 1) - best_loss(soften(table, eps), n)
    return left, right


@equation(18)
def _():
    for table, eps, n in itertools.product((JOINT, DETERMINISTIC, SKEWED), (0., EPS, 1.), (1, 3)):
        left, right = bound_holds(table, eps, n)
        assert left >= right - 1e-13
        holds((information.soft_information(t(table), eps),
               information.info_nce_bound(information.optimal_info_nce(t(table), eps, n), n)), (left, right))
    left, right = bound_holds(JOINT, 1., 3)
    holds((left, right), (0., 0.))  # eps = 1: the labels say nothing about z, at any entropy
    # with uniform noise it fails: labels independent of z, negatives from p(y)
    soft, labels = soften(SKEWED, .5, [.5, .5]), py(SKEWED)
    left = information_of(SKEWED) + entropy_given_z(SKEWED) - entropy_given_z(soft)
    printed = math.log(8) - best_loss(soft, 8, labels)
    assert left < 0 < printed
    fails(left, printed, by=.298)


# ---------------------------------------------------------------- Eqs. (19)-(21)
@equation(19)
def _():
    for k in range(3):
        holds(of_one_tuple(S, TUPLE, k), eq12(S, TUPLE, k))
        posterior = softmax([energy(a, S) for a in TUPLE])
        # repulsion minus attraction
        forces = [sum(posterior[l]*TUPLE[l][j] for l in range(3)) - TUPLE[k][j] for j in range(3)]
        holds(gradient(lambda s: eq12(s, TUPLE, k), S), forces)
        holds(gradients.score_gradient(t([S]), t(TUPLE), k)[0], forces)
    extra = TUPLE + [[1/3]*3]                                               # more candidates than classes
    holds(gradients.score_gradient(t([S]), t(extra), 3)[0], gradient(lambda s: eq12(s, extra, 3), S))


SMOOTH = [smoothed(delta(y), .3) for y in (1, 2, 0)]  # the positive, k = 0, has label 1


def eq20(s, T, k, s_of_k=False, tilde_i=False):
    total = 0.
    for i in range(3):
        others = sum(math.exp(T[l][i]*s[i]
                              + sum((T[l][j] - T[k][i if tilde_i else j])*s[j] for j in range(3) if j != i))
                     for l in range(3) if l != k)
        total -= T[k][i]*(s[i] - math.log(math.exp(T[k][i]*s[k if s_of_k else i]) + others))
    return total


def eq21(s, T, k, printed=False):
    if printed: return sum(T[k][i]*T[l][i]*s[l] for i in range(3) for l in range(3) if l != k)
    return sum(T[k][i]*T[k][j]*s[j] for i in range(3) for j in range(3) if j != i)


@equation(20)
def _():
    for T, k in itertools.product((TUPLE, SMOOTH), range(3)):
        holds(eq20(S, T, k) + eq21(S, T, k), eq12(S, T, k))
        holds(gradients.attraction_repulsion(t(S), t(T), k)[0], eq20(S, T, k))
    whole = eq12(S, SMOOTH, 0)
    fails(eq20(S, SMOOTH, 0, s_of_k=True) + eq21(S, SMOOTH, 0), whole, by=.3107)                   # y_k for y_i
    # alpha_ki for alpha_kj
    fails(eq20(S, SMOOTH, 0, tilde_i=True) + eq21(S, SMOOTH, 0), whole, by=.05913)
    fails(eq20(S, SMOOTH, 0, True, True) + eq21(S, SMOOTH, 0, printed=True), whole, by=.4213)      # all as printed
    # the paper's cases, i_0 = 1, i_l = 2: alpha~ is 1-eps, eps-1, else 0; "alpha_{l i_0} = eps-1" lacks its tilde,
    # weights are not negative
    holds([a - b for a, b in zip(SMOOTH[1], SMOOTH[0])], [0., -.7, .7])
    fails(SMOOTH[1][1], .3 - 1, by=.8)


@equation(21)
def _():
    for T, k in itertools.product((TUPLE, SMOOTH), range(3)):
        by_class = sum(T[k][j]*(1 - T[k][j])*S[j] for j in range(3))
        holds(eq21(S, T, k), by_class)
        holds(gradients.attraction_repulsion(t(S), t(T), k)[1], by_class)
    fails(eq20(S, SMOOTH, 0) + eq21(S, SMOOTH, 0, printed=True), eq12(S, SMOOTH, 0), by=.11)
    # "penalises the true class less for eps < 1/2": more, for every eps, from three classes on; the same for two
    for K, eps in itertools.product((2, 3, 10), (.1, .4, .6, .9)):
        a, b = 1 - (K - 1)*eps/K, eps/K
        holds(a*(1 - a) - b*(1 - b), (1 - eps)*(K - 2)*eps/K)
    a, b = .9 + .1/10, .1/10
    assert a*(1 - a)/(b*(1 - b)) > 8
    ten = smoothed(delta(0, 10), .1, [.1]*10)
    assert gradients.attraction_repulsion(t(delta(0, 10)), t([ten]*2), 0)[1] > .08


# ---------------------------------------------------------------- Eqs. (22)-(25): cosine scores, tau = 1
EMBED, LABELS = [.4, -1.1, .7, .2], [[.5, .3, -.4, .1], [-1.2, 2.0, .3, 1.1], [.2, .1, .9, -.4]]


def norm(v): return math.sqrt(dot(v, v))
def unit(v): return [x/norm(v) for x in v]
def cosines(z, labels):
    return [sum(a*b for a, b in zip(z, y))/(torch.sqrt(sum(a*a for a in z))*torch.sqrt(sum(b*b for b in y)))
            for y in labels]
def add(*vectors): return [sum(v) for v in zip(*vectors, strict=True)]
def times(c, v): return [c*x for x in v]


Z_HAT, Y_HAT = unit(EMBED), [unit(y) for y in LABELS]
C = softmax([energy(a, [dot(Z_HAT, y) for y in Y_HAT]) for a in TUPLE])   # C_l(z, y)
Q = [sum(C[l]*TUPLE[l][j] for l in range(3)) for j in range(3)]


def eq22(k, y):
    attraction = add(*[times(TUPLE[k][i], y[i]) for i in range(3)])
    repulsion = add(*[times(C[l], add(*[times(TUPLE[l][j], y[j]) for j in range(3)])) for l in range(3)])
    return [-(a - r) for a, r in zip(attraction, repulsion)]


def eq23(k, index):
    return add(*[add(times(-TUPLE[k][i], Y_HAT[i]), times(Q[index(i)], Y_HAT[index(i)])) for i in range(3)])


def at_unit_length(k):
    "Gradient with respect to z/|z|, its length fixed by nothing: scores are inner products with unit label embeddings."
    return gradient(lambda z: eq12([sum(a*b for a, b in zip(z, y)) for y in Y_HAT], TUPLE, k), Z_HAT)


@equation(22)
def _():
    for k in range(3):
        holds(eq22(k, Y_HAT), at_unit_length(k))
        holds(gradients.embedding_gradient(t([Z_HAT]), t(Y_HAT), t(TUPLE), k)[0], eq22(k, Y_HAT))
    fails(eq22(0, LABELS), at_unit_length(0), by=.1972)   # y as it is: needs length one


@equation(23)
def _():
    for k in range(3):
        holds(eq23(k, lambda i: i), at_unit_length(k))
        holds(gradients.embedding_gradient(t([Z_HAT]), t(Y_HAT), t(TUPLE), k)[0], eq23(k, lambda i: i))
    # the free index j as printed
    for j, by in enumerate((.7981, .5098, .9957)): fails(eq23(0, lambda i: j), at_unit_length(0), by)


@equation(24)
def _():
    for k in range(3):
        g, n = eq22(k, Y_HAT), norm(EMBED)
        by_hand = [sum(((a == b) - Z_HAT[a]*Z_HAT[b])*g[b] for b in range(4))/n for a in range(4)]
        holds(gradient(lambda z: eq12(cosines(z, t(LABELS)), TUPLE, k), EMBED), by_hand)
        holds(gradients.normalization_gradient(t([g]), t([EMBED]))[0], by_hand)


def eq25(T, k, j, s, printed_l=None):
    above = sum(T[l][j]*math.exp(energy(T[l], s)) for l in range(len(T)))
    if printed_l is None: below = sum(T[k][j]*math.exp(energy(T[l], s)) for l in range(len(T)))
    else:
        # the sum over i = 1..K of a term in l
        below = sum(T[k][j]*math.exp(energy(T[printed_l], s)) for i in range(len(s)))
    return T[k][j]*abs(-1 + above/below)


@equation(25)
def _():
    s = [dot(Z_HAT, y) for y in Y_HAT]
    of_labels = lambda y: eq12([sum(a*b for a, b in zip(t(Z_HAT), row)) for row in y], TUPLE, 0)
    jacobian = torch.func.grad(of_labels)(t(Y_HAT))
    holds([eq25(TUPLE, 0, j, s) for j in range(3)], jacobian.norm(dim=1))
    holds(gradients.label_embedding_gradient(t([Z_HAT]), t(Y_HAT), t(TUPLE), 0), jacobian)
    for l, by in enumerate((.1227, .08745, .1258)):
        fails([eq25(TUPLE, 0, j, s, l) for j in range(3)], [eq25(TUPLE, 0, j, s) for j in range(3)], by)
    # "larger than zero": exactly zero for a class that no candidate has, at every eps
    for eps in (.1, .4, .6, .9):
        T = [smoothed(delta(y, 4), eps, [.25]*4) for y in (0, 1, 1)]
        lengths = [eq25(T, 0, j, [.8, .3, -.4, .1]) for j in range(4)]
        holds(lengths[2:], [0., 0.])
        assert min(lengths[:2]) > .01
        fraction = [eq25(T, 0, j, [.8, .3, -.4, .1])/T[0][j] for j in range(2)]
        assert T[1][0]/T[0][0] < 1 < T[1][1]/T[0][1] and min(fraction) > 0   # below or above one by class, not by eps
    # hard labels: 0 * (1/0) for every class but the positive's
    with pytest.raises(ZeroDivisionError): eq25([delta(0), delta(1)], 0, 1, S)


# ---------------------------------------------------------------- Eqs. (26)-(31): labels from the smoothed conditional
SOFT = smoothed(P, EPS, ETA)  # xi = eta
TRIPLES = list(itertools.product(range(3), repeat=3))


def eq26(ys): return SOFT[ys[0]]/ETA[ys[0]]*math.prod(ETA[y] for y in ys)
def eq27(ys): return math.prod(ETA[y] for y in ys)*sum(SOFT[y]/ETA[y] for y in ys)/len(ys)
def eq28(ys): return SOFT[ys[0]]/ETA[ys[0]]/sum(SOFT[y]/ETA[y] for y in ys)


def sampled_loss(function):
    "The mean over every tuple with N = 2, the positive at 0."
    return lambda s: sum(SOFT[ys[0]]*ETA[ys[1]]*ETA[ys[2]]*function(s, list(ys)) for ys in TRIPLES)


def eq30(s, ys): return -torch.log(torch.exp(s[ys[0]])/sum(torch.exp(s[y]) for y in ys))


@equation(26)
def _():
    for ys in TRIPLES: holds(eq26(ys), SOFT[ys[0]]*math.prod(ETA[y] for y in ys[1:]))
    holds(sum(map(eq26, TRIPLES)), 1.)


@equation(27)
def _():
    for ys in TRIPLES:  # the mean over positions, each brought to the front
        holds(eq27(ys), sum(eq26((ys[k], *ys[:k], *ys[k+1:])) for k in range(3))/3)
    holds(sum(map(eq27, TRIPLES)), 1.)


@equation(28)
def _():
    for ys in TRIPLES:
        holds(eq28(ys), eq26(ys)/3/eq27(ys))
        holds(scores.position_posterior(t([[math.log(a/b) for a, b in zip(SOFT, ETA)]]), torch.tensor(ys))[0, 0],
              eq28(ys))


@equation(29)
def _():
    truth = [math.log(a/b) for a, b in zip(SOFT, ETA)]
    holds(gradient(sampled_loss(eq30), truth), [0.]*3)
    holds([math.exp(v) for v in truth], [a/b for a, b in zip(SOFT, ETA)])
    # exp(s/tau) with s = l/tau - log eta: at its optimum the read-out softmax(l/tau) is not p^eps
    tau = .5
    twice = lambda s, ys: eq30(s/tau, ys)
    optimum = [tau*v for v in truth]
    holds(gradient(sampled_loss(twice), optimum), [0.]*3)
    holds(softmax([v + math.log(e) for v, e in zip(truth, ETA)]), SOFT)
    fails(softmax([v + math.log(e) for v, e in zip(optimum, ETA)]), SOFT, by=.0691)


@equation(30)
def _():
    tau, labels = .5, [1, 0, 2, 2]
    s = [l/tau - math.log(e) for l, e in zip(S, ETA)]
    call = lambda target: losses.soft_distribution_info_nce(t([S]), t([target]), noise_probs=t(ETA), temperature=tau,
                                                            noise_samples=torch.tensor(labels[1:]),
                                                            generator=torch.Generator().manual_seed(0))
    holds(call(delta(1)), eq5(s, labels))                             # one label is possible
    fails(eq5(s, labels, tau), call(delta(1)), by=.05824)                 # temperature twice, as printed
    # a soft target: the loss of the label that was drawn
    values = [eq5(s, [k, *labels[1:]]) for k in range(3)]
    assert min(abs(call(SOFT).item() - v) for v in values) < 1e-12
    repeated = losses.soft_distribution_info_nce(t([S]*20_000), t([SOFT]*20_000), noise_probs=t(ETA), temperature=tau,
                                                 noise_samples=Fresh(1), reduction='none',
                                                 generator=torch.Generator().manual_seed(0))
    # fresh noise is shared by the rows: three labels, three values
    assert repeated.unique().numel() == 3


def package_tuples(positive, labels=one_hot):
    "The package's loss, its mean over every tuple of a positive label from `positive` and two noise labels from ETA."
    def mean_loss(logits):
        return sum(positive[a]*ETA[b]*ETA[c]*losses.soft_distribution_info_nce(
            logits[None], labels(torch.tensor([a]), 3).double(), noise_probs=t(ETA), noise_samples=torch.tensor([b, c]),
            generator=torch.Generator().manual_seed(0)) for a, b, c in TRIPLES)
    return mean_loss


def least(mean_loss, steps=7):
    "Newton's method from logits of zero: where a convex loss ends, first entry zero."
    l = torch.zeros(3, dtype=torch.float64)
    for _ in range(steps):
        curvature = torch.autograd.functional.hessian(mean_loss, l) + torch.ones(3, 3)
        l = l - torch.linalg.solve(curvature, gradient(mean_loss, l))
    return l - l[0]


@equation(31)
def _():
    # (1-eps) p/xi + eps by hand for p = (.6, .3, .1), xi = (.5, .2, .3), eps = .2, and where training the package ends
    limit = [1.16, 1.4, 7/15]
    found = least(package_tuples([.58, .28, .14]))
    scores = (found - t(ETA).log()).exp()
    holds(scores/scores.sum(), [v/sum(limit) for v in limit], tol=1e-10)
    # times xi, after normalisation, it is (1-eps) p + eps xi: the read-out
    module = losses.SoftDistributionInfoNCE(noise_probs=t(ETA), noise_samples=Fresh(2))
    holds(module.probs(found[None] + 2.)[0], [.58, .28, .14], tol=1e-10)
    fails(scores*t(ETA)*math.exp(2.)/(scores*t(ETA)).sum(), [.58, .28, .14], by=3.706)  # not before it
    # labels that are not smoothed end at p/xi
    scores = (least(package_tuples(P)) - t(ETA).log()).exp()
    holds(scores/scores.sum(), [v/sum(RATIO) for v in RATIO], tol=1e-10)
    fails(scores/scores.sum(), [v/sum(limit) for v in limit], by=.0443)


# ---------------------------------------------------------------- Eqs. (32)-(38)
@equation(32)
def _():  # the definition, used in Eq. (33)
    by_hand = [[(1 - EPS)*given_z(JOINT)[z][y] + EPS*py(JOINT)[y] for y in range(3)] for z in range(2)]
    holds(given_z(soften(JOINT, EPS)), by_hand)
    holds(smooth(t(given_z(JOINT)), EPS, t(py(JOINT))), by_hand)


@equation(33)
def _():
    for table, eps in itertools.product(TABLES, (0., EPS, 1.)):
        soft = soften(table, eps)
        holds(information.soft_joint(t(table), eps), soft)
        # a joint with the same marginals
        holds((sum(map(sum, soft)), *pz(soft), *py(soft)), (1., *pz(table), *py(table)))
    xi = [.1, .2, .7]
    holds(information.soft_joint(t(JOINT), EPS, t(xi)), soften(JOINT, EPS, xi))
    # with other noise the label marginal moves
    fails(py(soften(JOINT, EPS, xi)), py(JOINT), by=.08)


def eq35(soft, n):
    r = ratios(soft)
    return mean_over_tuples(soft, n, lambda z, ys: math.log(1 + sum(r[z][y] for y in ys[1:])/r[z][ys[0]]))


def eq36(soft, n):
    r = ratios(soft)
    expected = [sum(py(soft)[y]*r[z][y] for y in range(len(r[z]))) for z in range(len(r))]
    return mean(soft, lambda z, y: math.log(1 + n*expected[z]/r[z][y]))


def eq37(soft, n): return mean(soft, lambda z, y: math.log(1 + n/ratios(soft)[z][y]))
def eq38(soft, n, candidates=False):
    return math.log(n + candidates) - mean(soft, lambda z, y: math.log(ratios(soft)[z][y]))


@equation(34)
def _():
    soft, fine = soften(JOINT, EPS), soften(FINE, EPS)
    best = best_loss(soft, 2)
    holds(critic_loss(soft, 2)(t(ratios(soft)).log()), best)                           # equality at the best critic
    holds(information.optimal_info_nce(t(JOINT), EPS, 2), best)
    for seed in range(5):                                                              # and no critic does better
        critic = t(ratios(soft)).log() + .3*torch.randn(
            2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert critic_loss(soft, 2)(critic) > best
    # with x for z, as printed: true, but out of reach of a critic of z
    fails(best_loss(fine, 2), best, by=.05181)
    assert best_loss(fine, 2) < best


@equation(35)
def _():
    for table, n in itertools.product((JOINT, DETERMINISTIC), (1, 2, 3)):
        holds(eq35(soften(table, EPS), n), best_loss(soften(table, EPS), n))
        holds(information.optimal_info_nce(t(table), EPS, n), eq35(soften(table, EPS), n))


@equation(36)
def _():
    soft = soften(JOINT, EPS)
    # Jensen goes up: no step of a lower bound
    for n in (1, 2, 4): assert eq36(soft, n) > eq35(soft, n) > eq38(soft, n, candidates=True)
    fails(eq36(soft, 1), eq35(soft, 1), by=.02691)


@equation(37)
def _():
    for table, n in itertools.product(TABLES, (1, 2, 16)):
        holds(eq37(soften(table, EPS), n), eq36(soften(table, EPS), n))


@equation(38)
def _():
    for table, eps, n in itertools.product((JOINT, DETERMINISTIC), (0., EPS, 1.), (1, 2, 4)):
        soft = soften(table, eps)
        # what holds: log(N+1)
        assert eq37(soft, n) > eq38(soft, n) and eq35(soft, n) >= eq38(soft, n, candidates=True) - 1e-13 > eq38(soft, n)
    soft = soften(JOINT, 1.)
    holds(eq35(soft, 4), eq38(soft, 4, candidates=True))
    fails(eq38(soft, 4), eq35(soft, 4), by=math.log(5/4))


# ---------------------------------------------------------------- Eqs. (39)-(53), term by term
def terms(table, eps):
    "The terms of Eqs. (39)-(49), each a list of its summands as printed, for tables without zeros."
    soft, free, cond, label = soften(table, eps), product(table), given_z(table), py(table)
    mix = lambda z, y: (1 - eps)*cond[z][y] + eps*label[y]
    a, b = lambda z, y: math.log(cond[z][y]/label[y]), lambda z, y: math.log(mix(z, y)/cond[z][y])
    I, H, H_y = information_of(table), entropy_given_z(table), entropy(label)
    log_mix = mean(soft, lambda z, y: math.log(mix(z, y)))
    return {39: [mean(soft, lambda z, y: math.log(mix(z, y)/label[y]))],
            40: [mean(soft, a), mean(soft, lambda z, y: math.log(1 - eps + eps*label[y]/cond[z][y]))],
            41: [(1 - eps)*mean(table, a), eps*mean(free, a)], 42: [mean(soft, b)],
            43: [(1 - eps)*I, (1 - eps)*mean(table, b)], 44: [eps*mean(free, a), eps*mean(free, b)],
            45: [(1 - eps)*I, (1 - eps)*mean(table, b), eps*mean(free, lambda z, y: math.log(mix(z, y)/label[y]))],
            46: [(1 - eps)*(I + H), log_mix, eps*H_y], 47: [(1 - eps)*(I + H), log_mix],
            48: [eps*(I + H)], 49: [I + H, log_mix]}


LINES = {39: (39,), 40: (40,), 41: (41, 42), 42: (41, 42), 43: (43, 44), 44: (43, 44), 45: (45,), 46: (46,),
         47: (47, 48), 48: (47, 48), 49: (49,)}


def line(number, table, eps): return sum(sum(terms(table, eps)[n]) for n in LINES[number])


def check_line(number):
    "A line equals the information under the smoothed joint, computed on its own."
    def check():
        for table, eps in itertools.product((JOINT, FINE, SKEWED), (0., EPS, .9)):
            holds(line(number, table, eps), information_of(soften(table, eps)))
            holds(line(number, table, eps), information.soft_information(t(table), eps))
        if number in INFINITE: check_infinite(number)
        if number in FINITE: check_finite(number)
    return check


def with_zeros(number, table, eps):
    "The summands of a line where a conditional may be zero: log 0 and log(1/0) are infinite, as float64 has them."
    free, cond, label = t(product(table)), t(given_z(table)), t(py(table))
    soft, p = t(soften(table, eps)), t(table)
    mix = (1 - eps)*cond + eps*label
    sums = lambda w, v: torch.where(w > 0, w*v, 0.).sum()
    a, b = (cond/label).log(), (mix/cond).log()
    return {40: [sums(soft, a), sums(soft, (1 - eps + eps*label/cond).log())],
            41: [(1 - eps)*sums(p, a), eps*sums(free, a)], 42: [sums(soft, b)],
            43: [(1 - eps)*(sums(p, a) + sums(p, b))], 44: [eps*sums(free, a), eps*sums(free, b)],
            45: [(1 - eps)*(sums(p, a) + sums(p, b)), eps*sums(free, (mix/label).log())],
            46: [(1 - eps)*entropy(py(table)) + sums(soft, mix.log()) + eps*entropy(py(table))],
            49: [entropy(py(table)) + sums(soft, mix.log())]}[number]


INFINITE, FINITE = (40, 41, 42, 44), (43, 45, 46, 49)


def check_infinite(number):
    "Deterministic labels: the line as printed has an infinite summand, so its value is inf - inf."
    assert any(v.isinf() for v in with_zeros(number, DETERMINISTIC, EPS))
    if number in (40, 44): assert sum(with_zeros(number, DETERMINISTIC, EPS)).isnan()
    if number in (41, 42): assert sum(with_zeros(41, DETERMINISTIC, EPS) + with_zeros(42, DETERMINISTIC, EPS)).isnan()
    free, soft, label = t(product(DETERMINISTIC)), t(soften(DETERMINISTIC, EPS)), t(py(DETERMINISTIC))
    # the logarithms added first, Eq. (39): finite
    combined = (soft*(soft/free).log()).sum()
    holds(information.mutual_information(information.soft_joint(t(DETERMINISTIC), EPS)), combined)
    # approached from tables without zeros: the infinite parts cancel
    close = t(soften(DETERMINISTIC, 1e-13)).tolist()
    holds(line(number, close, EPS), combined, tol=1e-10)
    assert label.sum() == 1


def check_finite(number):
    "These lines, and all after (44), need no limit."
    summands = with_zeros(number, DETERMINISTIC, EPS)
    assert all(v.isfinite() for v in summands)
    if number != 43: holds(sum(summands), information_of(soften(DETERMINISTIC, EPS)))


for number in range(39, 50): equation(number)(check_line(number))


@equation(50)
def _():  # Eq. (17) again, used in Eq. (51): minus the expectation in Eq. (49)
    for table in (JOINT, FINE): holds(-terms(table, EPS)[49][1], information.soft_conditional_entropy(t(table), EPS))


def by_scipy(table, eps):
    "I(Z;Y) + H(Y|Z) and H_eps(Y|Z) of a table, by SciPy's entropies."
    soft, label, weight = np.array(soften(table, eps)), np.array(py(table)), np.array(pz(table))
    rows = scipy.stats.entropy(soft/soft.sum(1, keepdims=True), axis=1)
    return scipy.stats.entropy(label), float(weight @ rows)


def package_loss(table, eps, n, tilt=0.):
    "The mean over tuples of the package's InfoNCE with a critic: the true ratio, tilted."
    soft, label = soften(table, eps), py(table)
    logits = t([[math.log(v) + tilt*y for y, v in enumerate(row)] for row in given_z(soft)])
    def of_tuple(z, ys):
        return losses.info_nce(logits[[z]], torch.tensor([ys[0]]), noise_probs=t(label),
                               noise_samples=torch.tensor(ys[1:])).item()
    return mean_over_tuples(soft, n, of_tuple, label)


@equation(51)
def _():
    for eps, n, tilt in itertools.product((0., EPS, .9), (1, 3), (0., .5)):
        entropy_of_labels, conditional = by_scipy(JOINT, eps)
        left, loss = entropy_of_labels - conditional, package_loss(JOINT, eps, n, tilt)
        holds(information.soft_information(t(JOINT), eps), left)
        bound = information.info_nce_bound(loss, n)
        assert bound <= left + 1e-13
        holds(bound, math.log(n + 1) - loss)
        if not tilt: holds(information.optimal_info_nce(t(JOINT), eps, n), loss)
        if tilt: assert bound < information.info_nce_bound(package_loss(JOINT, eps, n), n) - 1e-3
    # no larger constant will do: where labels say nothing, log(N+2) is above the left side
    loss, (entropy_of_labels, conditional) = package_loss(JOINT, 1., 3), by_scipy(JOINT, 1.)
    fails(math.log(5) - loss, entropy_of_labels - conditional, by=math.log(5/4))


@equation(52)
def _():
    for table, eps in itertools.product(TABLES, (EPS, .7)):
        _, conditional = by_scipy(table, eps)
        soft = np.array(soften(table, eps))
        holds(scipy.stats.entropy(soft.ravel()) - scipy.stats.entropy(soft.sum(1)), conditional)
        holds(information.soft_conditional_entropy(t(table), eps), conditional)
    # H(X) as printed: four x, of which z merges two by two, all equally likely
    with_x = scipy.stats.entropy(np.array(soften(JOINT, EPS)).ravel()) - scipy.stats.entropy([.25]*4)
    fails(with_x, information.soft_conditional_entropy(t(JOINT), EPS), by=.6931)


@equation(53)
def _():
    for table, eps in itertools.product(TABLES, (0., EPS, 1.)):
        soft = soften(table, eps)
        assert entropy([v for row in soft for v in row]) <= entropy(py(table)) + entropy(pz(table)) + 1e-14
        assert information.soft_information(t(table), eps) >= -1e-14
    soft = soften(SKEWED, .5, [.5, .5])  # uniform noise: H_eps exceeds H(Y)
    fails(entropy(py(SKEWED)) - entropy_given_z(soft), 0., by=.2858)
    assert entropy_given_z(soft) > entropy(py(SKEWED))
