"""Identities of the theory page, against literal sums and enumeration: what test_properties.py does not have (C4, C6,
C7, C9, C11, C12, the accumulation and queue of C8), and the functions of softnce.theory.identities."""
import itertools
import math

import mpmath
import pytest
import torch

import oracles as o
from softnce.losses import (InfoNCE, SoftTargetInfoNCE, info_nce, linear_soft_target_info_nce, nll,
                            soft_target_cross_entropy, soft_target_info_nce)
from softnce.noise import ClosedForm, ContinuousCategorical, Queue
from softnce.targets import SparseTargets, mix, smooth
from softnce.theory.identities import (expected_target, log_pair_partition, mixup_law, mixup_probs, optimal_scores,
                                       smoothing_as_temperature)

JOINT = torch.tensor([[.30, .06, .14], [.05, .25, .20]], dtype=torch.float64)   # p(x, y)
PX, PY = JOINT.sum(1), JOINT.sum(0)
P = JOINT/PX[:, None]
EYE = torch.eye(3, dtype=torch.float64)
ZERO = torch.zeros(2, 3, dtype=torch.float64)


def t64(x): return torch.tensor(x, dtype=torch.float64)


def mean_gradient(table, size, loss, probability):
    "Mean of the gradient in the table of logits over all sequences of (x, y) pairs, each with its probability."
    total, second = torch.zeros_like(table), torch.zeros_like(table)
    for batch in itertools.product(itertools.product(range(2), range(3)), repeat=size):
        weight = probability(batch)
        if weight == 0: continue
        l = table.detach().clone().requires_grad_()
        x, y = torch.tensor(batch).T
        (grad,) = torch.autograd.grad(loss(l[x], y), l)
        total, second = total + weight*grad, second + weight*grad**2
    return total, second - total**2


def independent(batch): return math.prod(float(JOINT[x, y]) for x, y in batch)


def nce(eta=PY): return lambda l, y: info_nce(l, y, noise_probs=eta)


# ---------------------------------------------------------------- C2, C5: the exported forms
@pytest.mark.parametrize('eps', [0., .1, .7])
def test_c2_constants_replace_smoothing(eps):
    x, eta, hard = o.logits(5, 4).detach(), o.noise(4), torch.eye(4, dtype=torch.float64)[[0, 3, 1, 1, 2]]
    tau, power = smoothing_as_temperature(eps, .6, eta)
    o.same(o.soft_target_info_nce(x, hard, power, tau), o.soft_target_info_nce(x, (1 - eps)*hard + eps/4, eta, .6))
    o.same(power.sum(), t64(1.))
    assert smoothing_as_temperature(.5, 2.) == (4., None)


@pytest.mark.parametrize('arguments, said', [((1.,), 'epsilon must be in'), ((.1, 0.), 'temperature must be positive'),
                                             ((.1, 1., t64([.5, .6])), 'noise_probs must sum to 1'),
                                             ((.1, 1., t64([1., 0.])), 'noise_probs must be positive')])
def test_c2_refuses(arguments, said):
    with pytest.raises(ValueError, match=said): smoothing_as_temperature(*arguments)


@pytest.mark.parametrize('lam, eps', [(1., 0.), (.3, 0.), (.5, .4), (0., .9)])
def test_c5_counts_of_pairs(lam, eps):
    s, pairs = o.logits(4, 5).detach(), [(0, 1), (0, 1), (1, 0), (2, 2), (4, 0), (4, 0), (4, 0)]
    counts = torch.zeros(5, 5)
    wanted = []
    for a, b in pairs: counts[a, b] += 1
    for row in s:
        terms = [(1 - eps)*(lam*row[a] + (1 - lam)*row[b]) + eps*sum(row)/5 for a, b in pairs]
        wanted.append(o.log_sum_exp(terms))
    o.same(log_pair_partition(s, counts, lam, eps), torch.stack(wanted))
    assert torch.autograd.gradcheck(lambda x: log_pair_partition(x, counts, lam, eps), s.requires_grad_())


