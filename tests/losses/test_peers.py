"""softnce.peers: each loss against its paper's formula in literal loops, gradient, read-out, precisions and errors."""
import copy
import math

import mpmath
import pytest
import torch
import torch.nn.functional as F

import oracles as o
from softnce import targets as targets_module
from softnce.losses import info_nce, soft_target_cross_entropy, soft_target_info_nce
from softnce.noise import ClosedForm, ContinuousCategorical
from softnce.peers import (BinaryCrossEntropy, ContinuousCategoricalNLL, Distillation,
                           GeneralizedSupervisedContrastive, LogitAdjustedCrossEntropy, SoftInfoNCE,
                           binary_cross_entropy, continuous_categorical_nll, distillation,
                           generalized_supervised_contrastive, logit_adjusted_cross_entropy, negative_weights,
                           soft_info_nce)
from softnce.targets import SparseTargets, smooth

N, K, D = 5, 4, 3
X, V, Z = (o.logits(N, k, seed).detach() for k, seed in ((K, 0), (K, 1), (D, 2)))
T, Y, PI = o.simplex(N, K), torch.tensor([0, 2, 1, 0, 3]), o.noise(K)
SPARSE = SparseTargets(torch.tensor([[0, 1], [2, 2], [1, 3], [0, 2], [3, 0]]), o.simplex(N, 2, 5),
                       epsilon=.1, num_classes=K)
TAU = .7


# ---------------------------------------------------------------- literal formulas, one value a row
def softmax(row):
    norm = o.log_sum_exp(list(row))
    return [torch.exp(x - norm) for x in row]


def cross_entropy(weights, probs):
    total = 0.
    for w, p in zip(weights, probs): total = total - w*torch.log(p)
    return total


def cc_literal(l, t, tau=TAU):
    "-<alpha, l/tau> + log of the divided difference of exp at l/tau, for distinct logits; by the textbook sum."
    rows = []
    for row, alpha in zip(l/tau, t):
        integral = 0.
        for i in range(len(row)):
            term = torch.exp(row[i])
            for j in range(len(row)):
                if j != i: term = term/(row[i] - row[j])
            integral = integral + term
        rows.append(torch.log(integral) - o.energy(alpha, row))
    return torch.stack(rows)


def bce_literal(l, t, tau=TAU):
    rows = []
    for row, alpha in zip(l/tau, t):
        total = 0.
        for k in range(len(row)):
            p = 1/(1 + torch.exp(-row[k]))
            total = total - alpha[k]*torch.log(p) - (1 - alpha[k])*torch.log(1 - p)
        rows.append(total)
    return torch.stack(rows)


def adjusted_literal(l, t, tau=TAU, strength=1.5, pi=PI):
    "Equation 10 of Menon et al., for each class, weighted by the target."
    rows = []
    for row, alpha in zip(l, t):
        e = [torch.exp(row[k]/tau + strength*torch.log(pi[k])) for k in range(len(row))]
        rows.append(cross_entropy(alpha, [x/sum(e) for x in e]))
    return torch.stack(rows)


def cosine(a, b):
    dot, aa, bb = 0., 0., 0.
    for x, y in zip(a, b): dot, aa, bb = dot + x*y, aa + x*x, bb + y*y
    return dot/torch.sqrt(aa*bb)


def soft_info_nce_literal(l, t, tau=TAU, alpha=.8, beta=1., t_s=.3):
    "InfoNCE, negatives weighted by (beta - alpha sim_ij)/(beta - alpha/(N-1)), sim a softmax of target similarity."
    s, rows = o.scores(l, PI, tau), []
    for i in range(len(l)):
        others = [j for j in range(len(l)) if j != i]
        e = {j: torch.exp(cosine(t[i], t[j])/t_s) for j in others}
        u = [torch.exp(o.energy(t[j], s[i])) for j in range(len(l))]
        denominator = u[i]
        for j in others: denominator = denominator + (beta - alpha*e[j]/sum(e.values()))/(beta - alpha/len(others))*u[j]
        rows.append(-torch.log(u[i]/denominator))
    return torch.stack(rows)


