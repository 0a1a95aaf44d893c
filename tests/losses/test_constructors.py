"""What a constructor takes, the call honours: every argument of every loss's module, alone and against literal loops.

An argument that a module cannot honour is refused where the module is made."""
import inspect
import itertools
import typing

import pytest
import torch
from torch import nn

import oracles as o
from softnce import losses, noise, peers
from softnce.noise import ClosedForm, Fresh, InBatch, Queue
from softnce.rows import RowOptions
from softnce.targets import SparseTargets, mix, sample_labels, smooth
from test_peers import adjusted_literal, contrastive_literal, cosine, cross_entropy, softmax

N, K, TAU, IGNORED = 5, 4, .7, -100
DOUBLE = torch.float64
X, V, Z = (o.logits(N, k, seed).detach() for k, seed in ((K, 0), (K, 1), (3, 2)))
T, Y, ETA, PI = o.simplex(N, K), torch.tensor([0, 2, 1, 0, 3]), o.noise(K), o.noise(K)
W, A = torch.tensor([1., .5, 3., 2.], dtype=DOUBLE), torch.tensor([.5, 2., 1., 3., .25], dtype=DOUBLE)
EXTRA, SPARSE = torch.tensor([1, 3]), mix(SparseTargets.from_labels(Y, K, DOUBLE), .8)
LEFT_OUT = [1, 4]


# ---------------------------------------------------------------- literal rows, by class
def over_classes(x, t, s):
    "One loss for each class, weighted by the target and the class weights."
    def corner(row, k):
        l = row/s['temperature']
        if s['cls'] is peers.BinaryCrossEntropy:
            return -torch.log(torch.sigmoid(l[k])) - sum(torch.log(torch.sigmoid(-l[j])) for j in range(K) if j != k)
        if s['cls'] is peers.ContinuousCategoricalNLL:  # the integral, by the textbook sum
            terms = [torch.exp(l[i])/torch.stack([l[i] - l[j] for j in range(K) if j != i]).prod() for i in range(K)]
            return torch.log(sum(terms)) - l[k]
        return o.log_sum_exp(list(l)) - l[k]
    return [sum(s['weight'][k]*t[i, k]*corner(x[i], k) for k in range(K)) for i in range(len(x))]


def over_rows(x, t, s):
    "Rows are compared with each other's targets and with the extra ones."
    found = o.soft_target_info_nce(x, t, s['noise_probs'], s['temperature'], o.dense(s['noise_samples'], K))
    return [(s['weight']*t[i]).sum()*found[i] for i in range(len(x))]


def over_draws(x, t, s):
    "A label a row is drawn; of the mean over it, only the others'."
    labels, score = sample_labels(s['drawn_from'], s['generator']), o.scores(x, s['noise_probs'], s['temperature'])
    rows = []
    for i in range(len(x)):
        noise = [score[i][int(y)] for j, y in enumerate([*labels, *s['noise_samples']]) if j != i]
        def of(k): return s['weight'][k]*(o.log_sum_exp([score[i][k], *noise]) - score[i][k])
        mean = s['cls'] is losses.ExpectedInfoNCE
        rows.append(sum(t[i, k]*of(k) for k in range(K)) if mean else of(int(labels[i])))
    return rows


def weighted_negatives(x, t, s):
    score, every = o.scores(x, s['noise_probs'], s['temperature']), [*t, *o.dense(s['noise_samples'], K)]
    rows, a = [], s['strength']
    for i in range(len(x)):
        others = [j for j in range(len(every)) if j != i]
        near = softmax([cosine(t[i], every[j])/s['similarity_temperature'] for j in others])
        terms = [o.energy(every[j], score[i]) + torch.log((1 - a*p)/(1 - a/len(others)))
                 for j, p in zip(others, near)]
        own = o.energy(t[i], score[i])
        rows.append(o.log_sum_exp([own, *terms]) - own)
    return rows


def adjusted(x, t, s): return adjusted_literal(x, t, s['temperature'], s['strength'], s['class_probs'])
def contrastive(z, t, s): return contrastive_literal(z, t, s['temperature'], s['similarity_temperature'])