@pytest.mark.parametrize('dtype, limit', [(torch.float32, 87), (torch.float64, 708)])
def test_c5_range_is_used_to_its_end_and_not_beyond(dtype, limit):
    counts = torch.zeros(2, 2)
    counts[1, 1] = 3.                                             # only the class with the low score
    s = torch.tensor([[1000., 1000. - (limit - 1)]], dtype=dtype)
    for lam in (1., .5):
        torch.testing.assert_close(log_pair_partition(s, counts, lam), s[:, 1] + math.log(3), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=f'span less than {limit}/'):
        log_pair_partition(s - torch.tensor([0., 2.], dtype=dtype), counts, .5)
    assert log_pair_partition(s - torch.tensor([0., 2.], dtype=dtype), counts, .5, epsilon=.1).isfinite().all()
    with pytest.raises(ValueError, match=r'pair_counts must have shape \(2, 2\)'):
        log_pair_partition(s, torch.ones(3, 3), .5)


# ---------------------------------------------------------------- C4: batch size
@pytest.mark.parametrize('size', [2, 3])
def test_c4_no_bias_at_the_optimum_for_any_batch_size(size):
    "The true conditional, with a shift for each input: the mean gradient over all 6^N batches is zero."
    o.same(mean_gradient(P.log() + t64([[1.], [-3.]]), size, nce(), independent)[0], ZERO)
    assert mean_gradient(torch.zeros(2, 3), size, nce(), independent)[0].abs().max() > 1e-2


def test_c4_a_wrong_eta_tilts_the_logits_and_not_the_scores():
    wrong = t64([.2, .2, .6])
    o.same(mean_gradient((P/PY*wrong).log(), 3, nce(wrong), independent)[0], ZERO)
    assert mean_gradient(P.log(), 3, nce(wrong), independent)[0].abs().max() > 1e-2
    o.same(InfoNCE(noise_probs=PY).probs((P/PY*wrong).log() - wrong.log() + PY.log()), P)


def test_c4_balanced_batches_have_the_same_scores_and_a_shared_input_has_not():
    def balanced(batch):
        if sorted(y for _, y in batch) != [0, 1, 2]: return 0.
        return math.prod(float(JOINT[x, y]/PY[y]) for x, y in batch)/6
    def shared(batch):
        if len({x for x, _ in batch}) > 1: return 0.
        return float(PX[batch[0][0]])*math.prod(float(P[x, y]) for x, y in batch)
    o.same(mean_gradient(P.log(), 3, nce(), balanced)[0], ZERO)
    assert mean_gradient(P.log(), 2, nce(), shared)[0].abs().max() > 1e-2
    o.same(mean_gradient(PY.log().expand(2, 3), 2, nce(), shared)[0], ZERO)          # scores zero


def test_c4_bias_and_variance_to_first_order():
    "Mean and covariance by an independent sum over counts of the other rows' labels, at N where 1/N^2 is small."
    l = t64([[.8, 0., -.5], [0., .3, .1]])
    q = l.softmax(1)

    def residual(x, size):
        "E[P - e_y | x] with N - 1 other labels from p(y)."
        total = torch.zeros(3, dtype=torch.float64)
        for c0 in range(size):
            for c1 in range(size - c0):
                c = [c0, c1, size - 1 - c0 - c1]
                prob = math.exp(math.lgamma(size)
                                + sum(k*math.log(float(e)) - math.lgamma(k + 1) for k, e in zip(c, PY)))
                for y in range(3):
                    w = (t64(c) + EYE[y])/PY*l[x].exp()
                    total = total + prob*P[x, y]*(w/w.sum() - EYE[y])
        return total

    for x in range(2):
        small, large = (n*(residual(x, n) - (q[x] - P[x])) for n in (40, 80))
        gap = (P[x] - q[x])/PY
        wanted = q[x]*(gap - (q[x]*gap).sum())
        torch.testing.assert_close(2*large - small, wanted, rtol=0, atol=3e-3*float(wanted.norm()))
        assert (large - wanted).norm() > 1e-3*wanted.norm()      # the correction itself is no identity


def test_c4_limit_is_the_nll_and_without_noise_the_logit_adjusted_one():
    x, y = o.logits(10, 3).detach(), torch.tensor([0]*5 + [1]*3 + [2]*2)
    freq = t64([.5, .3, .2])
    o.same(info_nce(x, y, noise_probs=freq, reduction='none') - math.log(10),
           nll(x, y, reduction='none') + freq[y].log())
    o.same(info_nce(x, y, reduction='none') - math.log(10), nll(x + freq.log(), y, reduction='none') + freq[y].log())
    many = [info_nce(x, y, noise_probs=freq, noise_samples=y.repeat(m), reduction='none') - math.log(10*(m + 1))
            for m in (0, 9)]
    o.same(many[0], many[1])


