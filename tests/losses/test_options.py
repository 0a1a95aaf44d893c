"What people expect of a torch loss: ignored rows, weights, smoothing, shapes. Literal oracles, float64, every loss."
import itertools

import pytest
import torch
import torch.nn.functional as F

import oracles as o
from softnce.losses import (NLL, ExpectedInfoNCE, InfoNCE, SoftDistributionInfoNCE, SoftTargetCrossEntropy,
                            SoftTargetInfoNCE, expected_info_nce, info_nce, linear_expected_info_nce,
                            linear_soft_target_cross_entropy, linear_soft_target_info_nce, nll,
                            soft_distribution_info_nce, soft_target_cross_entropy, soft_target_info_nce)
from softnce.noise import ClosedForm, Fresh, InBatch, Queue
from softnce.rows import row_count
from softnce.targets import SparseTargets, mix, sample_labels, smooth

N, K, D, TAU, IGNORED = 6, 4, 3, .7, -100
DOUBLE = torch.float64
ETA, W = o.noise(K), torch.tensor([1., .5, 3., 2.], dtype=DOUBLE)
A = torch.tensor([.5, 2., 1., 3., .25, 1.], dtype=DOUBLE)
LEFT_OUT = [1, 4]  # rows that are ignored where some are
CROSS, NOISY = ('nll', 'ce', 'linear ce'), ('info', 'soft', 'drawn', 'expected', 'linear soft', 'linear expected')
LOSSES = dict(nll=nll, ce=soft_target_cross_entropy, info=info_nce, soft=soft_target_info_nce,
              drawn=soft_distribution_info_nce, expected=expected_info_nce)
LINEAR = {'linear ce': linear_soft_target_cross_entropy, 'linear soft': linear_soft_target_info_nce,
          'linear expected': linear_expected_info_nce}
DRAWS = 'drawn', 'expected', 'linear expected'
CASES = [(name, kind) for name in CROSS + NOISY for kind in ('ids', 'dense', 'sparse', 'smooth', 'varied')
         if name not in ('nll', 'info') or kind == 'ids']
COMBINATIONS = [set(c) for n in range(5) for c in itertools.combinations(('weight', 'sample', 'ignore', 'smooth'), n)]


def targets_of(kind):
    "Targets of every kind, without ignored rows."
    y, lam = o.ids(N, K), torch.tensor([.3, .9, .6, 1., .45, .8], dtype=DOUBLE)
    if kind == 'ids': return y
    if kind == 'dense': return o.simplex(N, K)
    sparse = mix(SparseTargets.from_labels(y, K, DOUBLE), lam)
    if kind == 'sparse': return sparse
    if kind == 'smooth': return smooth(sparse, .2)
    return smooth(sparse, torch.linspace(0, .5, N, dtype=DOUBLE))


def ignoring(t, rows=LEFT_OUT, index=IGNORED):
    "The same with rows that are ignored."
    t, rows = (t.clone() if torch.is_tensor(t) else t), torch.tensor(rows)
    if not torch.is_tensor(t):
        return SparseTargets(t.indices, t.weights.index_fill(0, rows, 0.), t.epsilon, K, validate=False)
    return t.index_fill_(0, rows, index if t.ndim == 1 else 0.)


def dense(t): return t.dense() if isinstance(t, SparseTargets) else F.one_hot(t, K).double() if t.ndim == 1 else t


def run(name, x, t, given, **kw):
    "A loss of logits `x`, through the identity as a head where it is a linear form."
    if name not in CROSS: kw = dict(noise_probs=ETA) | kw
    if name in DRAWS and 'generator' not in kw: kw['generator'] = o.generator(7)
    if name in LINEAR:
        given = {('class_weight' if k == 'weight' else k): v for k, v in given.items()}
        return LINEAR[name](x, torch.eye(K, dtype=DOUBLE), t, temperature=TAU, **given, **kw)
    return LOSSES[name](x, t, temperature=TAU, **given, **kw)