def distilled(x, t, s):
    "The two most probable classes of a teacher, and its rest."
    tau, h, rows = s['temperature'], s['hard_weight'], []
    fixed = float(torch.as_tensor(tau).detach())
    for row, alpha, teacher in zip(x, t, V):
        q, p = softmax(row/tau), softmax(teacher/fixed)
        order = sorted(range(K), key=lambda k: -float(p[k]))
        top, rest = order[:2], order[2:]
        r = sum(p[k] for k in rest)
        if s['rest'] == 'bucket': pairs = [(p[k], q[k]) for k in top] + [(r, sum(q[k] for k in rest))]
        if s['rest'] == 'uniform': pairs = [(p[k], q[k]) for k in top] + [(r/len(rest), q[k]) for k in rest]
        if s['rest'] == 'renormalise': pairs = [(p[k]/(1 - r), q[k]) for k in top]
        rows.append((1 - h)*tau**2*cross_entropy(*zip(*pairs)) + h*cross_entropy(alpha, softmax(row)))
    return rows


PLAIN = dict(temperature=1., reduction='mean', weight=None, ignore_index=None, label_smoothing=0.)
NOISY = PLAIN | dict(noise_probs=None, noise_samples=None)
VALUES = dict(  # of each argument, others than the defaults
    temperature=[TAU, torch.tensor(TAU, dtype=DOUBLE), nn.Parameter(torch.tensor(TAU, dtype=DOUBLE))],
    reduction=['none', 'sum'], weight=[W], ignore_index=[IGNORED], label_smoothing=[.1, 1.], noise_probs=[ETA],
    noise_samples=[EXTRA, InBatch(), Queue(9)], chunk_size=[2], generator=[8], class_probs=[PI.flip(0)],
    strength=[0., .9], similarity_temperature=[.3], hard_weight=[0., .5], rest=['uniform', 'renormalise'])
LOSSES = {  # class -> defaults, literal rows
    losses.NLL: (PLAIN, over_classes), losses.SoftTargetCrossEntropy: (PLAIN, over_classes),
    losses.InfoNCE: (NOISY, over_rows), losses.SoftTargetInfoNCE: (NOISY | dict(chunk_size=None), over_rows),
    losses.SoftDistributionInfoNCE: (NOISY | dict(generator=7), over_draws),
    losses.ExpectedInfoNCE: (NOISY | dict(generator=7), over_draws),
    peers.ContinuousCategoricalNLL: (PLAIN, over_classes), peers.BinaryCrossEntropy: (PLAIN, over_classes),
    peers.LogitAdjustedCrossEntropy: (dict(temperature=1., reduction='mean', class_probs=PI, strength=1.), adjusted),
    peers.SoftInfoNCE: (dict(temperature=1., reduction='mean', noise_probs=None, noise_samples=None, strength=.5,
                             similarity_temperature=.1), weighted_negatives),
    peers.GeneralizedSupervisedContrastive: (dict(temperature=.1, reduction='mean', similarity_temperature=None),
                                             contrastive),
    peers.Distillation: (dict(temperature=4., reduction='mean', hard_weight=.1, rest='bucket'), distilled),
}
ONLY_LABELS = losses.NLL, losses.InfoNCE
GIVEN = {'generator': o.generator, 'class_probs': lambda p: p}  # arguments that the tests always give
CASES = [(cls, name, value) for cls, (settings, _) in LOSSES.items() for name in settings for value in VALUES[name]]
KINDS = {'ids': (Y, o.dense(Y, K)), 'dense': (T, T), 'sparse': (SPARSE, SPARSE.dense())}


def arguments(cls):
    "Of the constructor, those of its `**options` by name."
    found = []
    for name, p in inspect.signature(cls).parameters.items():
        assert p.kind is not p.VAR_POSITIONAL, cls
        found += typing.get_type_hints(RowOptions) if p.kind is p.VAR_KEYWORD else [name]
    return set(found)