# ---------------------------------------------------------------- C6: closed forms
@pytest.mark.parametrize('k', [2, 3, 6])
def test_c6_continuous_categorical_noise_gives_its_log_likelihood(k):
    "E over CC(eta) of exp(alpha.s) is a ratio of two normalisers; both are divided differences of exp, exactly here."
    eta, l, alpha = o.noise(k), o.logits(1, k).detach()[0], o.simplex(1, k)[0]
    s = l - eta.log()
    with mpmath.workdps(60):
        log_eta = [mpmath.log(mpmath.mpf(float(e))) for e in eta]
        shifted = [a + mpmath.mpf(float(b)) for a, b in zip(log_eta, s)]
        ratio = o.divided_difference_series(shifted)/o.divided_difference_series(log_eta)
        loss = float(mpmath.log(ratio)) - float((alpha*s).sum())
    o.same(ContinuousCategorical(eta).log_prob(alpha) - ContinuousCategorical(l.softmax(0)).log_prob(alpha), t64(loss),
           1e-11)


def test_c6_needs_independent_labels_and_one_lam():
    s, eta = o.logits(1, 3).detach(), o.noise(3)
    assert (ClosedForm(.7).log_partition(s, eta) - ClosedForm().log_partition(s, eta)).abs() > 1e-2
    mean = torch.logsumexp(torch.stack([ClosedForm(v).log_partition(s, eta) for v in (.5, .9)]), 0) - math.log(2)
    assert (mean - ClosedForm(.7).log_partition(s, eta)).abs() > 1e-3


def test_c6_hard_noise_is_soft_cross_entropy_and_soft_noise_is_not():
    x, t, eta = o.logits(4, 3), o.simplex(4, 3), o.noise(3)
    offset = (t*eta.log()).sum(1)
    closed = lambda l, **kw: soft_target_info_nce(l, t, noise_probs=eta, noise_samples=ClosedForm(**kw),
                                                  reduction='none')
    o.same_value_and_grad(closed, lambda l: soft_target_cross_entropy(l, t, reduction='none') + offset, x)
    gap = closed(x.detach(), epsilon=.2) - soft_target_cross_entropy(x.detach(), t, reduction='none') - offset
    assert gap.abs().max() > 1e-2


# ---------------------------------------------------------------- C7: the optimum and its read-outs
def newton_by_hand(mean_target, targets, weights, steps=60):
    "The scores with s_K = 0 that solve the rule: K - 1 equations, plain sums, finite differences of nothing."
    k = len(mean_target)
    free = torch.zeros(k - 1, dtype=torch.float64)
    for _ in range(steps):
        s = torch.cat([free, torch.zeros(1, dtype=torch.float64)])
        tilt = [w*math.exp(float((a*s).sum())) for a, w in zip(targets, weights)]
        mean = sum(t*a for a, t in zip(targets, tilt))/sum(tilt)
        second = sum(t*torch.outer(a, a) for a, t in zip(targets, tilt))/sum(tilt)
        step = torch.linalg.solve((second - torch.outer(mean, mean))[:-1, :-1], (mean_target - mean)[:-1])
        free = free + step/max(1., float(step.norm()))
    return s


def per_sample_law(eta, lams, weights, eps):
    "Targets and probabilities, one at a time."
    k, targets, probs = len(eta), [], []
    for lam, w in zip(lams, weights):
        for a, b in itertools.product(range(k), repeat=2):
            row = torch.full((k,), eps/k, dtype=torch.float64)
            row[a] += (1 - eps)*lam
            row[b] += (1 - eps)*(1 - lam)
            targets.append(row)
            probs.append(float(w*eta[a]*eta[b]))
    return targets, probs


@pytest.mark.parametrize('lams, weights, eps', [([1.], [1.], 0.), ([1.], [1.], .3), ([.7], [1.], 0.),
                                                ([1., .8, .5], [.2, .5, .3], .1)])
def test_c7_optimum_of_a_law(lams, weights, eps):
    targets, probs = per_sample_law(PY, lams, weights, eps)
    law = mixup_law(PY, lams, t64(weights), eps)
    o.same(law[0], torch.stack(targets)); o.same(law[1], t64(probs))
    beta = torch.cat([P, .6*P[:1] + .4*P[1:]])
    mean = (1 - eps)*beta + eps/3
    s = optimal_scores(mean, *law)
    wanted = torch.stack([newton_by_hand(m, targets, probs) for m in mean])
    o.same(s, wanted - wanted.mean(1, keepdim=True), 1e-10)
    o.same(expected_target(s, *law), mean, 1e-11)
    o.same(mixup_probs(s, PY, lams, t64(weights), eps), beta, 1e-10)


