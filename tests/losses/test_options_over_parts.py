"Weights and ignored rows over micro-batches and ranks: gloo processes against the global batch, float64."
import pytest
import torch
import torch.distributed as dist

import oracles as o
from softnce.distributed import micro_batch_noise, rank_weight
from softnce.losses import (InfoNCE, SoftDistributionInfoNCE, SoftTargetCrossEntropy, SoftTargetInfoNCE,
                            expected_info_nce, info_nce, linear_soft_target_info_nce, soft_distribution_info_nce,
                            soft_target_cross_entropy, soft_target_info_nce)
from softnce.noise import ClosedForm, InBatch, Queue
from softnce.rows import with_targets
from softnce.targets import SparseTargets, mix, sample_labels, smooth
from softnce.training.loop import micro_losses

N, K, D, IGNORED = 12, 5, 3, -100
DOUBLE = torch.float64
PARTS = {'2 ranks': (6, 6), '2 uneven ranks': (9, 3), '3 ranks': (2, 7, 3)}
LEFT_OUT = [0, 1, 4, 9, 10, 11]  # all of the first micro-batch, and all rows of the last rank
W, ETA = torch.tensor([1., .5, 3., 2., .2], dtype=DOUBLE), o.noise(K)
A = torch.linspace(.2, 3., N, dtype=DOUBLE)
CASES = [(info_nce, 'ids'), (soft_distribution_info_nce, 'ids'), (expected_info_nce, 'ids')] + [
    (loss, kind) for loss in (soft_target_info_nce, soft_target_cross_entropy, linear_soft_target_info_nce)
    for kind in ('ids', 'dense', 'sparse')]
SOURCES = {'batch': lambda: None, 'queue': lambda: Queue(N), 'closed form': ClosedForm,
           'extra': lambda: torch.tensor([0, 3])}


def batch(kind):
    x, y, rows = o.logits(N, D).detach(), o.ids(N, K), torch.tensor(LEFT_OUT)
    if kind == 'ids': return x, y.index_fill(0, rows, IGNORED)
    if kind == 'dense': return x, o.simplex(N, K).index_fill(0, rows, 0.)
    t = mix(SparseTargets.from_labels(y, K, DOUBLE), o.simplex(N, 2)[:, 0])
    return x, SparseTargets(t.indices, t.weights.index_fill(0, rows, 0.), 0., K, validate=False)


def call(loss, x, w, t, a, source, **kw):
    kw = dict(sample_weight=a, ignore_index=IGNORED, label_smoothing=kw.pop('smooth', .1), reduction='sum')
    name = 'class_weight' if loss is linear_soft_target_info_nce else 'weight'
    kw[name] = W
    if loss is soft_target_cross_entropy: return loss(x @ w, t, **kw)
    kw |= dict(noise_probs=ETA, noise_samples=source)
    return loss(x, w.T, t, **kw) if loss is linear_soft_target_info_nce else loss(x @ w, t, **kw)


def smoothing(loss): return 0. if loss in (soft_distribution_info_nce, expected_info_nce) else .1  # which draw


def of_rank(rank, parts, source):
    "Value and gradient of the mean over all ranks, of two steps each cut into micro-batches of two rows."
    start, found = sum(parts[:rank]), []
    slices = [slice(i, min(i + 2, start + parts[rank])) for i in range(start, start + parts[rank], 2)]
    for loss, kind in cases(source):
        (x, t), w, noise = batch(kind), o.logits(D, K, 9), SOURCES[source]()
        for _ in range(2):
            micro, eps = [t[s] for s in slices], smoothing(loss)
            if loss is soft_target_cross_entropy: sources = [None]*len(slices)
            else: sources = micro_batch_noise(micro, noise, ignore_index=IGNORED, label_smoothing=eps, ranks='all')
            total = sum(call(loss, x[s], w, m, A[s], n, smooth=eps) for s, m, n in zip(slices, micro, sources))
            count = counted(t[start:start + parts[rank]], A[start:start + parts[rank]])
            factor = rank_weight(micro, count)/dist.get_world_size()
            value = total*factor/count if count else total
            result = torch.cat([value.detach()[None], torch.autograd.grad(value, w)[0].flatten()])
            dist.all_reduce(result)
            found.append(result)
    return torch.stack(found)


def cases(source): return [c for c in CASES if source == 'batch' or c[0] is not soft_target_cross_entropy]


def counted(t, a):
    "By hand: ids count the weight of their class, soft rows one, each times its sample weight."
    if isinstance(t, SparseTargets): return float(sum(a[i] for i in range(len(t)) if t.weights[i].sum() > 0))
    if t.ndim == 2: return float(sum(a[i] for i in range(len(t)) if t[i].sum() > 0))
    return float(sum(a[i]*W[t[i]] for i in range(len(t)) if t[i] != IGNORED))


