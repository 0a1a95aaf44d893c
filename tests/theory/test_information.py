"""softnce.theory.information: Eqs. (14)-(18) and (32)-(53) against literal loops over tuples, an integral, values by
hand and limits."""
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from softnce.theory import information
from softnce.theory.information import (conditional_entropy, info_nce_bound, mutual_information, optimal_info_nce,
                                        soft_conditional_entropy, soft_information, soft_joint)

TABLES = {
    'example': [[.32, .13, .05], [.05, .20, .25]],
    'peaked': [[.50, .01, .02], [.03, .04, .40]],
    'zero cells': [[.30, 0., .10], [0., .35, .25]],
    'deterministic': [[.2, 0., 0.], [0., .3, 0.], [0., 0., .5]],
    'independent': np.outer([.3, .7], [.2, .5, .3]).tolist(),
    'empty row and label': [[.4, .1, 0.], [0., 0., 0.], [.1, .4, 0.]],
}
EPS, NUM = (0., .2, .7, 1.), (1, 2, 3)
tables = pytest.mark.parametrize('name', TABLES)
epsilons = pytest.mark.parametrize('eps', EPS)


def tensor(x): return torch.tensor(x, dtype=torch.float64)


def close(got, wanted, tol=1e-12):
    assert isinstance(got, torch.Tensor) and got.dtype == torch.float64 and got.shape == ()
    assert abs(got.item() - wanted) <= tol, (got.item(), wanted)


# ---------------------------------------------------------------- oracles: plain Python, one loop for each sum
def marginals(t): return [sum(row) for row in t], [sum(col) for col in zip(*t, strict=True)]


def cells(t): return [(z, y) for z in range(len(t)) for y in range(len(t[0]))]


def smoothed(t, eps, xi=None):
    pz, py = marginals(t)
    return [[(1-eps)*t[z][y] + eps*pz[z]*(py if xi is None else xi)[y] for y in range(len(py))] for z in range(len(pz))]


def information_of(t):
    pz, py = marginals(t)
    return sum(t[z][y]*math.log(t[z][y]/(pz[z]*py[y])) for z, y in cells(t) if t[z][y] > 0)


def entropy_given_z(t):
    pz, _ = marginals(t)
    return -sum(t[z][y]*math.log(t[z][y]/pz[z]) for z, y in cells(t) if t[z][y] > 0)


def ratios(soft, eta):
    pz, _ = marginals(soft)
    return [[soft[z][y]/(pz[z]*eta[y]) if soft[z][y] > 0 else 0. for y in range(len(eta))] for z in range(len(pz))]


def over_tuples(soft, eta, num_noise, value):
    "Mean of value(z, labels) over all tuples of the positive and the noise labels."
    total = 0.
    for z, y in cells(soft):
        for noise in itertools.product(range(len(eta)), repeat=num_noise):
            weight = soft[z][y]*math.prod(eta[k] for k in noise)
            if weight > 0: total += weight*value(z, (y, *noise))
    return total


def loss_by_tuples(soft, eta, num_noise, critic=None):
    c = critic or ratios(soft, eta)
    return over_tuples(soft, eta, num_noise, lambda z, t: -math.log(c[z][t[0]]/sum(c[z][k] for k in t)))


def loss_by_integral(soft, eta, num_noise):
    """log a is the integral of (exp(-t) - exp(-a t))/t, so the mean over noise labels factorises: no enumeration at any
    N. On t = exp(u)."""
    u = np.arange(-46, 9, .02)
    t, total, c = np.exp(u), 0., ratios(soft, eta)
    for z, y in cells(soft):
        if soft[z][y] == 0: continue
        noise = sum(e*np.exp(-t*r) for e, r in zip(eta, c[z], strict=True))
        total += soft[z][y]*(.02*np.sum(np.exp(-t) - np.exp(-t*c[z][y])*noise**num_noise) - math.log(c[z][y]))
    return total


# ---------------------------------------------------------------- information and entropies
@tables
@epsilons
def test_information_and_entropies_are_the_sums(name, eps):
    t = TABLES[name]
    soft = smoothed(t, eps)
    torch.testing.assert_close(soft_joint(tensor(t), eps), tensor(soft), rtol=0, atol=1e-15)
    close(mutual_information(tensor(soft)), information_of(soft))
    close(conditional_entropy(tensor(soft)), entropy_given_z(soft))
    close(soft_conditional_entropy(tensor(t), eps), entropy_given_z(soft))
    close(soft_information(tensor(t), eps), information_of(soft))


