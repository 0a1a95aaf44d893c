"""Distillation from the top of a teacher: literal sums, the student's optimum under each word for the rest, tails in
single precision, a divergence that is never negative."""
import copy
import math

import mpmath
import pytest
import torch

import oracles as o
from softnce.peers import Distillation, distillation, top_divergence
from softnce.targets import SparseTargets

N, K = 5, 6
RESTS = ('bucket', 'uniform', 'renormalise')
X, V = (o.logits(N, K, seed).detach() for seed in (0, 1))
T = o.simplex(N, K)


def top(probs, size): return (found := probs.log().topk(size)).indices, found.values


def outcomes(p, q, size, rest):
    "`[(p, q)]` of one row: what is told apart, from sorted lists."
    order = sorted(range(len(p)), key=lambda k: -float(p[k]))
    first, others = order[:size], order[size:]
    r = math.fsum(float(p[k]) for k in others)
    if rest == 'bucket': return [(float(p[k]), q[k]) for k in first] + [(r, sum(q[k] for k in others))]
    if rest == 'uniform': return [(float(p[k]), q[k]) for k in first] + [(r/len(others), q[k]) for k in others]
    return [(float(p[k])/(1 - r), q[k]) for k in first]


def literal(logits, teacher, size, rest, tau, entropy):
    rows = []
    for l, p in zip(logits/tau, teacher):
        q = [x.exp()/sum(y.exp() for y in l) for x in l]
        rows.append(sum(a*((math.log(a) if entropy else 0.) - b.log()) for a, b in outcomes(p, q, size, rest)))
    return torch.stack(rows)