def case(kind, chosen):
    "Options of a call, its targets, and what they mean: kept rows, smoothed targets, what each row counts."
    t, given = targets_of(kind), {}
    kept = [i for i in range(N) if 'ignore' not in chosen or i not in LEFT_OUT]
    if 'weight' in chosen: given['weight'] = W
    if 'sample' in chosen: given['sample_weight'] = A
    if 'smooth' in chosen: given['label_smoothing'] = .1
    soft = t if 'smooth' not in chosen else smooth(SparseTargets.from_labels(t, K, DOUBLE) if kind == 'ids' else t, .1)
    w, a = W if 'weight' in chosen else torch.ones(K, dtype=DOUBLE), A if 'sample' in chosen else torch.ones(N).double()
    count = sum(a[i]*(w[t[i]] if kind == 'ids' else 1.) for i in kept)
    if 'ignore' in chosen: given['ignore_index'], t = IGNORED, ignoring(t)
    return t, given, kept, soft, w, a, count


def literal(name, x, kept, soft, w, a):
    "Each kept row's loss by loops over candidates and classes."
    alpha, s = dense(soft), o.scores(x, None if name in CROSS else ETA, TAU)
    labels = sample_labels(soft[torch.tensor(kept)], o.generator(7)) if name in DRAWS else None
    rows = {}
    for m, i in enumerate(kept):
        if name in CROSS:
            norm = o.log_sum_exp(list(s[i]))
            rows[i] = sum(w[k]*alpha[i, k]*(norm - s[i][k]) for k in range(K))
        elif name == 'drawn':
            rows[i] = w[labels[m]]*o.position_loss([s[i][int(y)] for y in labels], m)
        elif 'expected' in name:
            noise = [s[i][int(y)] for n, y in enumerate(labels) if n != m]
            rows[i] = sum(w[k]*alpha[i, k]*(o.log_sum_exp([s[i][k], *noise]) - s[i][k]) for k in range(K))
        else:
            mass = sum(w[k]*alpha[i, k] for k in range(K))
            rows[i] = mass*o.position_loss([o.energy(alpha[j], s[i]) for j in kept], m)
        rows[i] = a[i]*rows[i]
    return torch.stack([rows.get(i, 0*x[i, 0]) for i in range(N)])


def put_together(rows, count, reduction):
    return rows if reduction == 'none' else rows.sum() if reduction == 'sum' else rows.sum()/count


@pytest.mark.parametrize('name, kind', CASES)
def test_all_options_by_loops(name, kind):
    for chosen in COMBINATIONS:
        t, given, kept, soft, w, a, count = case(kind, chosen)
        x = o.logits(N, K)
        rows = literal(name, x, kept, soft, w, a)
        for reduction in ('none', 'sum', 'mean'):
            got, (slope,) = o.value_and_grad(lambda x: run(name, x, t, given, reduction=reduction), x)
            wanted = put_together(rows, count, reduction)
            weight = torch.linspace(.5, 1.5, wanted.numel(), dtype=DOUBLE).reshape(wanted.shape)
            o.same(got, wanted.detach())
            o.same(slope, torch.autograd.grad((weight*wanted).sum(), x, retain_graph=True)[0])


@pytest.mark.parametrize('name, kind', [c for c in CASES if c[0] not in DRAWS or c[1] == 'ids'])
def test_rows_that_keep_their_places(name, kind):
    "Inside torch.func nothing is taken out: the same values and gradients, also of NaN and inf in ignored logits."
    x = o.logits(N, K).detach()
    broken = x.index_fill(0, torch.tensor(LEFT_OUT[:1]), float('nan'))
    broken[LEFT_OUT[1], 0] = float('inf')
    for chosen in COMBINATIONS:
        if name in DRAWS and 'smooth' in chosen: continue  # other draws
        t, given, kept, soft, w, a, count = case(kind, chosen)
        for reduction in ('sum', 'mean'):
            value = lambda x: run(name, x, t, given, reduction=reduction)
            at = broken if 'ignore' in chosen and not name.startswith('linear') else x
            grad, got = torch.func.grad_and_value(value)(at)
            wanted, (slope,) = o.value_and_grad(value, x)
            o.same(got, wanted)
            o.same(grad, 2*slope)  # of half the value


