"""`probs(logits, epsilon, targets)`: for every loss, noise source and kind of targets the read-out at the exact
optimum, found by minimising the mean loss over all tuples; or a refusal, where the optimum says something else."""
import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch

import oracles as o
from softnce.losses import (NLL, ExpectedInfoNCE, InfoNCE, SoftDistributionInfoNCE, SoftTargetCrossEntropy,
                            SoftTargetInfoNCE, info_nce, soft_target_info_nce)
from softnce.noise import ClosedForm, Fresh, InBatch, NoiseSource, Queue
from softnce.peers import (BinaryCrossEntropy, ContinuousCategoricalNLL, Distillation, LogitAdjustedCrossEntropy,
                           SoftInfoNCE)
from softnce.targets import SparseTargets, mix, one_hot, set_value_checks, smooth

KINDS = ('labels', 'votes', 'teacher', 'mixed')
TRUTH = torch.tensor([[.5, .3, .2], [.25, .45, .3], [.35, .2, .45]], dtype=torch.float64)  # p(k|x)
PX = (.5, .2, .3)
EYE = torch.eye(3, dtype=torch.float64)


# ---------------------------------------------------------------- populations: an input's targets, their probabilities
def labels_of(p): return [(EYE[k], float(p[k])) for k in range(3)]


def votes_of(p, num_votes=3):
    votes = itertools.product(range(3), repeat=num_votes)
    return [(EYE[list(v)].mean(0), math.prod(float(p[k]) for k in v)) for v in votes]


def mixed_of(p, q, lam):
    pairs = itertools.product(range(3), repeat=2)
    return [(lam*EYE[a] + (1 - lam)*EYE[b], float(p[a]*q[b])) for a, b in pairs]


def population(kind, eps=0.):
    "`(input's probability, [(target, probability)])`, every target smoothed by eps."
    rows = {'labels': [labels_of(p) for p in TRUTH], 'votes': [votes_of(p) for p in TRUTH],
            'teacher': [[(p, 1.)] for p in TRUTH],
            'mixed': [mixed_of(TRUTH[i], TRUTH[j], lam) for i, j, lam in ((0, 1, .8), (1, 2, .6), (2, 2, 1.))]}[kind]
    return [(w, [((1 - eps)*t + eps/3, v) for t, v in row]) for w, row in zip(PX, rows)]


def mean_targets(rows): return torch.stack([sum(v*t for t, v in row) for _, row in rows])


def all_targets(rows): return [(t, w*v) for w, row in rows for t, v in row]


# ---------------------------------------------------------------- minimisation
def minimum(loss):
    "Newton's method on a convex function of three scores, constants free."
    s = torch.zeros(3, dtype=torch.float64)
    for _ in range(300):
        slope = torch.func.grad(loss)(s)
        if slope.abs().max() < 1e-13: return s
        move = torch.linalg.solve(torch.func.hessian(loss)(s) + 1., slope)
        s = s - move/max(1., float(move.norm()))
    raise AssertionError(f'no minimum: {s}')


def tuples_of(groups):
    """Every way to take one (target, probability) of each group: the mean over them of minus the log posterior of the
    first, as a function of the scores."""
    picked = list(itertools.product(*groups))
    targets = torch.stack([torch.stack([t for t, _ in one]) for one in picked])
    weights = torch.tensor([math.prod(float(v) for _, v in one) for one in picked], dtype=torch.float64)
    def loss(s):
        u = (targets*s).sum(-1)
        return (weights*(torch.logsumexp(u, 1) - u[:, 0])).sum()
    return loss


# each: the mean loss at an input with targets `row`, as a function of its scores; `everyone`: the candidates' targets
def cross_entropy(row, everyone, eta):
    return lambda s: sum(v*(torch.logsumexp(s + eta.log(), 0) - (t*(s + eta.log())).sum()) for t, v in row)


def in_batch(size):
    "Soft target InfoNCE with size - 1 other targets."
    return lambda row, everyone, eta: tuples_of([row, *[everyone]*(size - 1)])


def label_law(row): return labels_of(sum(v*t for t, v in row))


def drawn_labels(size):
    "A label drawn from every target, one's own among them: soft distribution InfoNCE, and InfoNCE on class ids."
    return lambda row, everyone, eta: tuples_of([label_law(row), *[label_law(everyone)]*(size - 1)])