@pytest.mark.parametrize('eps', [0., .1, .5])
def test_c7_smoothed_targets_sharpen_and_probs_recovers(eps):
    s = optimal_scores(smooth(P, eps), smooth(EYE, eps), PY)
    logits = s + PY.log()
    power = P**(1/(1 - eps))*PY**(-eps/(1 - eps))
    o.same(logits.softmax(1), power/power.sum(1, keepdim=True), 1e-11)
    o.same(SoftTargetInfoNCE(noise_probs=PY).probs(logits, epsilon=eps), P, 1e-10)
    if eps: assert ((logits.softmax(1)*(logits.softmax(1)/PY).log()).sum(1) > (P*(P/PY).log()).sum(1) + 1e-3).all()


def test_c7_smoothed_optimum_holds_at_every_batch_size_and_the_truth_is_no_optimum():
    alpha = smooth(EYE, .2)
    loss = lambda l, y: soft_target_info_nce(l, alpha[y], noise_probs=PY)
    optimum = P.log() + .25*(P/PY).log()
    for size in (2, 3): o.same(mean_gradient(optimum, size, loss, independent)[0], ZERO)
    assert mean_gradient(P.log(), 2, loss, independent)[0].abs().max() > 5e-3


def test_c7_overconfident_is_relative_to_the_marginal():
    p, eta = t64([[.6, .3, .1]]), t64([.8, .1, .1])
    stated = (optimal_scores(smooth(p, .3), smooth(EYE, .3), eta) + eta.log()).softmax(1)
    assert stated[0, 0] < .5 and stated.argmax() == 0
    uniform = t64([1/3]*3)
    assert (optimal_scores(smooth(p, .3), smooth(EYE, .3), uniform).softmax(1)).max() > .65


@pytest.mark.parametrize('lam, eps', [(1., .2), (.6, 0.), (.8, .1)])
def test_c7_is_the_minimum_of_the_loss_with_infinite_noise(lam, eps):
    "LBFGS on soft_target_info_nce itself, with ClosedForm noise of the same law."
    mean = (1 - eps)*P + eps/3
    logits = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16,
                                  line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        value = soft_target_info_nce(logits, mean, noise_probs=PY, noise_samples=ClosedForm(lam, eps))
        value.backward()
        return value

    optimizer.step(closure)
    wanted = (optimal_scores(mean, *mixup_law(PY, [lam], epsilon=eps)) + PY.log()).softmax(1)
    torch.testing.assert_close(logits.detach().softmax(1), wanted, rtol=0, atol=1e-6)
    assert (wanted - P).abs().max() > 1e-2


def test_c7_refuses():
    corners = smooth(EYE, .3)
    with pytest.raises(ValueError, match='row 1 does not'):
        optimal_scores(t64([[.4, .3, .3], [.98, .01, .01]]), corners, PY)
    with pytest.raises(ValueError, match='mean_targets must sum to 1'): optimal_scores(2*P, corners, PY)
    with pytest.raises(ValueError, match='noise_targets must have shape'): optimal_scores(P, corners[:2], PY)
    with pytest.raises(ValueError, match='noise_weights must sum to 1'): expected_target(P, corners, 2*PY)
    with pytest.raises(ValueError, match=r'lams must be in \[0, 1\]'): mixup_probs(P, PY, [1.2])
    with pytest.raises(ValueError, match=r'weights must have shape \(2,\)'): mixup_law(PY, [1., .5], t64([1.]))


# ---------------------------------------------------------------- C8: labels carry no gradient
def test_c8_accumulation_with_all_targets_is_the_global_gradient():
    z, w, t = o.logits(6, 3).detach(), o.logits(3, 4, 1), mix(smooth(o.simplex(6, 4), .1), .7)
    whole, = torch.autograd.grad(soft_target_info_nce(z @ w, t), w)
    total, apart = torch.zeros_like(whole), torch.zeros_like(whole)
    for rows in ([0, 3], [1], [2, 4, 5]):
        rest = [i for i in range(6) if i not in rows]
        total += torch.autograd.grad(soft_target_info_nce(z[rows] @ w, t[rows], noise_samples=t[rest], reduction='sum'),
                                     w)[0]/6
        apart += torch.autograd.grad(soft_target_info_nce(z[rows] @ w, t[rows], reduction='sum'), w)[0]/6
    o.same(total, whole)
    assert (apart - whole).abs().max() > 1e-2