@pytest.mark.parametrize('name, kind', CASES)
def test_ignored_logits_may_be_anything(name, kind):
    x = o.logits(N, K).detach()
    t = ignoring(targets_of(kind))
    for value in (float('nan'), float('inf'), -float('inf'), 1e300):
        spoiled = x.index_fill(0, torch.tensor(LEFT_OUT), value)
        for reduction in ('none', 'mean'):
            loss = lambda x: run(name, x, t, dict(ignore_index=IGNORED), reduction=reduction)
            (got, (slope,)), (wanted, (other,)) = o.value_and_grad(loss, spoiled), o.value_and_grad(loss, x)
            o.same(got, wanted)
            o.same(slope, other)
            assert (slope[LEFT_OUT] == 0).all()


@pytest.mark.parametrize('name, kind', CASES)
def test_a_batch_of_ignored_rows(name, kind):
    t = ignoring(targets_of(kind), range(N))
    for call in (lambda f, x: o.value_and_grad(f, x), lambda f, x: tuple(reversed(torch.func.grad_and_value(f)(x)))):
        value, slope = call(lambda x: run(name, x, t, dict(ignore_index=IGNORED), reduction='sum'), o.logits(N, K))
        assert value == 0 and (slope[0] == 0).all()
        value, _ = call(lambda x: run(name, x, t, dict(ignore_index=IGNORED)), o.logits(N, K))
        assert value.isnan()
    rows = run(name, o.logits(N, K), t, dict(ignore_index=IGNORED), reduction='none')
    assert rows.shape == (N,) and (rows == 0).all()