@tables
def test_entropies_are_scipys(name):
    t = np.array(TABLES[name])
    close(conditional_entropy(tensor(TABLES[name])), entropy(t.ravel()) - entropy(t.sum(1)))
    close(mutual_information(tensor(TABLES[name])), entropy(t.sum(0)) + entropy(t.sum(1)) - entropy(t.ravel()))


def test_values_by_hand():
    fair, flipped = tensor([[.5, 0.], [0., .5]]), tensor([[.375, .125], [.125, .375]])
    close(mutual_information(fair), math.log(2))
    close(conditional_entropy(fair), 0.)
    assert math.copysign(1, conditional_entropy(fair).item()) == 1    # 0, not -0
    flip = 2*math.log(2) - .75*math.log(3)                              # entropy of (3/4, 1/4)
    close(conditional_entropy(flipped), flip)
    # smoothing by 1/2 flips a fair coin with probability 1/4
    close(soft_conditional_entropy(fair, .5), flip)
    close(soft_information(fair, .5), math.log(2) - flip)
    close(optimal_info_nce(fair, 0., 1), math.log(2)/2)                # the noise label is the same half of the time


@epsilons
def test_smoothing_with_another_noise(eps):
    t, xi = TABLES['zero cells'], [.1, .1, .8]
    soft = smoothed(t, eps, xi)
    torch.testing.assert_close(soft_joint(tensor(t), eps, tensor(xi)), tensor(soft), rtol=0, atol=1e-15)
    close(soft_conditional_entropy(tensor(t), eps, tensor(xi)), entropy_given_z(soft))
    close(soft_information(tensor(t), eps, tensor(xi)), information_of(t) + entropy_given_z(t) - entropy_given_z(soft))


@tables
def test_smoothing_with_the_marginal_said_or_not(name):
    joint = tensor(TABLES[name])
    torch.testing.assert_close(soft_joint(joint, .3), soft_joint(joint, .3, joint.sum(0)), rtol=0, atol=1e-15)
    torch.testing.assert_close(soft_joint(joint, 0.), joint, rtol=0, atol=1e-15)
    torch.testing.assert_close(soft_joint(joint, 1.), joint.sum(1, keepdim=True)*joint.sum(0), rtol=0, atol=1e-15)


def test_single_precision_comes_out_in_double():
    joint = tensor(TABLES['example']).float()
    for got, wanted in ((mutual_information(joint), information_of(TABLES['example'])),
                        (optimal_info_nce(joint, .2, 2), None)):
        assert got.dtype == torch.float64
        if wanted is not None: assert abs(got - wanted) < 1e-6
    # rounding of the input is taken out
    assert soft_joint((joint.double()*(1 + 5e-5)).float(), .2).sum().item() == pytest.approx(1, abs=1e-12)


# ---------------------------------------------------------------- the optimal loss
@tables
@epsilons
@pytest.mark.parametrize('num_noise', NUM)
def test_optimal_loss_by_tuples(name, eps, num_noise):
    soft = smoothed(TABLES[name], eps)
    close(optimal_info_nce(tensor(TABLES[name]), eps, num_noise), loss_by_tuples(soft, marginals(soft)[1], num_noise))


@tables
@epsilons
@pytest.mark.parametrize('num_noise', [1, 4, 16, 200])
def test_optimal_loss_by_integral(name, eps, num_noise):
    soft = smoothed(TABLES[name], eps)
    close(optimal_info_nce(tensor(TABLES[name]), eps, num_noise), loss_by_integral(soft, marginals(soft)[1], num_noise),
          1e-11)


@pytest.mark.parametrize('num_noise', NUM)
def test_optimal_loss_with_other_noise_and_negatives(num_noise):
    t, xi, eta = TABLES['example'], [.1, .1, .8], [.5, .3, .2]
    soft = smoothed(t, .3, xi)
    close(optimal_info_nce(tensor(soft), 0., num_noise, tensor(eta)), loss_by_tuples(soft, eta, num_noise))
    close(optimal_info_nce(tensor(t), .3, num_noise, negatives=tensor(eta)),
          loss_by_tuples(smoothed(t, .3), eta, num_noise))


@pytest.mark.parametrize('k', [1, 2, 4, 5])
@pytest.mark.parametrize('num_noise', [1, 5, 8])
def test_deterministic_balanced_labels_by_hand(k, num_noise):
    "The ratio is K or 0, so the loss is the mean of log(1+B), B ~ Binomial(N, 1/K)."
    wanted = sum(math.comb(num_noise, b)*(1/k)**b*(1-1/k)**(num_noise-b)*math.log(1+b) for b in range(num_noise+1))
    close(optimal_info_nce(torch.eye(k, dtype=torch.float64)/k, 0., num_noise), wanted)