def test_c8_a_queue_does_not_go_stale():
    x, new = o.logits(4, 3), o.logits(4, 3, 1)
    first, second, queue = o.simplex(4, 3), o.simplex(4, 3, 1), Queue(4)
    soft_target_info_nce(x, first, noise_samples=queue)
    o.same(soft_target_info_nce(new, second, noise_samples=queue, reduction='none'),
           o.soft_target_info_nce(new, second, extra=first))


# ---------------------------------------------------------------- C9: linear cross-entropy
def test_c9_only_the_classes_named_by_candidates_get_a_gradient():
    z, w = o.logits(4, 3).detach(), o.logits(50, 3, 1)
    index, weight = torch.tensor([[3, 7], [7, 7], [40, 3], [9, 3]]), t64([[.7, .3]]*4)
    grads = {}
    for name, eps in (('none', 0.), ('shared', .2), ('per row', t64([0., .1, .2, .3]))):
        grads[name], = torch.autograd.grad(linear_soft_target_info_nce(z, w, SparseTargets(index, weight, eps, 50)), w)
        targets = o.dense_sparse(index, weight, eps, 50)
        dense = lambda w: o.reduced(o.soft_target_info_nce(o.linear_logits(z, w), targets), 'mean')
        o.same(grads[name], torch.autograd.grad(dense(w), w)[0], 1e-11)
    for name in ('none', 'shared'): assert (grads[name] != 0).any(1).nonzero().flatten().tolist() == [3, 7, 9, 40]
    assert (grads['per row'] != 0).any(1).all()


# ---------------------------------------------------------------- C11, C12: variance
def influence(inputs):
    "Derivative of the InfoNCE gradient at the truth towards one more row, by central differences of the frequencies."
    def gradient(f):
        total = torch.zeros(3, inputs.shape[1], dtype=torch.float64)
        for x, y in itertools.product(range(2), range(3)):
            w = f.sum(0)/PY*P[x]
            total += f[x, y]*torch.outer(w/w.sum() - EYE[y], inputs[x])
        return total
    out, h = {}, 1e-5
    for x, y in itertools.product(range(2), range(3)):
        step = -JOINT.clone()
        step[x, y] += 1
        out[x, y] = (gradient(JOINT + h*step) - gradient(JOINT - h*step))/(2*h)
    return out


@pytest.mark.parametrize('inputs, constant', [([[2., 1.], [2., -1.]], True), ([[1.], [.3]], False)])
def test_c12_covariance_is_the_fisher_information_less_a_control_variate(inputs, constant):
    inputs = t64(inputs)
    size = 3*inputs.shape[1]
    fisher, b = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, 3, dtype=torch.float64)
    for x in range(2):
        j = P[x].diag() - torch.outer(P[x], P[x])
        fisher += PX[x]*torch.kron(j, torch.outer(inputs[x], inputs[x]))
        b += PX[x]*torch.kron(j, inputs[x][:, None])
    psi = influence(inputs)
    cov = sum(JOINT[key]*torch.outer(v.flatten(), v.flatten()) for key, v in psi.items())
    torch.testing.assert_close(cov, fisher - b @ torch.diag(1/PY) @ b.T, rtol=0, atol=1e-8)
    assert torch.linalg.eigvalsh(fisher - cov).min() > -1e-8                         # never larger
    saving = float(torch.trace(torch.linalg.pinv(fisher, hermitian=True) @ (fisher - cov)))
    most = 2 - float((PX[:, None]*(P - PY)**2/PY).sum())
    assert abs(saving - most) < 1e-6 if constant else 0 < saving < most - 1e-2


def test_c12_variance_of_all_batches_tends_to_it():
    "All 6^N batches, N times the variance of the gradient: NLL has its limit at once, InfoNCE stays below its own."
    ml = mean_gradient(P.log(), 3, lambda l, y: nll(l, y), independent)[1].sum()*3
    fisher = sum(PX[x]*(P[x]*(1 - P[x])).sum() for x in range(2))
    o.same(ml, fisher)
    saved = sum((PX[x]*(P[x].diag() - torch.outer(P[x], P[x])) @ torch.diag(1/PY**.5)).pow(2).sum() for x in range(2))
    two, three = (n*mean_gradient(P.log(), n, nce(), independent)[1].sum() for n in (2, 3))
    assert two < three < fisher - saved
    torch.testing.assert_close(float(fisher - saved), float(3*three - 2*two), rtol=.05, atol=0)