def of_large_batch(source):
    found = []
    for loss, kind in cases(source):
        (x, t), w, noise = batch(kind), o.logits(D, K, 9), SOURCES[source]()
        kept = torch.tensor([i for i in range(N) if i not in LEFT_OUT])
        for _ in range(2):
            total = call(loss, x[kept], w, t[kept], A[kept], noise, smooth=smoothing(loss))/counted(t, A)
            found.append(torch.cat([total.detach()[None], torch.autograd.grad(total, w)[0].flatten()]))
    return torch.stack(found)


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('world', PARTS)
def test_ranks_and_micro_batches_are_the_global_batch(pool, world, source):
    parts, expected = PARTS[world], of_large_batch(source)
    for found in pool.run(len(parts), of_rank, parts, source):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def at_once(rank, parts):
    "Each rank in one call, without micro-batches: the ranks exchange the targets of their kept rows."
    start, found = sum(parts[:rank]), []
    rows = slice(start, start + parts[rank])
    for loss, kind in cases('batch'):
        (x, t), w = batch(kind), o.logits(D, K, 9)
        value = call(loss, x[rows], w, t[rows], A[rows], InBatch(ranks='all'), smooth=smoothing(loss))
        result = torch.cat([value.detach()[None], torch.autograd.grad(value, w)[0].flatten()])
        dist.all_reduce(result)
        found.append(result/counted(t, A))
    return torch.stack(found)


@pytest.mark.parametrize('world', PARTS)
def test_ranks_exchange_the_rows_they_keep(pool, world):
    expected = of_large_batch('batch')[::2]
    for found in pool.run(len(PARTS[world]), at_once, PARTS[world]):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the training loop
@pytest.mark.parametrize('source', ['batch', 'queue', 'closed form'])
@pytest.mark.parametrize('kind', ['ids', 'dense', 'sparse'])
@pytest.mark.parametrize('module', [SoftTargetCrossEntropy, InfoNCE, SoftTargetInfoNCE])
def test_micro_batches_of_the_loop(module, kind, source):
    if module is InfoNCE and kind != 'ids' or module is SoftTargetCrossEntropy and source != 'batch': return
    (x, t), w = batch(kind), o.logits(D, K, 9)
    options = dict(weight=W, ignore_index=IGNORED, label_smoothing=.1)
    def loss(): return module(**options) if module is SoftTargetCrossEntropy else module(
        ETA, noise_samples=SOURCES[source](), **options)
    slices = [slice(0, 2), slice(2, 5), slice(5, 12)]
    parts = sum(micro_losses(loss(), lambda j: x[slices[j]] @ w, t, slices))
    whole = loss()(x @ w, t)
    o.same(parts, whole)
    o.same(torch.autograd.grad(parts, w)[0], torch.autograd.grad(whole, w)[0])


@pytest.mark.parametrize('kind, eps', [('ids', 0.), ('ids', .3), ('dense', 0.), ('dense', .3), ('sparse', .3)])
def test_labels_that_are_drawn_for_a_step(kind, eps):
    "One draw a row from its smoothed target, none for an ignored row, then InfoNCE of the whole step."
    (x, t), w = batch(kind), o.logits(D, K, 9)
    loss = SoftDistributionInfoNCE(ETA, weight=W, ignore_index=1 if kind == 'dense' else IGNORED, label_smoothing=eps,
                                   generator=o.generator(3))
    slices = [slice(0, 2), slice(2, 5), slice(5, 12)]
    value = sum(micro_losses(loss, lambda j: x[slices[j]] @ w, t, slices))
    y, g = (t.clone(), None) if kind == 'ids' and not eps else (None, o.generator(3))
    if y is None:
        full = with_targets(t, torch.tensor([i not in LEFT_OUT for i in range(N)]), 0)
        if kind == 'ids': full = SparseTargets.from_labels(full, K)
        y = sample_labels(smooth(full, eps), g).index_fill(0, torch.tensor(LEFT_OUT), IGNORED)
    kept = torch.tensor([i for i in range(N) if i not in LEFT_OUT])
    rows = o.info_nce(x[kept] @ w, y[kept], ETA)
    wanted = (W[y[kept]]*rows).sum()/(W[t[kept]].sum() if kind == 'ids' else len(kept))
    o.same(value, wanted)


def test_a_micro_batch_takes_no_smoothed_labels_that_it_would_draw_again():
    t = o.ids(4, K)
    source = micro_batch_noise([t[:2], t[2:]])[0]
    with pytest.raises(ValueError, match='targets must be class ids in a micro-batch'):
        soft_distribution_info_nce(o.logits(2, K), t[:2], noise_samples=source, label_smoothing=.1)