def test_count_vectors_are_all_multisets():
    for total, parts in ((0, 3), (4, 1), (5, 2), (4, 3), (3, 4)):
        got = information.count_vectors(total, parts).tolist()
        wanted = [c for c in itertools.product(range(total+1), repeat=parts) if sum(c) == total]
        assert sorted(map(tuple, got)) == wanted


@tables
@epsilons
def test_no_critic_does_better(name, eps):
    soft, best = smoothed(TABLES[name], eps), optimal_info_nce(tensor(TABLES[name]), eps, 2).item()
    eta = marginals(soft)[1]
    optimum, draws = ratios(soft, eta), torch.randn(5, len(soft), 3).exp().tolist()
    for d in draws:
        critic = [[c*x if c > 0 else x for c, x in zip(row, noise, strict=True)]
                  for row, noise in zip(optimum, d, strict=True)]
        assert loss_by_tuples(soft, eta, 2, critic) >= best - 1e-12


# ---------------------------------------------------------------- the bound
def test_bound_is_the_constant_minus_the_loss():
    assert info_nce_bound(.5, 4) == math.log(5) - .5
    assert info_nce_bound(.5, 4, as_printed=True) == math.log(4) - .5
    torch.testing.assert_close(info_nce_bound(tensor([.5, 1.]), 1), tensor([math.log(2) - .5, math.log(2) - 1]),
                               rtol=0, atol=0)


@tables
@epsilons
def test_bound_holds_and_rises_with_the_number_of_negatives(name, eps):
    joint = tensor(TABLES[name])
    truth = mutual_information(soft_joint(joint, eps))
    bounds = torch.stack([info_nce_bound(optimal_info_nce(joint, eps, n), n) for n in (1, 2, 4, 8, 16, 64)])
    assert (bounds <= truth + 1e-12).all() and (bounds.diff() >= -1e-12).all()
    if truth > 1e-3: assert (bounds.diff() > 1e-6).all() and truth - bounds[-1] < .05
    for n in (1, 4, 16):
        printed = info_nce_bound(optimal_info_nce(joint, eps, n), n, as_printed=True)
        assert printed < truth - math.log(1+1/n) + 1e-12                 # never tight


@pytest.mark.parametrize('num_noise', [1, 4, 16])
def test_bound_is_tight_where_z_tells_nothing(num_noise):
    for name, eps in (*((name, 1.) for name in TABLES), ('independent', 0.), ('independent', .2)):
        close(optimal_info_nce(tensor(TABLES[name]), eps, num_noise), math.log(num_noise+1))
        close(info_nce_bound(optimal_info_nce(tensor(TABLES[name]), eps, num_noise), num_noise), 0.)


def test_gap_is_chi_square_over_twice_the_candidates():
    t = smoothed(TABLES['example'], .2)
    pz, py = marginals(t)
    chi2 = sum(pz[z]*py[y]*(t[z][y]/(pz[z]*py[y]) - 1)**2 for z, y in cells(t))
    gap = information_of(t) - info_nce_bound(optimal_info_nce(tensor(t), 0., 1500), 1500).item()
    assert gap*2*1501 == pytest.approx(chi2, rel=1e-3)


@tables
def test_monotone_in_epsilon(name):
    joint, grid = tensor(TABLES[name]), np.linspace(0, 1, 11)
    loss = torch.stack([optimal_info_nce(joint, e, 4) for e in grid])
    left = torch.stack([soft_information(joint, e) for e in grid])
    entropies = torch.stack([soft_conditional_entropy(joint, e) for e in grid])
    assert (loss.diff() >= -1e-12).all() and (left.diff() <= 1e-12).all() and (entropies.diff() >= -1e-12).all()
    assert (left <= (1 - tensor(grid))*mutual_information(joint) + 1e-12).all()   # convexity
    if name != 'independent': assert (loss.diff() > 1e-6).all() and (left.diff() < -1e-6).all()