def contrastive_literal(z, t, tau=TAU, t_s=None):
    rows = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        sim = [cosine(t[i], t[j]) for j in others]
        w = [x/sum(sim) for x in sim] if t_s is None else softmax([x/t_s for x in sim])
        rows.append(cross_entropy(w, softmax([cosine(z[i], z[j])/tau for j in others])))
    return torch.stack(rows)


def supcon_literal(z, y, tau=TAU):
    "SupCon's mean over positives P(i); an anchor without one has loss 0."
    rows = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        q = dict(zip(others, softmax([cosine(z[i], z[j])/tau for j in others])))
        positives = [j for j in others if y[j] == y[i]]
        rows.append(-sum(torch.log(q[p]) for p in positives)/len(positives) if positives else 0*q[others[0]])
    return torch.stack(rows)


def distillation_literal(l, t, temperature=3., h=.3):
    rows = []
    for row, alpha, v in zip(l, t, V):
        soft = cross_entropy(softmax([x/temperature for x in v]), softmax([x/temperature for x in row]))
        rows.append((1 - h)*temperature**2*soft + h*cross_entropy(alpha, softmax(row)))
    return torch.stack(rows)


ADJUSTED = {'class_probs': PI, 'strength': 1.5, 'temperature': TAU}
WEIGHTED = {'strength': .8, 'similarity_temperature': .3, 'noise_probs': PI, 'temperature': TAU}
XCLR = {'temperature': TAU, 'similarity_temperature': .2}
DISTILLED = {'temperature': 3., 'hard_weight': .3}
PEERS = {  # name -> (loss, literal formula, input)
    'cc': (lambda l, t, **kw: continuous_categorical_nll(l, t, **{'temperature': TAU, **kw}), cc_literal, X),
    'bce': (lambda l, t, **kw: binary_cross_entropy(l, t, **{'temperature': TAU, **kw}), bce_literal, X),
    'adjusted': (lambda l, t, **kw: logit_adjusted_cross_entropy(l, t, **ADJUSTED | kw), adjusted_literal, X),
    'soft_info_nce': (lambda l, t, **kw: soft_info_nce(l, t, **WEIGHTED | kw), soft_info_nce_literal, X),
    'genscl': (lambda z, t, **kw: generalized_supervised_contrastive(z, t, **{'temperature': TAU} | kw),
               contrastive_literal, Z),
    'xclr': (lambda z, t, **kw: generalized_supervised_contrastive(z, t, **XCLR | kw),
             lambda z, t: contrastive_literal(z, t, t_s=.2), Z),
    'distillation': (lambda l, t, **kw: distillation(l, t, V.to(l.dtype), **DISTILLED | kw), distillation_literal, X),
}
MODULES = {
    'cc': ContinuousCategoricalNLL(TAU), 'bce': BinaryCrossEntropy(TAU),
    'adjusted': LogitAdjustedCrossEntropy(PI, 1.5, TAU),
    'soft_info_nce': SoftInfoNCE(PI, TAU, .8, .3), 'genscl': GeneralizedSupervisedContrastive(TAU),
    'xclr': GeneralizedSupervisedContrastive(TAU, .2), 'distillation': Distillation(3., .3),
}
KINDS = {'dense': (T, T), 'ids': (Y, o.dense(Y, K)),
         'sparse': (SPARSE, o.dense_sparse(SPARSE.indices, SPARSE.weights, .1, K))}


def same(a, b, tol=1e-12): torch.testing.assert_close(a, b, rtol=tol, atol=tol)
def refuses(match): return pytest.raises(ValueError, match=match)


# ---------------------------------------------------------------- all of them
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', PEERS)
def test_formula(name, kind):
    loss, literal, x = PEERS[name]
    targets, rows = KINDS[kind]
    if name == 'genscl' and kind == 'ids': literal, rows = supcon_literal, Y    # has rows without a positive
    o.same_value_and_grad(lambda l: loss(l, targets, reduction='none'), lambda l: literal(l, rows), x)