@pytest.mark.parametrize('rest', RESTS)
@pytest.mark.parametrize('tau', [1., 4.])
@pytest.mark.parametrize('size', [1, 3, 5])
def test_the_top_of_a_teacher_by_loops(rest, tau, size):
    p = (V/tau).softmax(1)
    def check(f, g):
        for found, wanted in zip(o.value_and_grad(f, X), o.value_and_grad(g, X)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    check(lambda l: top_divergence(l, *top(p, size), rest=rest, temperature=tau, reduction='sum'),
          lambda l: literal(l, p, size, rest, tau, True).sum())
    check(lambda l: distillation(l, T, top(p, size), temperature=tau, rest=rest, hard_weight=.3, reduction='sum'),
          lambda l: .7*tau**2*literal(l, p, size, rest, tau, False).sum() - .3*(T*l.log_softmax(1)).sum())


@pytest.mark.parametrize('rest', RESTS)
@pytest.mark.parametrize('tau', [1., 3.])
def test_all_of_a_teacher_is_the_dense_loss(rest, tau):
    "A pair of all classes, their SparseTargets, and logits: one value and one gradient; the literal KL with its T^2."
    pair = top((V/tau).softmax(1), K)
    sparse = SparseTargets.from_log_probs(*pair, K, rest='renormalise')
    def loss(teacher): return lambda l: distillation(l, T, teacher, temperature=tau, rest=rest, reduction='sum')
    def by_hand(l):
        p, log_q = (V/tau).softmax(1), (l/tau).log_softmax(1)
        return .9*tau**2*(p*(p.log() - log_q) - p*p.log()).sum() - .1*(T*l.log_softmax(1)).sum()
    wanted = o.value_and_grad(by_hand, X)
    for teacher in (V, pair, sparse):
        found = o.value_and_grad(loss(teacher), X)
        for a, b in zip(found, wanted): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize('rest', ['uniform', 'renormalise'])
def test_sparse_targets_are_a_teacher(rest):
    "The literal dense cross-entropy with the rows that SparseTargets stand for; no gradient to the teacher."
    ids, log_probs = top((V/2).softmax(1), 2)
    sparse = SparseTargets.from_log_probs(ids, log_probs, K, rest)
    wanted = -4*(sparse.dense()*(X/2).log_softmax(1)).sum(1)
    for teacher in (sparse, (ids, log_probs)):
        found = distillation(X, None, teacher, temperature=2., hard_weight=0., rest=rest, reduction='none')
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weights = sparse.weights.clone().requires_grad_()
    x = X.clone().requires_grad_()
    distillation(x, None, SparseTargets(ids, weights, sparse.epsilon, K), hard_weight=0.).backward()
    assert weights.grad is None and x.grad.abs().max() > 0
    log_probs = log_probs.clone().requires_grad_()
    distillation(x, None, (ids, log_probs), hard_weight=0.).backward()
    assert log_probs.grad is None


# ---------------------------------------------------------------- the student's optimum
P = torch.tensor([[.5, .3, .15, .05]], dtype=torch.float64)


def optimum(rest, tau, hard_weight, steps=3000):
    l = torch.zeros(1, 4, dtype=torch.float64)
    def loss(x): return distillation(x, P, top(P, 2), temperature=tau, rest=rest, hard_weight=hard_weight)
    for _ in range(steps): l = l - torch.func.grad(loss)(l)/tau  # the slope falls like 1/T, times T^2
    return (l/tau).softmax(1)


COMPLETED, CUT = (torch.tensor([t], dtype=torch.float64) for t in ([.5, .3, .1, .1], [.625, .375, 0., 0.]))


@pytest.mark.parametrize('rest, tau, hard_weight, wanted', [
    ('uniform', 1., 0., COMPLETED), ('uniform', 2., 0., COMPLETED), ('uniform', 1., .25, .75*COMPLETED + .25*P),
    ('bucket', 1., .25, P), ('renormalise', 1., .25, .75*CUT + .25*P)])
def test_what_the_rest_does_to_the_student(rest, tau, hard_weight, wanted):
    "Enumerated: with labels of mean p, only the bucket leaves them their word on the rest."
    torch.testing.assert_close(optimum(rest, tau, hard_weight), wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize('tau', [1., 2.])
def test_optima_that_are_not_one_point(tau):
    "A bucket has as many as there are splits of the rest; renormalising has none, and goes on."
    for share in (.1, .5, .75):
        q = torch.tensor([[.5, .3, .2*share, .2*(1-share)]], dtype=torch.float64)
        value, (grad,) = o.value_and_grad(lambda l: top_divergence(l, *top(P, 2), temperature=tau), tau*q.log())
        assert 0 <= value < 1e-15 and grad.abs().max() < 1e-15
        other = top_divergence(tau*q.log(), *top(P, 2), rest='uniform', temperature=tau)
        assert other.item() == pytest.approx(-.1*math.log(2*share) - .1*math.log(2*(1-share)), abs=1e-12)
    early, late = (optimum('renormalise', tau, 0., steps) for steps in (300, 3000))
    torch.testing.assert_close(late, CUT, rtol=0, atol=2e-3)
    assert late[0, 2:].sum() < early[0, 2:].sum()/5 < 1e-2


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize('rest', RESTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_divergence_is_never_negative(rest, dtype):
    "Near the teacher, in any precision; and it is the divergence: the naive sum in float64."
    g = o.generator(0)
    teacher = (3*torch.randn(400, 50, generator=g, dtype=dtype)).log_softmax(1)
    values, ids = teacher.topk(5)
    for size in (0., 1e-5, 1e-3, .3, 30.):
        student = teacher + size*torch.randn(400, 50, generator=g, dtype=dtype)
        rows = top_divergence(student, ids, values, rest=rest, reduction='none')
        assert (rows >= 0).all() and rows.isfinite().all()
        if rest == 'bucket' and size == 0.: assert rows.max() < (1e-8 if dtype == torch.float32 else 1e-22)
        if dtype == torch.float64 and rest == 'bucket':
            p = torch.cat([values.exp(), 1 - values.exp().sum(1, keepdim=True)], 1)
            q = student.softmax(1).gather(1, ids)
            log_q = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1).log()
            naive = (p*(p.log() - log_q)).sum(1)
            good = q.sum(1) < 1 - 1e-7  # elsewhere 1 - sum has lost its digits
            assert good.sum() > 50
            torch.testing.assert_close(rows[good], naive[good], rtol=1e-6, atol=1e-12)


def test_tails_of_students_in_single_precision():
    "K = 50,000, 32 listed: the student's log rest from 32-bit logits, against fifty digits; 1 - sum is another number."
    x = 1.5*torch.randn(1, 50_000, generator=o.generator(1), dtype=torch.float64)
    x[0, 7:10] += torch.tensor([24.5, 25.2, 23.7], dtype=torch.float64)
    ids = x.topk(32).indices
    single = x.float()
    with mpmath.workdps(50):
        terms = [mpmath.exp(mpmath.mpf(float(v))) for v in single[0]]
        listed = mpmath.fsum(terms[i] for i in ids[0].tolist())
        truth = float(mpmath.log((mpmath.fsum(terms) - listed)/mpmath.fsum(terms)))
    assert truth < -13.5
    rest = torch.full((1, 32), math.log(.5/32))  # half of the teacher's mass is not listed
    found = top_divergence(single, ids, rest)
    logq = single.double().log_softmax(1)
    wanted = (.5*(math.log(.5) - truth) + (.5/32*(math.log(.5/32) - logq.gather(1, ids))).sum()).item()
    assert found.item() == pytest.approx(wanted, rel=1e-6)
    naive = (1 - single.softmax(1).gather(1, ids).sum()).log()
    assert not abs(naive.item() - truth) < .01
    grads = [o.value_and_grad(lambda l: top_divergence(l, ids, rest), l)[1][0] for l in (single, single.double())]
    others = torch.ones(50_000, dtype=torch.bool).index_fill(0, ids[0], False)
    for part in (others, ~others):
        torch.testing.assert_close(grads[0][0, part].double(), grads[1][0, part], rtol=1e-4, atol=1e-9)


def test_masked_classes_empty_slots_and_nothing_left():
    "A class score of -inf where the teacher has no mass; a slot of -inf; all classes listed: finite, with gradients."
    l = torch.tensor([[1., 0., -.5, -math.inf], [1., 0., -.5, .3]], dtype=torch.float64)
    ids, values = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[.6, .4], [.9, 0.]], dtype=torch.float64).log()
    value, (grad,) = o.value_and_grad(lambda l: top_divergence(l, ids, values, reduction='sum'), l)
    q = l.softmax(1)
    first = .6*(.6/q[0, 0]).log() + .4*(.4/q[0, 1]).log()
    second = .9*(.9/q[1, 2]).log() + .1*(.1/(1 - q[1, 2])).log()
    assert value.item() == pytest.approx((first + second).item(), rel=1e-12) and grad.isfinite().all()
    for rest in RESTS:
        every = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[.4, .3, .2, .1]], dtype=torch.float64).log()
        value, (grad,) = o.value_and_grad(lambda l: top_divergence(l, *every, rest=rest), l[1:])
        assert value.item() == pytest.approx((every[1].exp()*(every[1] - l[1:].log_softmax(1))).sum().item(), rel=1e-12)
        assert grad.isfinite().all()
    rounded = every[1].float() - 1e-8  # to 32 bits a sum of one
    assert top_divergence(l[1:], every[0], rounded).item() == pytest.approx(value.item(), abs=1e-6)
    masked = torch.tensor([[0., 0., -math.inf, -math.inf]], dtype=torch.float64)  # all of the rest is impossible
    assert top_divergence(masked, torch.tensor([[0, 1]]), torch.tensor([[.5, .5]]).double().log()) == 0
    assert top_divergence(masked, torch.tensor([[0, 1]]), torch.tensor([[.5, .4]]).double().log()) == math.inf