# ---------------------------------------------------------------- as PyTorch
@pytest.mark.parametrize('reduction', ['none', 'sum', 'mean'])
@pytest.mark.parametrize('shape', [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_cross_entropies_are_those_of_pytorch(shape, reduction):
    g = o.generator(5)
    x = torch.randn(N, K, *shape, generator=g, dtype=DOUBLE)
    y = torch.randint(K, (N, *shape), generator=g)
    p = torch.rand(N, K, *shape, generator=g, dtype=DOUBLE).softmax(1)
    y[0], y[2] = IGNORED, 1
    for weight, eps, index in itertools.product((None, W), (0., .1, 1.), (IGNORED, 1)):
        ids = y if index == IGNORED else y.clamp(min=0)  # an index inside the classes is allowed
        kw = dict(weight=weight, label_smoothing=eps, reduction=reduction)
        for loss in (nll, soft_target_cross_entropy):
            o.same_value_and_grad(lambda x: loss(x, ids, ignore_index=index, **kw),
                                  lambda x: F.cross_entropy(x, ids, ignore_index=index, **kw), x)
        o.same_value_and_grad(lambda x: soft_target_cross_entropy(x, p, **kw),
                              lambda x: F.cross_entropy(x, p, **kw), x)


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('kind', ['ids', 'dense', 'sparse'])
def test_positions_are_rows(name, kind):
    if name in ('nll', 'info') and kind != 'ids': return
    g = o.generator(6)
    x, flat = torch.randn(2, K, 3, generator=g, dtype=DOUBLE), targets_of(kind)
    t = flat if kind == 'sparse' else flat.reshape(2, 3) if kind == 'ids' else flat.reshape(2, 3, K).movedim(-1, 1)
    given = dict(weight=W, sample_weight=A.reshape(2, 3), label_smoothing=.1)
    for reduction in ('none', 'mean'):
        rows = lambda x: run(name, x.movedim(1, -1).reshape(6, K), flat, given | dict(sample_weight=A),
                             reduction=reduction)
        whole = lambda x: run(name, x, t, given, reduction=reduction)
        o.same_value_and_grad(whole, lambda x: rows(x).reshape(2, 3) if reduction == 'none' else rows(x), x)


@pytest.mark.parametrize('name', LINEAR)
@pytest.mark.parametrize('kind', ['ids', 'dense', 'sparse'])
def test_embeddings_of_any_shape(name, kind):
    g, flat = o.generator(6), targets_of(kind)
    z = torch.randn(2, 3, K, generator=g, dtype=DOUBLE)
    t = flat if kind == 'sparse' else flat.reshape(2, 3) if kind == 'ids' else flat.reshape(2, 3, K)
    given = dict(weight=W, sample_weight=A.reshape(2, 3), label_smoothing=.1)
    for reduction in ('none', 'mean'):
        rows = lambda z: run(name, z.reshape(6, K), flat, given | dict(sample_weight=A), reduction=reduction)
        whole = lambda z: run(name, z, t, given, reduction=reduction)
        o.same_value_and_grad(whole, lambda z: rows(z).reshape(2, 3) if reduction == 'none' else rows(z), z)


# ---------------------------------------------------------------- smoothing at the door
@pytest.mark.parametrize('name, kind', [c for c in CASES if c[0] not in ('nll', 'info')])
def test_smoothing_is_smooth(name, kind):
    t = targets_of(kind)
    smoothed = smooth(SparseTargets.from_labels(t, K, DOUBLE) if kind == 'ids' else t, .1)
    for given in ({}, dict(sample_weight=A)):
        for reduction in ('none', 'sum', 'mean'):
            x = o.logits(N, K)
            at_door = run(name, x, t, given | dict(label_smoothing=.1), reduction=reduction)
            assert torch.equal(at_door, run(name, x, smoothed, given, reduction=reduction))


def test_smoothed_labels_of_the_losses_of_ids():
    x, y = o.logits(N, K), targets_of('ids')
    for reduction in ('none', 'mean'):
        kw = dict(label_smoothing=.1, reduction=reduction)
        assert torch.equal(nll(x, y, **kw), soft_target_cross_entropy(x, y, **kw))
        assert torch.equal(info_nce(x, y, noise_probs=ETA, **kw), soft_target_info_nce(x, y, noise_probs=ETA, **kw))


# ---------------------------------------------------------------- what other candidates do
SOURCES = dict(extra=lambda: torch.tensor([0, 2, 2]), queue=lambda: Queue(8),
               fresh=lambda: Fresh(5, generator=o.generator(1)), closed=ClosedForm, local=lambda: InBatch(ranks='own'))


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('name, kind', [c for c in CASES if c[0] in NOISY and c[0] not in DRAWS or c == ('drawn', 'ids')
                                        or c[0] in ('expected', 'linear expected') and c[1] == 'ids'])
def test_a_batch_without_its_ignored_rows(name, kind, source):
    "Two steps with a source: those of the kept rows alone, which is all that a queue remembers."
    x, t = o.logits(N, K).detach(), targets_of(kind)
    kept = torch.tensor([i for i in range(N) if i not in LEFT_OUT])
    with_ignored, alone = SOURCES[source](), SOURCES[source]()
    for _ in range(2):
        o.same_value_and_grad(lambda x: run(name, x, ignoring(t), dict(ignore_index=IGNORED),
                                            noise_samples=with_ignored),
                              lambda x: run(name, x[kept], t[kept], {}, noise_samples=alone), x)


def test_a_queue_keeps_no_ignored_rows():
    queue = Queue(8)
    info_nce(o.logits(N, K), ignoring(targets_of('ids')), noise_samples=queue, ignore_index=IGNORED)
    assert len(queue.targets) == N - len(LEFT_OUT)


@pytest.mark.parametrize('name, kind', [c for c in CASES if c[0] in NOISY and c[0] not in DRAWS])
def test_a_row_of_weight_zero_is_a_candidate(name, kind):
    "And its logits may be anything; without it the others' losses are less."
    x, t = o.logits(N, K).detach(), targets_of(kind)
    a = torch.ones(N, dtype=DOUBLE).index_fill(0, torch.tensor(LEFT_OUT), 0.)
    rows = run(name, x, t, {}, reduction='none')
    spoiled = x.index_fill(0, torch.tensor(LEFT_OUT), float('nan'))
    for at in (x, spoiled):
        value, (slope,) = o.value_and_grad(lambda x: run(name, x, t, dict(sample_weight=a), reduction='none'), at)
        o.same(value, a*rows)
        assert slope.isfinite().all() and (slope[LEFT_OUT] == 0).all()
    ignored = run(name, x, ignoring(t), dict(ignore_index=IGNORED), reduction='none')
    assert (ignored <= value).all() and (ignored < value - 1e-3).any()
    o.same(run(name, x, t, dict(sample_weight=a)), (a*rows).sum()/a.sum())


@pytest.mark.parametrize('name, kind', CASES)
def test_masked_classes_with_options(name, kind):
    "A class of score -inf costs nothing where no kept row has mass on it."
    x, y = o.logits(N, K).detach(), targets_of('ids')
    y = torch.where(y == 3, 0, y)
    alpha = F.normalize(dense(targets_of('dense'))*torch.tensor([1., 1, 1, 0]).double(), p=1)
    t = {'ids': y, 'dense': alpha}.get(kind, mix(SparseTargets.from_labels(y, K, DOUBLE), .6))
    given = dict(weight=W, sample_weight=A, ignore_index=IGNORED)
    loss = lambda value: lambda x: run(name, x.index_fill(1, torch.tensor([3]), value), ignoring(t), given)
    if name.startswith('linear'):
        eye, bias = torch.eye(K, dtype=DOUBLE), torch.zeros(K, dtype=DOUBLE)
        kw = {} if name in CROSS else dict(noise_probs=ETA)
        if name in DRAWS: kw |= dict(generator=None)
        def loss(value):
            shift = bias.index_fill(0, torch.tensor([3]), value)
            def of(x):
                torch.manual_seed(0)
                return LINEAR[name](x, eye, ignoring(t), bias=shift, class_weight=W, sample_weight=A,
                                    ignore_index=IGNORED, **kw)
            return of
    (masked, (slope,)), (far, (other,)) = (o.value_and_grad(loss(v), x) for v in (-float('inf'), -1e4))
    assert masked.isfinite()
    o.same(masked, far)
    o.same(slope, other)


# ---------------------------------------------------------------- class weights and the read-out
def optimum(mean_loss, rows):
    "Logits at which a mean loss is least."
    logits = torch.zeros(rows, 3, dtype=DOUBLE, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-14, tolerance_change=1e-18,
                                  line_search_fn='strong_wolfe')
    optimizer.step(lambda: (optimizer.zero_grad(), value := mean_loss(logits), value.backward())[1])
    return logits.detach()


P = torch.tensor([[.7, .2, .1], [.1, .3, .6]], dtype=DOUBLE)  # p(k|x) of two equally likely inputs
LAW, WEIGHT = P.mean(0), torch.tensor([1., 4., .5], dtype=DOUBLE)


@pytest.mark.parametrize('epsilon', [0., .2])
@pytest.mark.parametrize('module', [NLL, SoftTargetCrossEntropy, InfoNCE, SoftTargetInfoNCE, SoftDistributionInfoNCE,
                                    ExpectedInfoNCE])
def test_probs_undo_class_weights_and_smoothing(module, epsilon):
    "The exact mean over labels of an anchor and one other row, minimised, and read by a module that knows its options."
    known = dict(weight=WEIGHT, label_smoothing=epsilon)
    cross = module in (NLL, SoftTargetCrossEntropy)
    loss = module(**known) if cross else module(LAW, **known)
    soft = (1-epsilon)*torch.eye(3, dtype=DOUBLE) + epsilon/3
    whole = module is SoftTargetInfoNCE or module is InfoNCE
    def mean_loss(logits):
        s, total = logits if cross else logits - LAW.log(), 0.
        for x, y in itertools.product(range(2), range(3)):
            if cross:
                total = total - P[x, y]*(WEIGHT*soft[y]*s[x].log_softmax(0)).sum()
                continue
            for m in range(3):
                if whole:
                    u = soft @ s[x]
                    total = total + P[x, y]*LAW[m]*(WEIGHT @ soft[y])*(torch.logaddexp(u[y], u[m]) - u[y])
                else:
                    noise = (LAW @ soft)
                    for k, n in itertools.product(range(3), range(3)):
                        drawn = torch.logaddexp(s[x, k], s[x, n]) - s[x, k]
                        total = total + P[x, y]*soft[y, k]*noise[n]*WEIGHT[k]*drawn
        return total/2
    logits = optimum(mean_loss, 2)
    torch.testing.assert_close(loss.probs(logits), P, rtol=0, atol=2e-6)
    assert (module(*[] if cross else [LAW]).probs(logits, epsilon=epsilon) - P).abs().max() > .05


def test_votes_with_class_weights():
    "By the ratio E[w alpha]/E[w]: a mean of two votes, read with class weights, under a cross-entropy and its kin."
    pairs = torch.cartesian_prod(*[torch.arange(3)]*2)
    votes, p = F.one_hot(pairs, 3).double().mean(1), P[0]
    law = WEIGHT*p/(WEIGHT @ p)
    slope = torch.func.grad(lambda l: p[pairs].prod(1) @ soft_target_cross_entropy(l.expand(9, 3), votes, weight=WEIGHT,
                                                                                     reduction='none'))(law.log())
    o.same(slope, torch.zeros(3, dtype=DOUBLE))
    o.same(SoftTargetCrossEntropy(weight=WEIGHT).probs(law.log()[None], targets='votes')[0], p)
    o.same(ExpectedInfoNCE(LAW, weight=WEIGHT).probs(law.log()[None], targets='votes')[0], p)
    closed = SoftTargetInfoNCE(LAW, weight=WEIGHT, noise_samples=ClosedForm())
    with pytest.raises(ValueError, match="targets='votes' cannot be read from soft target InfoNCE with class weights"):
        closed.probs(law.log()[None], targets='votes')
    o.same(closed.probs(p.log()[None], targets='teacher')[0], p)  # a function of x: rows weighted, targets as they are
    o.same(closed.probs(law.log()[None], targets='labels')[0], p)
    with pytest.raises(ValueError, match='weight must be positive for all classes to read .* class 1'):
        NLL(weight=torch.tensor([1., 0., 2.])).probs(torch.zeros(1, 3))


@pytest.mark.parametrize('module', [NLL, InfoNCE, SoftTargetInfoNCE, ExpectedInfoNCE])
def test_read_outs_have_the_shape_of_the_logits(module):
    loss, x = module(label_smoothing=.1), o.logits(2*3, K).detach()
    many = x.reshape(2, 3, K).movedim(-1, 1)
    o.same(loss.probs(many), loss.probs(x).reshape(2, 3, K).movedim(-1, 1))
    o.same(loss.probs(x), module().probs(x, epsilon=.1) if module is not InfoNCE
           else SoftTargetInfoNCE().probs(x, epsilon=.1))
    o.same(loss.probs(x, epsilon=0.), module().probs(x))  # what is said goes before what is known


# ---------------------------------------------------------------- modules
@pytest.mark.parametrize('module, name', [(NLL, 'nll'), (SoftTargetCrossEntropy, 'ce'), (InfoNCE, 'info'),
                                          (SoftTargetInfoNCE, 'soft'), (SoftDistributionInfoNCE, 'drawn'),
                                          (ExpectedInfoNCE, 'expected')])
def test_modules(module, name):
    x, t = o.logits(N, K), ignoring(targets_of('ids'))
    known = dict(weight=W, ignore_index=IGNORED, label_smoothing=.1)
    extra = {} if module in (NLL, SoftTargetCrossEntropy) else dict(noise_probs=ETA)
    if name in DRAWS: extra['generator'] = o.generator(7)
    loss = module(temperature=TAU, **known, **extra)
    assert torch.equal(loss(x, t, sample_weight=A), run(name, x, t, known | dict(sample_weight=A)))
    if name in DRAWS: loss.generator = o.generator(7)
    total = loss(x, t, sample_weight=A, reduction='sum')
    o.same(total/loss.count(t, sample_weight=A), run(name, x, t, known | dict(sample_weight=A)))
    again = module(temperature=TAU, **{k: v for k, v in known.items() if k != 'weight'}, weight=torch.ones(K).double(),
                   **{k: v for k, v in extra.items() if k != 'generator'})
    again.load_state_dict(loss.state_dict())
    o.same(again.weight, W)
    assert 'weight' not in module().state_dict() and 'ignore_index=-100' in repr(loss)


# ---------------------------------------------------------------- parts of a batch
@pytest.mark.parametrize('name, kind', CASES)
def test_sums_over_parts_divided_by_what_all_rows_count(name, kind):
    "Cross-entropies and independent noise: parts with unlike numbers of ignored rows, one of which has no other."
    if name in NOISY and name in DRAWS: return
    x, t = o.logits(N, K), ignoring(targets_of(kind), [0, 1, 4])
    kw = dict(noise_samples=ClosedForm()) if name in NOISY else {}
    whole = run(name, x, t, dict(weight=W, sample_weight=A, ignore_index=IGNORED), **kw)
    parts = [slice(0, 2), slice(2, 3), slice(3, 6)]
    sums = [run(name, x[s], t[s], dict(weight=W, sample_weight=A[s], ignore_index=IGNORED), reduction='sum', **kw)
            for s in parts]
    count = sum(row_count(t[s], weight=W, sample_weight=A[s], ignore_index=IGNORED) for s in parts)
    o.same(sum(sums)/count, whole)


def test_counts():
    y = ignoring(targets_of('ids'))
    kept = [i for i in range(N) if i not in LEFT_OUT]
    assert row_count(y) == N and row_count(y, ignore_index=IGNORED) == len(kept)
    o.same(row_count(y, ignore_index=IGNORED, weight=W, sample_weight=A), sum(A[i]*W[y[i]] for i in kept))
    o.same(row_count(ignoring(targets_of('dense')), ignore_index=0, weight=W, sample_weight=A), A[kept].sum())
    o.same(row_count(ignoring(targets_of('sparse')), ignore_index=0, weight=W), torch.tensor(4.).double())
    many = o.simplex(12, K).reshape(2, 3, 2, K)
    assert row_count(many, class_dim=-1) == row_count(many.movedim(-1, 1)) == 12 == row_count(torch.zeros(3, 4).long())


# ---------------------------------------------------------------- temperature
@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name, kind', [(n, 'ids' if n in ('nll', 'info') else 'dense') for n in CROSS + NOISY])
def test_the_gradient_of_a_learned_temperature(name, kind, compiled):
    "CLIP's logit scale: a Parameter, its gradient that of the loss divided through, value and slope."
    x, t = o.logits(N, K).detach(), targets_of(kind)
    def value(log_scale):
        kw = dict(temperature=(-log_scale).exp())
        if name not in CROSS: kw['noise_probs'] = ETA
        if name in DRAWS: torch.manual_seed(0)
        if name in LINEAR: return LINEAR[name](x, torch.eye(K, dtype=DOUBLE), t, **kw)
        return LOSSES[name](x, t, **kw)
    f = torch.compile(value, backend='eager') if compiled else value
    log_scale = torch.nn.Parameter(torch.tensor(.4, dtype=DOUBLE))
    slope, = torch.autograd.grad(f(log_scale), log_scale)
    h = 1e-6
    numeric = (value(log_scale.detach() + h) - value(log_scale.detach() - h))/(2*h)
    if not (compiled and name in DRAWS): torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-9)
    assert slope.isfinite() and slope != 0


# ---------------------------------------------------------------- compiled
@pytest.mark.parametrize('name, kind', [(n, k) for n, k in CASES if n not in DRAWS or k == 'ids'])
@pytest.mark.slow
def test_compiled_with_options(name, kind):
    "One graph without a break, at most two over batch sizes."
    torch._dynamo.reset()
    graphs = []
    def backend(gm, _):
        graphs.append(gm)
        return gm.forward
    given = dict(weight=W, ignore_index=IGNORED, label_smoothing=0. if name in DRAWS else .1)
    drawn = dict(generator=None) if name in DRAWS else {}
    f = torch.compile(lambda x, t, a: run(name, x, t, given | dict(sample_weight=a), **drawn), fullgraph=True,
                      backend=backend)
    for n in (N, 5, 4, 3):
        x, t = o.logits(N, K).detach()[:n].requires_grad_(), ignoring(targets_of(kind))[:n]
        value = f(x, t, A[:n])
        wanted = run(name, x, t, given | dict(sample_weight=A[:n]))
        o.same(value, wanted)
        o.same(torch.autograd.grad(value, x)[0], torch.autograd.grad(wanted, x)[0])
    assert len(graphs) <= 2


# ---------------------------------------------------------------- what is refused
def refuses(match): return pytest.raises(ValueError, match=match)


@pytest.mark.parametrize('name', CROSS + NOISY)
def test_errors(name):
    x, t, weight = o.logits(N, K).detach(), targets_of('ids'), 'class_weight' if name in LINEAR else 'weight'
    call = lambda t=t, x=x, **given: run(name, x, t, given)
    with refuses(f'^{weight} must be numbers of shape \\(4,\\), got .* \\(3,\\)'): call(weight=W[:3])
    with refuses(f'^{weight} must be finite and not negative, got -3'): call(weight=-W)
    with refuses(f'^{weight} must be finite and not negative'): call(weight=W/0)
    with refuses(f'^{weight} must be a tensor, got list: use torch.as_tensor'): call(weight=[1., 2., 3., 4.])
    with refuses('^sample_weight must be numbers of shape \\(6,\\), got .* \\(4,\\)'): call(sample_weight=W)
    with refuses('^sample_weight must be finite and not negative, got -3'): call(sample_weight=-A)
    for bad in (True, 1., '0', torch.tensor(1)):
        with refuses('^ignore_index must be None or an integer'): call(ignore_index=bad)
    for bad in (-.1, 1.1, float('nan')):
        with refuses(f'^label_smoothing must be in \\[0, 1\\], got {bad}'): call(label_smoothing=bad)
    with refuses(r'must be in \[0, 4\), got values from -100'): call(ignoring(t))
    with refuses(r'must be in \[0, 4\), got values from -1 '): call(torch.where(t == 1, -1, t), ignore_index=IGNORED)
    if name not in ('nll', 'info'):
        with refuses('targets must sum to 1'): call(ignoring(targets_of('dense')))
        with refuses('targets must be finite'):
            call(ignoring(targets_of('dense')).index_fill(0, torch.tensor([0]), float('nan')), ignore_index=0)
    many = x[:, None].expand(N, 2, K) if name in LINEAR else x[:, :, None].expand(N, K, 2)
    what = 'embeddings' if name in LINEAR else 'logits'
    with refuses(f'^{what} with positions \\(6, 2\\) need (targets|labels) of that shape'): call(x=many)


def test_errors_of_modules():
    with refuses('weight must be finite and not negative'): NLL(weight=-W)
    with refuses(r'weight must be a tensor of shape \(K,\), got list'): InfoNCE(weight=[1.])
    with refuses('ignore_index must be None or an integer'): SoftTargetInfoNCE(ignore_index='pad')
    with refuses(r'label_smoothing must be in \[0, 1\]'): ExpectedInfoNCE(label_smoothing=2.)