def mean_over_draw(size, fresh=False):
    "The sum over the target's classes in place of a drawn label: size - 1 labels, drawn from other targets or eta."
    def build(row, everyone, eta):
        law = eta if fresh else sum(v*t for t, v in everyone)
        draws = torch.tensor(list(itertools.product(range(3), repeat=size - 1)))
        def loss(s):
            total = 0.
            for t, v in row:
                for k in range(3):
                    own_and_noise = torch.cat([s[k].expand(len(draws), 1), s[draws]], 1)
                    total = total + v*t[k]*(law[draws].prod(1)*(own_and_noise.logsumexp(1) - s[k])).sum()
            return total
        return loss
    return build


def many_draws(lam=1., eps=0.):
    "The limit of many noise targets, mixtures of two labels from eta, smoothed."
    def build(row, everyone, eta):
        noise = [((1 - eps)*(lam*EYE[a] + (1 - lam)*EYE[b]) + eps/3, eta[a]*eta[b])
                 for a, b in itertools.product(range(3), repeat=2)]
        targets, weights = torch.stack([t for t, _ in noise]), torch.stack([w for _, w in noise])
        return lambda s: torch.logsumexp(targets @ s + weights.log(), 0) - sum(v*(t*s).sum() for t, v in row)
    return build


READ = {  # what -> (module of eta, its mean loss)
    'cross-entropy': (lambda eta: SoftTargetCrossEntropy(), cross_entropy),
    'drawn in-batch, 2': (lambda eta: SoftDistributionInfoNCE(eta), drawn_labels(2)),
    'drawn in-batch, 4': (lambda eta: SoftDistributionInfoNCE(eta, noise_samples=InBatch()), drawn_labels(4)),
    'drawn, queue': (lambda eta: SoftDistributionInfoNCE(eta, noise_samples=Queue(8)), drawn_labels(3)),
    'ids drawn in-batch': (lambda eta: InfoNCE(eta), drawn_labels(3)),
    'mean over the draw': (lambda eta: ExpectedInfoNCE(eta), mean_over_draw(2)),
    'mean over the draw, queue': (lambda eta: ExpectedInfoNCE(eta, noise_samples=Queue(8)), mean_over_draw(4)),
    'mean over the draw, fresh': (lambda eta: ExpectedInfoNCE(eta, noise_samples=Fresh(2)), mean_over_draw(3, True)),
    'mean over the draw, closed': (lambda eta: ExpectedInfoNCE(eta, noise_samples=ClosedForm()), many_draws()),
    'drawn, closed': (lambda eta: SoftDistributionInfoNCE(eta, noise_samples=ClosedForm()), many_draws()),
    'closed': (lambda eta: SoftTargetInfoNCE(eta, noise_samples=ClosedForm()), many_draws()),
    'fresh': (lambda eta: SoftTargetInfoNCE(eta, noise_samples=Fresh(5)), many_draws()),
    'closed, mixed noise': (lambda eta: SoftTargetInfoNCE(eta, noise_samples=ClosedForm(.9, .1)), many_draws(.9, .1)),
    'fresh, mixed noise': (lambda eta: SoftTargetInfoNCE(eta, noise_samples=Fresh(5, .9, .1)), many_draws(.9, .1)),
}


def optimum(build, rows, eta):
    everyone = all_targets(rows)
    return torch.stack([minimum(build(row, everyone, eta)) for _, row in rows])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('eps', [0., .2])
@pytest.mark.parametrize('name', READ)
def test_the_read_out_is_the_mean_target(name, kind, eps):
    module, build = READ[name]
    beta = mean_targets(population(kind))
    eta = torch.tensor(PX, dtype=torch.float64) @ beta  # of the targets before smoothing
    logits = optimum(build, population(kind, eps), eta) + eta.log()
    o.same(module(eta).probs(logits, epsilon=eps, targets=kind), beta, 1e-10)
    o.same(module(eta).probs(logits, eps), beta, 1e-10)  # without a kind, as before
    wrong = module(eta).probs(logits, .1 if eps == 0 else 0., targets=kind)
    assert (wrong - beta).abs().max() > 1e-3  # the smoothing matters, as it must


@pytest.mark.parametrize('eps', [0., .2])
@pytest.mark.parametrize('size', [2, 3])
@pytest.mark.parametrize('source', [lambda: None, InBatch, lambda: Queue(4)])
def test_in_batch_soft_targets_of_labels(source, size, eps):
    eta = torch.tensor(PX, dtype=torch.float64) @ TRUTH
    # equal targets of different inputs are one candidate
    everyone = [((1 - eps)*EYE[k] + eps/3, float(eta[k])) for k in range(3)]
    s = torch.stack([minimum(in_batch(size)(row, everyone, eta)) for _, row in population('labels', eps)])
    module = SoftTargetInfoNCE(eta, noise_samples=source())
    o.same(module.probs(s + eta.log(), eps, targets='labels'), TRUTH, 1e-10)
    if eps: assert (module.probs(s + eta.log(), 0., targets='labels') - TRUTH).abs().max() > 1e-3