@pytest.mark.parametrize('rest', RESTS)
def test_second_derivatives_and_half_precision(rest):
    ids, values = top(V.softmax(1), 3)
    assert torch.autograd.gradgradcheck(lambda l: top_divergence(l, ids, values, rest=rest), X.clone().requires_grad_())
    low = top_divergence(X.bfloat16(), ids, values.float(), rest=rest)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, top_divergence(X.bfloat16().float(), ids, values.float(), rest=rest))


def test_module_is_the_function():
    pair = top(V.softmax(1), 2)
    for rest in RESTS:
        module = copy.deepcopy(Distillation(2., .2, 'sum', rest=rest))
        o.same(module(X, T, pair), distillation(X, T, pair, temperature=2., hard_weight=.2, rest=rest, reduction='sum'))
    o.same(Distillation()(X, T, pair), Distillation(rest='bucket')(X, T, pair))


@pytest.mark.parametrize('call, message', [
    (lambda: Distillation(rest='drop'), "rest must be 'bucket', 'uniform' or 'renormalise', got 'drop'"),
    (lambda: distillation(X, T, V, rest=None), "rest must be 'bucket', .*, got None"),
    (lambda: distillation(X, T, (V, V, V)), r'teacher_logits must be .* a pair \(ids, log_probs\), got a tuple of 3'),
    (lambda: top_divergence(X, *top(V.softmax(1)[:3], 2)), 'ids must have 5 rows like the logits, got 3'),
    (lambda: top_divergence(X, torch.full((N, 1), K), torch.zeros(N, 1)), r'ids must be in \[0, 6\)'),
    (lambda: top_divergence(X, torch.zeros(N, 2).long(), torch.full((N, 2), -1.)), 'ids must hold a class once a row'),
    (lambda: top_divergence(X, torch.tensor([[0, 1]]*N), torch.zeros(N, 2)), 'log_probs must have a mass in'),
    (lambda: top_divergence(X, torch.zeros(N, 1).long(), torch.full((N, 1), -5.), rest='uniform'), 'most probable'),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message): call()