# ---------------------------------------------------------------- one check for each equation
class Case:
    "One table, smoothing and N; the parts of the equations, by loops (no zero cells: every printed term is finite)."
    def __init__(self, name, eps, num_noise):
        self.t, self.eps, self.n, self.joint = TABLES[name], eps, num_noise, tensor(TABLES[name])
        self.pz, self.py = marginals(self.t)
        self.soft = smoothed(self.t, eps)
        self.free = [[a*b for b in self.py] for a in self.pz]
        self.p = [[v/a for v in row] for row, a in zip(self.t, self.pz, strict=True)]
        self.p_eps = [[v/a for v in row] for row, a in zip(self.soft, self.pz, strict=True)]
        self.r = [[v/b for v, b in zip(row, self.py, strict=True)] for row in self.p_eps]
        self.I, self.H = information_of(self.t), entropy_given_z(self.t)
        self.H_y = -sum(b*math.log(b) for b in self.py)
        self.I_eps = information_of(self.soft)
        self.H_eps = soft_conditional_entropy(self.joint, eps).item()
        self.loss = optimal_info_nce(self.joint, eps, num_noise).item()
        self.left = soft_information(self.joint, eps).item()
    def mean(self, law, value): return sum(law[z][y]*value(z, y) for z, y in cells(law))
    def tuples(self, value): return over_tuples(self.soft, self.py, self.n, value)
    def log_ratio(self): return self.mean(self.soft, lambda z, y: math.log(self.r[z][y]))
    def log_p(self): return self.mean(self.soft, lambda z, y: math.log(self.p_eps[z][y]))
    def a(self, law): return self.mean(law, lambda z, y: math.log(self.p[z][y]/self.py[y]))
    def b(self, law):
        return self.mean(law, lambda z, y: math.log(((1-self.eps)*self.p[z][y] + self.eps*self.py[y])/self.p[z][y]))
    def eq35(self): return self.tuples(lambda z, t: math.log(1 + sum(self.r[z][k] for k in t[1:])/self.r[z][t[0]]))
    def eq36(self):
        inner = [sum(b*r for b, r in zip(self.py, row, strict=True)) for row in self.r]
        return self.mean(self.soft, lambda z, y: math.log(1 + self.n*inner[z]/self.r[z][y]))
    def eq37(self): return self.mean(self.soft, lambda z, y: math.log(1 + self.n/self.r[z][y]))


def same(*values): assert max(values) - min(values) < 1e-12, values


def eq14(c):
    scores = tensor(c.r).log().requires_grad_()
    terms = [c.soft[z][t[0]]*math.prod(c.py[k] for k in t[1:])*(scores[z, list(t)].logsumexp(0) - scores[z, t[0]])
             for z in range(len(c.pz)) for t in itertools.product(range(3), repeat=c.n+1)]
    loss = sum(terms)
    gradient, = torch.autograd.grad(loss, scores)
    same(loss.item(), c.loss)
    assert gradient.abs().max() < 1e-13

def eq15(c):
    assert c.loss >= math.log(c.n+1) - c.log_ratio() - 1e-12
    assert c.loss > math.log(c.n) - c.log_ratio()                        # as printed, never tight

def eq16(c): same(c.log_ratio(), c.I + c.H - c.H_eps, c.left)
def eq17(c): same(c.H_eps, -c.log_p())

def eq18(c):
    assert c.left >= info_nce_bound(c.loss, c.n) - 1e-12 > info_nce_bound(c.loss, c.n, as_printed=True)
    if c.eps == 0: same(c.H_eps, c.H)
    if c.eps == 1:
        same(c.H_eps, c.H_y)
        same(c.left, info_nce_bound(c.loss, c.n), 0.)

def eq32(c):
    got = soft_joint(c.joint, c.eps)
    for z, y in cells(c.t): same((got[z, y]/got[z].sum()).item(), (1-c.eps)*c.p[z][y] + c.eps*c.py[y])

def eq33(c):
    for z, y in cells(c.t): same(soft_joint(c.joint, c.eps)[z, y].item(), (1-c.eps)*c.t[z][y] + c.eps*c.py[y]*c.pz[z])

def eq34(c):
    same(c.loss, c.tuples(lambda z, t: -math.log(c.r[z][t[0]]/sum(c.r[z][k] for k in t))))
    other = [[r**1.5 for r in row] for row in c.r]
    assert loss_by_tuples(c.soft, c.py, c.n, other) >= c.loss - 1e-12