@pytest.mark.parametrize('kind, says', [('votes', 'expected_target'), ('teacher', 'expected_target'),
                                        ('mixed', 'mixup_probs')])
@pytest.mark.parametrize('source', [lambda: None, InBatch, lambda: Queue(4), lambda: TRUTH, NoiseSource])
def test_in_batch_soft_targets_of_other_kinds_are_refused(kind, says, source):
    module = SoftTargetInfoNCE(noise_samples=source())
    wanted = rf"targets='{kind}'.*noise_samples=ClosedForm\(\).*ExpectedInfoNCE.*SoftDistributionInfoNCE.*{says}"
    with pytest.raises(ValueError, match=wanted):
        module.probs(TRUTH.log(), targets=kind)
    with pytest.raises(ValueError, match='targets'): SoftInfoNCE().probs(TRUTH.log(), targets=kind)


@pytest.mark.parametrize('kind', ['votes', 'mixed'])
def test_what_is_refused_would_be_wrong(kind):
    rows = population(kind)
    beta = mean_targets(rows)
    eta = torch.tensor(PX, dtype=torch.float64) @ beta
    s = optimum(in_batch(2), rows[:1], eta)[0]
    assert ((s + eta.log()).softmax(0) - beta[0]).abs().max() > .02


def test_a_teacher_in_batch_has_no_optimum():
    rows = population('teacher')
    loss = in_batch(2)(rows[0][1], all_targets(rows), None)
    s = minimum(loss)  # where the slope is lost in rounding
    assert s.max() - s.min() > 50 and loss(s) <= loss(s/2) < loss(s/10)


def test_the_sums_are_the_losses():
    "The mean losses above, by the package, have no slope where they are least."
    def slope(f, x): return torch.func.grad(f)(x).abs().max()
    rows, eta = population('votes', .2), torch.tensor(PX, dtype=torch.float64) @ mean_targets(population('votes'))
    row, mean = rows[0][1], mean_targets(rows)
    for name, (module, build) in READ.items():
        if name not in ('cross-entropy', 'closed', 'closed, mixed noise'): continue
        l = optimum(build, rows[:1], eta)[0] + eta.log()
        loss = module(eta)
        assert slope(lambda l: sum(v*loss(l[None], t[None]) for t, v in row), l) < 1e-12
        assert slope(lambda l: sum(v*loss(l[None], t[None]) for t, v in row), l + EYE[0]) > 1e-3
    others = torch.tensor(PX, dtype=torch.float64) @ mean
    l = optimum(drawn_labels(2), rows, eta)[0] + eta.log()
    one = lambda l, k, j: info_nce(l[None], torch.tensor([k]), noise_probs=eta, noise_samples=torch.tensor([j]))
    assert slope(lambda l: sum(mean[0, k]*others[j]*one(l, k, j) for k in range(3) for j in range(3)), l) < 1e-12
    everyone = [(.8*EYE[k] + .2/3, float(eta[k])) for k in range(3)]
    row = population('labels', .2)[0][1]
    l = minimum(in_batch(2)(row, everyone, eta)) + eta.log()
    two = lambda l, t, n: soft_target_info_nce(l[None], t[None], noise_probs=eta, noise_samples=n[None])
    assert slope(lambda l: sum(v*w*two(l, t, n) for t, v in row for n, w in everyone), l) < 1e-12


def test_kinds_are_checked():
    modules = (NLL(), SoftTargetCrossEntropy(), InfoNCE(), SoftDistributionInfoNCE(), SoftTargetInfoNCE(),
               ExpectedInfoNCE(), BinaryCrossEntropy(), ContinuousCategoricalNLL(), Distillation(), SoftInfoNCE(),
               LogitAdjustedCrossEntropy(TRUTH.mean(0)))
    for m in modules:
        for bad in ('soft', 'label', 1, ['votes'], TRUTH):
            with pytest.raises(ValueError, match="targets must be None, 'labels'"): m.probs(TRUTH.log(), targets=bad)
        o.same(m.probs(TRUTH.log(), targets='labels'), m.probs(TRUTH.log()))