def made(cls, **given):
    always = {name: LOSSES[cls][0][name] for name in GIVEN if name in LOSSES[cls][0]}
    return cls(**{name: GIVEN[name](v) if name in GIVEN else v for name, v in (always | given).items()})


def called(module, x, t, **options):
    if isinstance(module, peers.Distillation):
        log_probs, ids = (V/float(torch.as_tensor(module.temperature).detach())).log_softmax(1).topk(2)
        return module(x, t, (ids, log_probs), **options)
    return module(x, t, **options)


def targets_of(kind, ignored):
    t, rows = KINDS[kind]
    if ignored is None: return t, rows
    out = torch.tensor(LEFT_OUT)
    if kind == 'sparse':
        t = SparseTargets(t.indices, t.weights.index_fill(0, out, 0.), 0., K, validate=False)
    else: t = t.index_fill(0, out, ignored if kind == 'ids' else 0.)
    return t, rows


def literal(cls, x, rows, kind, given, amounts=None):
    "The loss by loops, with the arguments that were given in place of the defaults."
    settings, by_rows = LOSSES[cls]
    s = settings | given | dict(cls=cls)
    kept = [i for i in range(N) if s.get('ignore_index') is None or i not in LEFT_OUT]
    e, weight = s.get('label_smoothing', 0.), s.get('weight')
    s['weight'] = torch.ones(K, dtype=DOUBLE) if weight is None else weight
    extra = s.get('noise_samples')
    s['noise_samples'] = extra if isinstance(extra, torch.Tensor) else []  # a queue is empty at the first call
    if 'generator' in s:
        t = SparseTargets.from_labels(Y, K, DOUBLE) if kind == 'ids' else KINDS[kind][0]
        s |= dict(generator=o.generator(s['generator']), drawn_from=smooth(t, e)[torch.tensor(kept)])
    a = torch.ones(N, dtype=DOUBLE) if amounts is None else amounts
    found = by_rows(x[kept], (1-e)*rows[kept] + e/K, s)
    by_row = {i: a[i]*l for i, l in zip(kept, found)}
    per_row = torch.stack([by_row.get(i, 0*x[i, 0]) for i in range(N)])
    if s['reduction'] == 'none': return per_row
    if s['reduction'] == 'sum': return per_row.sum()
    count = sum(a[i]*(s['weight'][Y[i]] if kind == 'ids' and weight is not None else 1.) for i in kept)
    return per_row.sum()/count


def kinds_of(cls):
    if cls is peers.GeneralizedSupervisedContrastive: return ['dense']  # in others, some rows have no positive
    return ['ids'] if cls in ONLY_LABELS else [*KINDS]


def inputs_of(cls): return Z if cls is peers.GeneralizedSupervisedContrastive else X
def named(v): return v.__name__ if inspect.isclass(v) else type(v).__name__ if isinstance(v, nn.Module) else None


# ---------------------------------------------------------------- every argument
def test_the_table_has_every_module_and_every_argument():
    modules = {getattr(m, name) for m in (losses, peers, noise) for name in m.__all__}
    modules = {c for c in modules if inspect.isclass(c) and issubclass(c, nn.Module)}
    assert modules == {*LOSSES, Queue}  # of a queue, every argument has its tests in test_noise.py
    for cls, (settings, _) in LOSSES.items(): assert arguments(cls) == set(settings), cls


@pytest.mark.parametrize('cls, name, value', CASES, ids=named)
def test_an_argument_does_what_it_says(cls, name, value):
    changes = []
    for kind in kinds_of(cls):
        t, rows = targets_of(kind, value if name == 'ignore_index' else None)
        given = {name: value}
        if isinstance(value, Queue): value = given[name] = Queue(value.size)
        def loss(x): return called(made(cls, **given), x, t)
        def by_hand(x): return literal(cls, x, rows, kind, given)
        x = inputs_of(cls)
        got, _ = o.same_value_and_grad(loss, by_hand, x)
        usual = called(made(cls), x, KINDS[kind][0])
        changes.append(got.shape != usual.shape or (got - usual).abs().max() > 1e-4)
    no_change = name == 'chunk_size' or name == 'noise_samples' and not isinstance(value, torch.Tensor)  # yet
    drawn = cls in (losses.SoftDistributionInfoNCE, losses.ExpectedInfoNCE)  # the same labels may be drawn
    assert not any(changes) if no_change else any(changes) if drawn else all(changes)