@pytest.mark.parametrize('name', PEERS)
def test_gradcheck(name):
    loss, _, x = PEERS[name]
    for t in (T, Y, SPARSE):
        assert torch.autograd.gradcheck(lambda l: loss(l, t, reduction='none'), (x.clone().requires_grad_(),))


@pytest.mark.parametrize('name', PEERS)
def test_reductions_and_module(name):
    loss, _, x = PEERS[name]
    rows = loss(x, T, reduction='none')
    assert rows.shape == (N,)
    same(loss(x, T), rows.mean())
    same(loss(x, T, reduction='sum'), rows.sum())
    module, extra = MODULES[name], (V,) if name == 'distillation' else ()
    same(module(x, T, *extra), rows.mean())
    same(copy.deepcopy(module)(x, T, *extra), rows.mean())


@pytest.mark.parametrize('name', PEERS)
def test_low_precision_is_computed_in_single(name):
    loss, _, x = PEERS[name]
    low = x.bfloat16()
    got, truth = loss(low, T.float()), loss(low.double(), T.float().double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = loss(x.float(), T.float())
    torch.testing.assert_close(inside, loss(x.float(), T.float()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', PEERS)
def test_errors(name):
    loss, _, x = PEERS[name]
    first = 'embeddings' if name in ('genscl', 'xclr') else 'logits'
    for bad in (x[0], x[None], torch.zeros(N, K, dtype=torch.long)):
        with refuses(first): loss(bad, T)
    for bad in (T[:3], T[None], T*.9, -T, Y[:3], Y - 1, Y.float(), [0]*N, torch.full_like(T, math.nan)):
        with refuses('targets'): loss(x, bad)
    if first == 'logits':
        for bad in (T[:, :2]/T[:, :2].sum(1, keepdim=True), Y + 1):
            with refuses('targets'): loss(x, bad)
    for bad in (0., -1., math.nan, math.inf):
        with refuses(f'temperature.*{bad}'): loss(x, T, temperature=bad)
        with refuses(f'temperature.*{bad}'):
            type(MODULES[name])(**({'class_probs': PI} if name == 'adjusted' else {}), temperature=bad)
    with refuses("reduction.*'average'"): loss(x, T, reduction='average')
    with refuses("reduction.*'average'"):
        type(MODULES[name])(**({'class_probs': PI} if name == 'adjusted' else {}), reduction='average')


@pytest.mark.parametrize('name', ['cc', 'bce', 'adjusted', 'soft_info_nce', 'distillation'])
def test_probs_are_probabilities(name):
    for epsilon in (0., .1):
        p = MODULES[name].probs(X, epsilon)
        assert p.shape == X.shape and p.dtype == X.dtype and (p >= 0).all()
        same(p.sum(1), torch.ones(N, dtype=torch.float64))
    for bad in (-.1, 1., math.nan):
        with refuses('epsilon'): MODULES[name].probs(X, bad)


# ---------------------------------------------------------------- read-outs at the optimum
P = torch.tensor([[.6, .25, .15], [.2, .3, .5]], dtype=torch.float64)     # the truth at two inputs
EPS = .2


def minimise(loss, num_classes=3):
    "Free logits that minimise the exact mean of `loss` over smoothed labels; and the size of the gradient there."
    logits = torch.zeros(2, num_classes, dtype=torch.float64, requires_grad=True)
    alpha = smooth(torch.eye(num_classes, dtype=torch.float64), EPS)
    optimizer = torch.optim.LBFGS([logits], max_iter=1000, tolerance_grad=1e-14, tolerance_change=1e-18,
                                  line_search_fn='strong_wolfe')

    def mean_loss():
        optimizer.zero_grad()
        value = sum((P[:, y]*loss(logits, alpha[y].expand(2, -1))).sum() for y in range(num_classes))
        value.backward()
        return value

    optimizer.step(mean_loss)
    return logits.detach()


@pytest.mark.parametrize('module', [ContinuousCategoricalNLL(TAU, 'none'), BinaryCrossEntropy(TAU, 'none')],
                         ids=['cc', 'bce'])
def test_probs_at_the_optimum(module):
    logits = minimise(module)
    same(module.probs(logits, EPS), P, 1e-6)
    assert (module.probs(logits) - P).abs().max() > .02
    assert ((logits/TAU).softmax(1) - P).abs().max() > .02        # the plain softmax is neither


@pytest.mark.parametrize('strength', [0., 1., 1.5])
def test_logit_adjusted_probs_at_the_optimum(strength):
    pi = torch.tensor([.6, .3, .1], dtype=torch.float64)
    module = LogitAdjustedCrossEntropy(pi, strength, TAU, 'none')
    logits = minimise(module)
    same(module.probs(logits, EPS, prior=pi), P, 1e-6)
    balanced, other = P/pi, P/pi*torch.tensor([.1, .1, .8], dtype=torch.float64)
    same(module.probs(logits, EPS), balanced/balanced.sum(1, keepdim=True), 1e-6)
    same(module.probs(logits, EPS, prior=torch.tensor([.1, .1, .8])), other/other.sum(1, keepdim=True), 1e-6)
    if strength == 1: same(module.probs(logits), (logits/TAU).softmax(1))


def test_distillation_probs_at_the_optimum():
    "Without a hard loss the student's optimum is the teacher, at every temperature."
    teacher = P.log()
    for temperature in (1., 4.):
        module = Distillation(temperature, 0., 'none')
        same(module.probs(minimise(lambda l, t: module(l, t, teacher))), P, 1e-6)


# ---------------------------------------------------------------- continuous categorical
@pytest.mark.parametrize('k', [2, 3, 5, 10])
@pytest.mark.parametrize('scale', [0., 1e-7, 1., 10.])
def test_cc_against_exact_arithmetic(k, scale):
    l, t = scale*o.logits(2, k, 4).detach(), o.simplex(2, k, 4)
    wanted = []
    for row, alpha in zip(l, t):
        z = mpmath.log(o.divided_difference_series([mpmath.mpf(float(x)) for x in row]))
        wanted.append(float(z - mpmath.fsum(mpmath.mpf(float(a))*mpmath.mpf(float(x)) for a, x in zip(alpha, row))))
    got = continuous_categorical_nll(l, t, reduction='none')
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-13*max(scale, 1))
    same(ContinuousCategoricalNLL().probs(l)[0], o.cc_mean(l.softmax(1)[0]), 1e-11)


def test_cc_with_a_thousand_classes():
    """At equal logits the normaliser is 1/(K-1)! and the gradient 1/K - alpha; elsewhere the gradient is the mean of
    the law less the target."""
    l, t = torch.zeros(2, 1000, dtype=torch.float64, requires_grad=True), o.simplex(2, 1000)
    value = continuous_categorical_nll(l, t, reduction='none')
    same(value.detach(), torch.full((2,), -math.lgamma(1000), dtype=torch.float64))
    same(torch.autograd.grad(value.sum(), l)[0], 1/1000 - t)
    far = o.logits(2, 1000, scale=5.)
    slope, = torch.autograd.grad(continuous_categorical_nll(far, t, reduction='sum'), far)
    same(slope, ContinuousCategorical(far.detach().softmax(1)).mean - t)


def test_cc_is_the_log_density():
    law = ContinuousCategorical((X/TAU).softmax(1))
    same(continuous_categorical_nll(X, T, temperature=TAU, reduction='none'), -law.log_prob(T))


def test_cc_span():
    wide = torch.tensor([[699., 0., 0.]], dtype=torch.float64)
    assert continuous_categorical_nll(wide, T[:1, :3]/T[:1, :3].sum()).isfinite()
    assert ContinuousCategoricalNLL().probs(wide).isfinite().all()
    for f in (lambda l: continuous_categorical_nll(l, torch.tensor([0])), ContinuousCategoricalNLL().probs):
        with refuses('logits.*700.*701'): f(wide + torch.tensor([2., 0., 0.]))
        with refuses('logits.*700.*nan'): f(wide*math.nan)


# ---------------------------------------------------------------- logit adjustment, its kin in the package
def test_logit_adjustment_and_info_nce():
    s, counts = X - PI.log(), torch.bincount(Y, minlength=K).double()
    closed = soft_target_info_nce(X, T, noise_probs=PI, noise_samples=ClosedForm(), reduction='none')
    same(closed, logit_adjusted_cross_entropy(s, T, class_probs=PI, reduction='none') + (T*PI.log()).sum(1))
    batch = logit_adjusted_cross_entropy(s, Y, class_probs=counts/N, reduction='none') + counts.log()[Y]
    same(info_nce(X, Y, noise_probs=PI, reduction='none'), batch)
    same(logit_adjusted_cross_entropy(X, T, class_probs=PI, strength=0), soft_target_cross_entropy(X, T))


def test_logit_adjusted_errors():
    for bad in ([.5, .5, 0., 0.], [.5, .7, -.1, -.1], [.3]*4, [math.nan]*4):
        with refuses('class_probs'): logit_adjusted_cross_entropy(X, T, class_probs=torch.tensor(bad))
        with refuses('class_probs'): LogitAdjustedCrossEntropy(torch.tensor(bad))
        with refuses('prior'): LogitAdjustedCrossEntropy(PI).probs(X, prior=torch.tensor(bad))
    with refuses(r'class_probs.*\(4,\).*\(3,\)'): logit_adjusted_cross_entropy(X, T, class_probs=torch.full((3,), 1/3))
    for bad in (-1., math.inf, math.nan):
        with refuses(f'strength.*{bad}'): logit_adjusted_cross_entropy(X, T, class_probs=PI, strength=bad)
        with refuses(f'strength.*{bad}'): LogitAdjustedCrossEntropy(PI, bad)
    assert 'class_probs' in LogitAdjustedCrossEntropy(PI).state_dict()


# ---------------------------------------------------------------- binary cross-entropy
def test_bce_of_two_classes_is_twice_the_cross_entropy():
    a, t = X[:, 0], o.simplex(N, 2)
    same(binary_cross_entropy(torch.stack([a, -a], 1), t), 2*soft_target_cross_entropy(torch.stack([a, 0*a], 1), t))
    same(binary_cross_entropy(X, T, reduction='sum'), F.binary_cross_entropy_with_logits(X, T, reduction='sum'))


def test_bce_of_large_logits():
    big = torch.tensor([[1e4, -1e4, 0.]], requires_grad=True)
    loss = binary_cross_entropy(big, torch.tensor([[0., 1., 0.]]))
    torch.testing.assert_close(loss.item(), 2e4 + math.log(2), rtol=1e-6, atol=0)
    loss.backward()
    torch.testing.assert_close(big.grad, torch.tensor([[1., -1., .5]]))
    torch.testing.assert_close(BinaryCrossEntropy().probs(torch.tensor([[-900., -901., -990.]])).sum(),
                               torch.tensor(1.))


# ---------------------------------------------------------------- Soft-InfoNCE
def test_negative_weights():
    similarity = o.simplex(6, 6)
    weights = negative_weights(similarity, strength=4.5, similarity_temperature=.02)
    # cut off where the formula is negative
    assert weights.shape == (6, 5) and (weights >= 0).all() and (weights == 0).any()
    same(weights.mean(1), torch.ones(6, dtype=torch.float64))
    same(negative_weights(similarity, 0.), torch.ones(6, 5, dtype=torch.float64))
    near = similarity.clone().fill_diagonal_(-math.inf).argmax(1)
    # the nearest negative weighs least
    for i in range(6): assert weights[i].argmin() == near[i] - int(near[i] > i)


def test_soft_info_nce_at_zero_strength_and_with_cut_off_weights():
    same(soft_info_nce(X, T, strength=0., noise_probs=PI, reduction='none'),
         soft_target_info_nce(X, T, noise_probs=PI, reduction='none'))
    strong = dict(strength=3.5, similarity_temperature=.01)
    value, (grad,) = o.value_and_grad(lambda l: soft_info_nce(l, Y, reduction='none', **strong), X)
    assert value.isfinite().all() and grad.isfinite().all()
    # rows 0 and 3 share a label: for them that negative is gone, and the three others weigh 4/3
    s = X + math.log(K)
    wanted = -(s[0, 0].exp()/(s[0, 0].exp() + 4/3*(s[0, 2].exp() + s[0, 1].exp() + s[0, 3].exp()))).log()
    same(value[0], wanted)


def test_soft_info_nce_errors():
    with refuses('logits.*2 rows.*1'): soft_info_nce(X[:1], T[:1])
    for bad in (-.1, N - 1, math.nan):
        with refuses(f'strength.*{bad}'): soft_info_nce(X, T, strength=bad)
    for bad in (0., math.nan, math.inf):
        with refuses(f'similarity_temperature.*{bad}'): soft_info_nce(X, T, similarity_temperature=bad)
        with refuses(f'similarity_temperature.*{bad}'): SoftInfoNCE(similarity_temperature=bad)
    with refuses('strength'): SoftInfoNCE(strength=-1.)
    with refuses('noise_probs'): soft_info_nce(X, T, noise_probs=torch.tensor([.5, .5, 0., 0.]))


# ---------------------------------------------------------------- GenSCL, X-CLR
def test_contrastive_scale_and_limits():
    same(generalized_supervised_contrastive(7*Z, T), generalized_supervised_contrastive(Z, T))
    y = torch.tensor([0, 1, 0, 1, 1])
    same(generalized_supervised_contrastive(Z, y, similarity_temperature=1e-3),
         generalized_supervised_contrastive(Z, y))
    assert generalized_supervised_contrastive(Z, torch.arange(N)) == 0                 # no row has a positive
    assert not hasattr(GeneralizedSupervisedContrastive(), 'probs')


def test_contrastive_errors():
    with refuses('embeddings.*2 rows.*1'): generalized_supervised_contrastive(Z[:1], T[:1])
    with refuses('targets.*5 rows like the embeddings.*3'): generalized_supervised_contrastive(Z, T[:3])
    for bad in (0., -1., math.nan, math.inf):
        with refuses(f'similarity_temperature.*{bad}'):
            generalized_supervised_contrastive(Z, T, similarity_temperature=bad)
        with refuses(f'similarity_temperature.*{bad}'): GeneralizedSupervisedContrastive(similarity_temperature=bad)


# ---------------------------------------------------------------- distillation
def test_distillation_identities():
    same(distillation(X, None, V, temperature=1., hard_weight=0.), soft_target_cross_entropy(X, V.softmax(1)))
    same(distillation(X, T, V, temperature=1., hard_weight=.4), soft_target_cross_entropy(X, .6*V.softmax(1) + .4*T))
    same(distillation(X, T, V, hard_weight=1.), soft_target_cross_entropy(X, T))


def test_distillation_gradient_at_high_temperature():
    "Equation 4 of the paper times T^2: (l - v)/K, row means removed; the error falls like 1/T."
    gap = X - V
    wanted = (gap - gap.mean(1, keepdim=True))/K
    for temperature in (1e2, 1e4):
        soft_term = lambda l: distillation(l, None, V, temperature=temperature, hard_weight=0., reduction='sum')
        grad = torch.func.grad(soft_term)(X)
        torch.testing.assert_close(grad, wanted, rtol=0, atol=5/temperature)


def test_distillation_leaves_the_teacher_alone():
    teacher = V.clone().requires_grad_()
    student = X.clone().requires_grad_()
    distillation(student, T, teacher).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


def test_distillation_errors():
    with refuses('targets.*hard_weight.*None'): distillation(X, None, V)
    for bad in (V[:3], V[:, :2], V[0], torch.zeros(N, K, dtype=torch.long)):
        with refuses('teacher_logits'): distillation(X, T, bad)
    for bad in (-.1, 1.1, math.nan):
        with refuses(f'hard_weight.*{bad}'): distillation(X, T, V, hard_weight=bad)
        with refuses(f'hard_weight.*{bad}'): Distillation(hard_weight=bad)


def test_value_checks_can_be_turned_off():
    with targets_module.set_value_checks(False):
        for name, (loss, _, x) in PEERS.items(): assert loss(x, T*.9).isfinite()