# ---------------------------------------------------------------- the warning
HARD = one_hot(torch.tensor([0, 1, 2, 1]), 3)
VOTES = torch.tensor([[.5, .5, 0.], [1., 0., 0.], [0., 0., 1.], [.25, .25, .5]])
X = o.logits(4, 3).detach().float()


def sparse(indices, weights, eps=0.): return SparseTargets(torch.tensor(indices), torch.tensor(weights), eps, 3)


OTHERS = {'votes': VOTES, 'teacher': X.softmax(1), 'mixed': smooth(mix(HARD, .7), .1),
          'unequal smoothing': smooth(HARD, torch.tensor([0., .1, .2, .1])), 'half': VOTES.bfloat16(),
          'sparse votes': sparse([[0, 1], [0, 0], [2, 2], [1, 2]], [[.5, .5]]*4),
          'sparse smoothing': sparse([[0], [1], [2], [1]], [[1.]]*4, torch.tensor([0., .1, .2, .1]))}
ALIKE = {'ids': torch.tensor([0, 1, 2, 1]), 'one-hot': HARD, 'smoothed': smooth(HARD, .3),
         'half': smooth(HARD, .1).bfloat16(),
         'mixed with itself': smooth(mix(HARD, 1.), .1), 'sparse': sparse([[0], [1], [2], [1]], [[1.]]*4, .1),
         'padded': sparse([[0, 0], [1, 0], [2, 0], [1, 0]], [[1., 0.]]*4)}


def warned(module, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        module.probs(X, **kwargs)
    assert all('labels that are smoothed alike' in str(w.message) and w.filename == __file__ for w in caught)
    return len(caught)


@pytest.mark.parametrize('name', OTHERS)
def test_other_targets_in_batch_warn_once(name):
    module = SoftTargetInfoNCE()
    assert warned(module) == 0
    module(X, OTHERS[name])
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [warned(clone), warned(clone)] == [1, 0]
    assert warned(module, targets='labels') == 0      # the kind is said
    assert [warned(module, epsilon=.1), warned(module)] == [1, 0]
    assert warned(SoftTargetInfoNCE()) == 0           # each for itself


@pytest.mark.parametrize('name', ALIKE)
def test_labels_smoothed_alike_do_not_warn(name):
    module = SoftTargetInfoNCE()
    for _ in range(3): module(X, ALIKE[name])
    assert warned(module) == 0


def test_who_warns():
    queue, own = SoftTargetInfoNCE(noise_samples=Queue(4)), SoftInfoNCE()
    for m in (queue, own): m(X, VOTES)
    assert warned(queue) == warned(own) == 1
    for m in (SoftTargetInfoNCE(noise_samples=ClosedForm()), SoftTargetInfoNCE(noise_samples=Fresh(4)),
              SoftDistributionInfoNCE(), ExpectedInfoNCE(), SoftTargetCrossEntropy()):
        m(X, VOTES)
        assert warned(m) == 0
    call = SoftTargetInfoNCE()
    call(X, VOTES, noise_samples=ClosedForm())
    assert warned(call) == 0


def test_one_batch_among_others_is_enough():
    module = SoftTargetInfoNCE()
    for t in (HARD, VOTES, HARD): module(X, t)
    assert warned(module) == 1


def test_the_look_is_cheap():
    "A pass over the targets of the first calls, where values are checked at all; its answer is a tensor beside them."
    module = SoftTargetInfoNCE()
    for _ in range(8): module(X, HARD)
    module(X, VOTES)
    assert warned(module) == 0
    module = SoftTargetInfoNCE()
    with set_value_checks(False): module(X, VOTES)
    assert warned(module) == 0 and module._alike is None
    module(X, VOTES)
    assert module._alike.shape == () and module._alike.dtype == torch.bool and not module._alike.requires_grad
    assert not module.state_dict()


def test_the_look_changes_nothing_else():
    module, t = SoftTargetInfoNCE(), VOTES.clone().requires_grad_()
    o.same(module(X, t), soft_target_info_nce(X, t))
    module.to('meta')(X.to('meta'), VOTES.to('meta'))
    compiled = torch.compile(SoftTargetInfoNCE(), backend='eager', fullgraph=True)
    o.same(compiled(X, VOTES), soft_target_info_nce(X, VOTES), 1e-6)
    torch.func.grad(lambda l: SoftTargetInfoNCE()(l, VOTES))(X)
    with pytest.raises(ValueError, match='^targets'): SoftTargetInfoNCE()(X, [[.5, .5, 0.]]*4)