@pytest.mark.parametrize('cls', LOSSES)
def test_a_learned_temperature_has_the_literal_gradient(cls):
    tau, kind = torch.tensor(TAU, dtype=DOUBLE, requires_grad=True), kinds_of(cls)[-1]
    t, rows = KINDS[kind]
    module = made(cls, temperature=nn.Parameter(tau.detach().clone()))
    assert dict(module.named_parameters()).keys() == {'temperature'}
    found, = torch.autograd.grad(called(module, inputs_of(cls), t), module.temperature)
    wanted, = torch.autograd.grad(literal(cls, inputs_of(cls), rows, kind, dict(temperature=tau)), tau)
    o.same(found, wanted)


@pytest.mark.parametrize('cls', LOSSES)
def test_a_tensor_as_temperature_is_a_buffer(cls):
    module = made(cls, temperature=torch.tensor(.75, dtype=DOUBLE))
    assert 'temperature' in dict(module.named_buffers()) and module.float().temperature.dtype == torch.float32
    assert '0.75' in repr(module)


@pytest.mark.parametrize('cls', LOSSES)
def test_what_a_loss_cannot_honour_its_constructor_refuses(cls):
    for name in {n for settings, _ in LOSSES.values() for n in settings} - set(LOSSES[cls][0]):
        with pytest.raises(TypeError, match=name): made(cls, **{name: VALUES[name][0]})


# ---------------------------------------------------------------- the options of the losses on whole rows
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('cls', [peers.ContinuousCategoricalNLL, peers.BinaryCrossEntropy])
def test_all_options_together(cls, kind):
    options = dict(weight=W, ignore_index=IGNORED, label_smoothing=.1, sample_weight=A)
    for n, reduction in itertools.product(range(5), ('none', 'sum', 'mean')):
        for chosen in itertools.combinations(options, n):
            given = {name: options[name] for name in chosen}
            t, rows = targets_of(kind, given.get('ignore_index'))
            amounts = dict(sample_weight=given.pop('sample_weight')) if 'sample_weight' in given else {}
            given |= dict(reduction=reduction, temperature=TAU)
            o.same_value_and_grad(lambda x: made(cls, **given)(x, t, **amounts),
                                  lambda x: literal(cls, x, rows, kind, given, amounts.get('sample_weight')), X)


@pytest.mark.parametrize('cls', [peers.ContinuousCategoricalNLL, peers.BinaryCrossEntropy])
def test_positions_ignored_logits_and_empty_batches(cls):
    x, y = o.logits(6, K).detach(), o.ids(6, K)
    module = cls(TAU, ignore_index=IGNORED)
    whole = x.reshape(2, 3, K).movedim(-1, 1)
    o.same(module(whole, y.reshape(2, 3)), module(x, y))
    o.same(module.probs(whole).movedim(1, -1).reshape(6, K), module.probs(x))
    y[2] = IGNORED
    rest, broken = [0, 1, 3, 4, 5], x.index_fill(0, torch.tensor([2]), float('nan'))
    value, (slope,) = o.value_and_grad(lambda x: module(x, y), broken)
    o.same(value, module(x[rest], y[rest]))
    assert (slope[2] == 0).all() and slope.isfinite().all()
    grad, got = torch.func.grad_and_value(lambda x: module(x, y))(x)  # where ignored rows keep their places
    o.same(got, value)
    o.same(grad, 2*slope)  # of half the value
    assert module(x, torch.full_like(y, IGNORED)).isnan()
    assert cls(reduction='sum', ignore_index=IGNORED)(x, torch.full_like(y, IGNORED)) == 0