def eq35(c): same(c.eq35(), c.loss)
def eq36(c): assert c.eq36() > c.loss if c.eps < 1 else abs(c.eq36() - c.loss) < 1e-12   # Jensen: the wrong way
def eq37(c): same(c.eq37(), c.eq36())
def eq38(c): assert c.eq37() > math.log(c.n) - c.log_ratio() and c.loss >= math.log(c.n+1) - c.log_ratio() - 1e-12
def eq39(c): same(c.mean(c.soft, lambda z, y: math.log(((1-c.eps)*c.p[z][y] + c.eps*c.py[y])/c.py[y])), c.left)
def eq40(c): same(c.a(c.soft) + c.mean(c.soft, lambda z, y: math.log(1-c.eps+c.eps*c.py[y]/c.p[z][y])), c.left)
def eq41(c): same((1-c.eps)*c.a(c.t) + c.eps*c.a(c.free), c.a(c.soft))
def eq42(c): same((1-c.eps)*c.a(c.t) + c.eps*c.a(c.free) + c.b(c.soft), c.left)
def eq43(c): same((1-c.eps)*(c.I + c.b(c.t)), (1-c.eps)*(c.a(c.t) + c.b(c.t)))
def eq44(c): same((1-c.eps)*(c.I + c.b(c.t)) + c.eps*(c.a(c.free) + c.b(c.free)), c.left)
def eq45(c): same((1-c.eps)*(c.I + c.b(c.t)) + c.eps*c.mean(c.free, lambda z, y: math.log(c.r[z][y])), c.left)
def eq46(c): same((1-c.eps)*(c.I + c.H) + c.log_p() + c.eps*c.H_y, c.left)
def eq47(c): same((1-c.eps)*(c.I + c.H) + c.log_p() + c.eps*(c.I + c.H), c.left)
def eq48(c): same(c.I + c.H, c.H_y)
def eq49(c): same(c.I + c.H + c.log_p(), c.left, c.I_eps)
def eq50(c): same(c.H_eps, -c.mean(c.soft, lambda z, y: math.log(c.p_eps[z][y])))
def eq51(c): eq18(c)
def eq52(c): same(c.H_eps, entropy(np.array(c.soft).ravel()) - entropy(c.pz))          # H(Z), printed as H(X)
def eq53(c): assert c.H_eps <= c.H_y + 1e-12 and c.left >= -1e-12


EQUATIONS = {int(name[2:]): f for name, f in list(globals().items()) if name[:2] == 'eq' and name[2:].isdigit()}


@pytest.mark.parametrize('number', [*range(14, 19), *range(32, 54)])
def test_equation(number):
    for name, eps, n in itertools.product(('example', 'peaked'), EPS, NUM): EQUATIONS[number](Case(name, eps, n))


OF_THE_PAPER = {37, 41, 43, 48}  # between terms of the paper that no function here computes: by loops, on both sides


@pytest.mark.parametrize('number', EQUATIONS)
def test_an_equation_sees_a_wrong_function(number, monkeypatch):
    "With one function a little off, or with too large a constant in the bound, the check of an equation fails."
    def off(f, by=.001): return lambda *args, **given: f(*args, **given) + by
    mutants = {f.__name__: off(f) for f in (soft_joint, soft_information, soft_conditional_entropy)}
    mutants['optimal_info_nce'] = off(optimal_info_nce, -.1)  # below the optimum
    mutants['info_nce_bound'] = lambda loss, n, as_printed=False: math.log(n+2) - loss
    seen = set()
    for name, mutant in mutants.items():
        with monkeypatch.context() as patch:
            patch.setitem(globals(), name, mutant)
            try: test_equation(number)
            except AssertionError: seen.add(name)
    assert bool(seen) == (number not in OF_THE_PAPER)


# ---------------------------------------------------------------- where the printed equations do not hold
def test_another_noise_than_the_label_marginal():
    "xi uniform, p(y) = (.9, .1), z independent: (16) and (18) fail as printed, and the left side is negative."
    joint, uniform, py = tensor([[.45, .05], [.45, .05]]), tensor([.5, .5]), [.9, .1]
    soft = smoothed(joint.tolist(), .5, [.5, .5])                        # labels (.7, .3)
    left = soft_information(joint, .5, uniform)
    close(left, entropy(py) - entropy([.7, .3]))
    loss = optimal_info_nce(tensor(soft), 0., 16, tensor(py))
    close(loss, loss_by_integral(soft, py, 16), 1e-11)
    assert left < 0 < info_nce_bound(loss, 16, as_printed=True) < info_nce_bound(loss, 16) < entropy([.7, .3], py)
    # negatives from another distribution: information where there is none
    flat = optimal_info_nce(joint, 0., 16, uniform)
    assert info_nce_bound(flat, 16) > .3 and abs(mutual_information(joint)) < 1e-15