@pytest.mark.parametrize('cls', [peers.ContinuousCategoricalNLL, peers.BinaryCrossEntropy])
def test_probs_undo_class_weights_and_the_modules_own_smoothing(cls):
    "At the optimum of the exact mean loss over labels of known frequencies, `probs` are these frequencies."
    p = torch.tensor([[.5, .2, .2, .1], [.1, .3, .15, .45]], dtype=DOUBLE)
    module = cls(TAU, 'none', weight=W, label_smoothing=.1)
    logits = torch.zeros(2, K, dtype=DOUBLE, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=1000, tolerance_grad=1e-14, tolerance_change=1e-18,
                                  line_search_fn='strong_wolfe')
    def mean_loss():
        optimizer.zero_grad()
        value = sum((p[:, y]*module(logits, torch.full((2,), y))).sum() for y in range(K))
        value.backward()
        return value
    optimizer.step(mean_loss)
    o.same(module.probs(logits.detach()), p, 1e-6)
    assert (module.probs(logits.detach(), epsilon=0.) - p).abs().max() > .01


# ---------------------------------------------------------------- Soft-InfoNCE and its noise
def soft_info(x, t, **given):
    return peers.SoftInfoNCE(ETA, TAU, .8, .3, **given)(x, t)


@pytest.mark.parametrize('kind', KINDS)
def test_noise_of_soft_info_nce(kind):
    t, rows = KINDS[kind]
    given = dict(noise_probs=ETA, temperature=TAU, strength=.8, similarity_temperature=.3)
    for extra in (EXTRA, o.simplex(3, K, 4), smooth(SparseTargets.from_labels(EXTRA, K, DOUBLE), .2)):
        written = extra.dense() if isinstance(extra, SparseTargets) else o.dense(extra, K)
        o.same_value_and_grad(lambda x: soft_info(x, t, noise_samples=extra),
                              lambda x: literal(peers.SoftInfoNCE, x, rows, kind,
                                                given | dict(noise_samples=written)), X)


def test_fresh_noise_of_soft_info_nce_is_all_that_a_row_is_compared_with():
    labels = Fresh(6, generator=o.generator(5)).draw(ETA).indices[:, 0]
    got = peers.SoftInfoNCE(ETA, TAU, .8, .3, 'none', Fresh(6, generator=o.generator(5)))(X, T)
    for i in range(N):
        s = o.scores(X[i:i+1], ETA, TAU)[0]
        near = softmax([cosine(T[i], o.dense(labels, K)[j])/.3 for j in range(6)])
        terms = [s[int(y)] + torch.log((1 - .8*p)/(1 - .8/6)) for y, p in zip(labels, near)]
        own = o.energy(T[i], s)
        o.same(got[i], o.log_sum_exp([own, *terms]) - own)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('noise_samples', [None, EXTRA, 'queue'], ids=['batch', 'extra', 'queue'])
def test_micro_batches_of_soft_info_nce_add_up(kind, noise_samples):
    from softnce.training.loop import micro_losses
    t = KINDS[kind][0]
    def module():
        source = Queue(9) if isinstance(noise_samples, str) else noise_samples
        return peers.SoftInfoNCE(ETA, TAU, .8, .3, noise_samples=source)
    slices = [slice(0, 2), slice(2, 3), slice(3, 5)]
    whole, parts = module(), module()
    for step in range(2):  # at the second, the queue holds the first
        x = o.logits(N, K, step).detach()
        def in_parts(x): return sum(micro_losses(parts, lambda j: x[slices[j]], t, slices))
        o.same_value_and_grad(in_parts, lambda x: whole(x, t), x)


def test_noise_that_soft_info_nce_cannot_weigh():
    for make in (lambda: peers.SoftInfoNCE(noise_samples=ClosedForm()),
                 lambda: peers.SoftInfoNCE()(X, T, ClosedForm()),
                 lambda: peers.soft_info_nce(X, T, noise_samples=ClosedForm())):
        with pytest.raises(ValueError, match='noise_samples must be targets or a source.*ClosedForm'): make()
    with pytest.raises(ValueError, match='noise_samples'): peers.SoftInfoNCE(noise_samples='batch')
    one = peers.SoftInfoNCE(noise_samples=EXTRA)(X[:1], T[:1])
    assert one > 0  # a row alone, with others to be compared with