@pytest.mark.parametrize('eps', [.1, .5, 1.])
@pytest.mark.parametrize('num_noise', [1, 4, 16])
def test_negatives_from_the_smoothed_marginal_suit_every_noise(eps, num_noise):
    soft = smoothed(TABLES['peaked'], eps, [.1, .1, .8])
    assert info_nce_bound(optimal_info_nce(tensor(soft), 0., num_noise), num_noise) <= information_of(soft) + 1e-12


def test_inputs_know_more_than_their_representation():
    "Eq. (34) with x instead of z is a smaller number; Eq. (52) with H(X) is not H_eps(Y|Z)."
    x = [[.20, .03, .02], [.12, .10, .03], [.03, .17, .05], [.02, .03, .20]]
    assert optimal_info_nce(tensor(x), .2, 4) < optimal_info_nce(tensor(TABLES['example']), .2, 4) - .05
    soft = np.array(smoothed(TABLES['example'], .2)).ravel()
    close(soft_conditional_entropy(tensor(TABLES['example']), .2), entropy(soft) - entropy(np.sum(x, 1)) + math.log(2))


def test_one_tuple_can_lie_below_the_bound():
    soft = smoothed(TABLES['example'], .2)
    r = ratios(soft, marginals(soft)[1])
    smallest = min(math.log(sum(r[z][k] for k in t)/r[z][t[0]]) for z in range(2)
                   for t in itertools.product(range(3), repeat=3))
    assert smallest < math.log(2) - information_of(soft)


def test_deterministic_labels_are_the_limit():
    joint = tensor(TABLES['deterministic'])
    for f in (lambda j: soft_information(j, .2), lambda j: optimal_info_nce(j, .2, 4),
              lambda j: optimal_info_nce(j, 0., 4), mutual_information, conditional_entropy):
        close(f(soft_joint(joint, 1e-13)), f(joint).item(), 1e-10)


# ---------------------------------------------------------------- errors
GOOD, NAN = tensor(TABLES['example']), math.nan
BAD = {'a tensor': [[.5, .5]], r'shape \(Z, K\), got \(6,\)': GOOD.ravel(),
       'floating point': torch.ones(1, 1, dtype=torch.long),
       'finite': torch.where(GOOD == .05, NAN, GOOD), 'negative': tensor([[1.1, -.1]]), 'sum to 1, got 0.99': .99*GOOD,
       'sum to 1, got 0': torch.zeros(0, 3)}


@pytest.mark.parametrize('message', BAD)
def test_refused_joints(message):
    for f in (mutual_information, conditional_entropy, lambda j: soft_joint(j, .1),
              lambda j: soft_conditional_entropy(j, .1), lambda j: soft_information(j, .1),
              lambda j: optimal_info_nce(j, .1, 2)):
        with pytest.raises(ValueError, match=f'joint must .*{message}'): f(BAD[message])


@pytest.mark.parametrize('eps', [-.1, 1.1, NAN])
def test_refused_epsilon(eps):
    for f in (soft_joint, soft_conditional_entropy, soft_information, lambda j, e: optimal_info_nce(j, e, 2)):
        with pytest.raises(ValueError, match=r'epsilon must be in \[0, 1\]'): f(GOOD, eps)


@pytest.mark.parametrize('num_noise', [0, -1, 1.5, None])
def test_refused_number_of_negatives(num_noise):
    with pytest.raises(ValueError, match='num_noise must be an integer, at least 1'):
        optimal_info_nce(GOOD, .1, num_noise)
    with pytest.raises(ValueError, match='num_noise must be an integer, at least 1'): info_nce_bound(1., num_noise)


def test_refused_noise_and_negatives():
    for f in (soft_joint, soft_conditional_entropy, soft_information):
        with pytest.raises(ValueError, match='noise must sum to 1'): f(GOOD, .1, tensor([.5, .5, .5]))
        with pytest.raises(ValueError, match=r'noise must have shape \(3,\)'): f(GOOD, .1, tensor([.5, .5]))
    with pytest.raises(ValueError, match='negatives must be positive, got 0 for class 2'):
        optimal_info_nce(GOOD, .1, 2, tensor([.5, .5, 0.]))
    with pytest.raises(ValueError, match=r'negatives must have shape \(3,\)'):
        optimal_info_nce(GOOD, .1, 2, tensor([.5, .5]))
    with pytest.raises(ValueError, match='num_noise must leave at most 2000000 count vectors'):
        optimal_info_nce(torch.full((1, 20), .05), 0., 64)
