"Many ranks and micro-batches: gloo processes against the global batch in one process, value and gradient, float64."
import contextlib
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from softnce.distributed import micro_batch_noise, rank_weight, targets_of_ranks
from softnce.losses import (InfoNCE, SoftDistributionInfoNCE, SoftTargetInfoNCE, info_nce, linear_soft_target_info_nce,
                            nll, sample_labels, soft_distribution_info_nce, soft_target_cross_entropy,
                            soft_target_info_nce)
from softnce.noise import ClosedForm, Fresh, InBatch, Queue
from softnce.targets import SparseTargets, mix, smooth

K, D, N = 5, 3, 12
PARTS = {'2 ranks': (6, 6), '2 uneven ranks': (7, 5), '4 ranks': (3, 3, 3, 3), '4 uneven ranks': (5, 1, 2, 4)}
KINDS = 'ids', 'dense', 'sparse', 'varied'
PAIRS = ([(info_nce, 'ids'), (nll, 'ids')] + [(soft_distribution_info_nce, k) for k in KINDS[1:]]
         + [(loss, k) for loss in (soft_target_info_nce, linear_soft_target_info_nce, soft_target_cross_entropy)
            for k in KINDS])
WITHOUT_NOISE = nll, soft_target_cross_entropy
ETA = torch.tensor([.3, .1, .2, .25, .15], dtype=torch.float64)


def generator(*seed): return torch.Generator().manual_seed(sum(100**i*s for i, s in enumerate(seed)))


def batch(step):
    "Inputs and targets of one global batch: class ids, SparseTargets with one and with many epsilons, dense."
    g = generator(step)
    x, ids = torch.randn(N, D, generator=g, dtype=torch.float64), torch.randint(K, (N,), generator=g)
    lam, partner = torch.rand(N, generator=g, dtype=torch.float64), torch.randperm(N, generator=g)
    hard = SparseTargets(ids[:, None], torch.ones(N, 1, dtype=torch.float64), num_classes=K)
    sparse = smooth(mix(hard, lam, partner), .1)
    varied = SparseTargets(sparse.indices, sparse.weights, torch.rand(N, generator=g, dtype=torch.float64), K)
    return dict(x=x, ids=ids, hard=hard, sparse=sparse, varied=varied, dense=varied.dense())


EXTRA = {k: v[:4] for k, v in batch(77).items()}
SOURCES = {
    'batch': lambda rank: InBatch(ranks='all'),
    'own': lambda rank: None,  # as everywhere, until all ranks are asked for
    'queue': lambda rank: Queue(N + 5, ranks='all'),  # cuts through a batch
    'fresh': lambda rank: Fresh(4, .7, .1, generator=generator(rank), ranks='all'),
    'closed form': lambda rank: ClosedForm(.7, .1),
    'extra ids': lambda rank: EXTRA['ids'],
    'extra dense': lambda rank: EXTRA['dense'],
    'extra sparse': lambda rank: EXTRA['varied'],
}


def pairs(source):
    """Losses and kinds of targets that go with a source. A loss that draws labels draws other ones of soft noise
    on each rank."""
    drawn = source in ('extra dense', 'extra sparse')
    return [(loss, kind) for loss, kind in PAIRS
            if not (drawn and loss is soft_distribution_info_nce) and not (source != 'batch' and loss in WITHOUT_NOISE)]


def steps(source): return range({'queue': 3, 'fresh': 2}.get(source, 1))


def rows_of(parts, rank, accumulate):
    "The rows of a rank, as slices of its micro-batches: of two rows, the last of the rest, or all at once."
    start, stop = sum(parts[:rank]), sum(parts[:rank+1])
    return [slice(i, min(i+2, stop)) for i in range(start, stop, 2)] if accumulate else [slice(start, stop)]


def call(loss, x, w, targets, noise, **kwargs):
    kwargs = dict(temperature=.7, reduction='sum') | kwargs
    if loss in WITHOUT_NOISE: return loss(x @ w, targets, **kwargs)
    kwargs |= dict(noise_probs=ETA, noise_samples=noise)
    return loss(x, w.T, targets, **kwargs) if loss is linear_soft_target_info_nce else loss(x @ w, targets, **kwargs)


def weights(): return torch.randn(D, K, generator=generator(1), dtype=torch.float64).requires_grad_()


def rank_step(loss, kind, source, w, step, rank, slices):
    "The sum of the losses of a rank's micro-batches."
    b = batch(step)
    sampled, given = loss is soft_distribution_info_nce, isinstance(source, (torch.Tensor, SparseTargets))
    if len(slices) == 1 and loss not in WITHOUT_NOISE and not given:
        return call(loss, b['x'][slices[0]], w, b[kind][slices[0]], source,
                    **(dict(generator=generator(rank, step, 0)) if sampled else {}))
    targets = [b[kind][rows] for rows in slices]
    if sampled: targets = [sample_labels(t, generator(rank, step, i)) for i, t in enumerate(targets)]
    ranks = 'all' if given else None  # else the source says
    sources = [None]*len(slices) if loss in WITHOUT_NOISE else micro_batch_noise(targets, source, ranks=ranks)
    return sum(call(loss, b['x'][rows], w, t, s) for rows, t, s in zip(slices, targets, sources))


def large_step(loss, kind, source, w, step, ranks):
    "The same for one large batch of the rows of `ranks`: pairs of a rank and its micro-batches."
    b, rows = batch(step), slice(ranks[0][1][0].start, ranks[-1][1][-1].stop)
    targets = b[kind][rows]
    if loss is soft_distribution_info_nce:
        loss, targets = info_nce, torch.cat([sample_labels(b[kind][s], generator(rank, step, i))
                                             for rank, slices in ranks for i, s in enumerate(slices)])
    return call(loss, b['x'][rows], w, targets, source)


def of_rank(rank, parts, accumulate, name):
    "Value and gradient summed over the ranks, for every loss, kind and step."
    found = []
    for loss, kind in pairs(name):
        source, w = SOURCES[name](rank), weights()
        for step in steps(name):
            value = rank_step(loss, kind, source, w, step, rank, rows_of(parts, rank, accumulate))
            result = torch.cat([value.detach()[None], torch.autograd.grad(value, w)[0].flatten()])
            if dist.is_initialized(): dist.all_reduce(result)
            found.append(result)
    return torch.stack(found)


def of_large_batch(parts, accumulate, name):
    everyone, found = [(r, rows_of(parts, r, accumulate)) for r in range(len(parts))], []
    groups = [[r] for r in everyone] if name == 'own' else [everyone]
    for loss, kind in pairs(name):
        source, w = SOURCES[name](0), weights()
        for step in steps(name):
            value = sum(large_step(loss, kind, source, w, step, group) for group in groups)
            found.append(torch.cat([value.detach()[None], torch.autograd.grad(value, w)[0].flatten()]))
    return torch.stack(found)


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('accumulate', [False, True], ids=['at once', 'accumulated'])
@pytest.mark.parametrize('world', PARTS)
def test_ranks_together_are_the_global_batch(pool, world, accumulate, source):
    parts = PARTS[world]
    expected = of_large_batch(parts, accumulate, source)
    for found in pool.run(len(parts), of_rank, parts, accumulate, source):
        assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('source', SOURCES)
def test_accumulation_without_a_group_is_the_large_batch(source):
    assert_close(of_rank(0, (N,), True, source), of_large_batch((N,), True, source), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- that the tests above could fail

def naive(rank, parts):
    w, b = weights(), batch(0)
    value = sum(call(soft_target_info_nce, b['x'][rows], w, b['dense'][rows], None)
                for rows in rows_of(parts, rank, True)).detach()
    dist.all_reduce(value)
    return value


def test_naive_accumulation_is_another_loss(pool):
    parts = PARTS['2 ranks']
    large = of_large_batch(parts, True, 'batch')[PAIRS.index((soft_target_info_nce, 'dense')), 0]
    for value in pool.run(2, naive, parts): assert (value - large).abs() > .1


def own_draws(rank):
    return (Fresh(8, generator=generator(rank)).draw(ETA).indices,
            Fresh(8, generator=generator(rank), ranks='all').draw(ETA).indices)


def test_fresh_draws_of_all_are_those_of_rank_zero(pool):
    (own0, shared0), (own1, shared1) = pool.run(2, own_draws)
    assert torch.equal(shared0, own0) and torch.equal(shared1, own0) and not torch.equal(own1, own0)


# ---------------------------------------------------------------- the gather

def gathered(rank, parts, kind, even):
    rows, = rows_of(parts, rank, False)
    own = batch(0)[kind][rows]
    if kind == 'hard' and rank == 1: own = smooth(mix(own, .6), .2)  # more slots, and another epsilon
    return own, targets_of_ranks(own, even=even)


@pytest.mark.parametrize('kind', ['ids', 'dense', 'sparse', 'varied', 'hard'])
@pytest.mark.parametrize('parts', [(3, 3), (4, 2), (4, 0), (2, 0, 1, 3)], ids=str)
def test_targets_come_in_the_order_of_ranks(pool, parts, kind):
    dense = lambda t: t.dense() if isinstance(t, SparseTargets) else t
    for even in [False] + [True]*(len(set(parts)) == 1 and kind != 'hard'):
        own, found = zip(*pool.run(len(parts), gathered, parts, kind, even))
        for ranks in found: assert_close([dense(t) for t in ranks], [dense(t) for t in own], rtol=0, atol=0)


def one_epsilon(rank): return targets_of_ranks(batch(0)['sparse'][:rank+1])[1-rank].epsilon


def test_an_epsilon_of_all_stays_a_number(pool): assert pool.run(2, one_epsilon) == [.1, .1]


LAMBDAS = {'agree': [.3, .3, .3], 'differ': [.3, .4, .3], 'one unknown': [.3, None, .3], 'three classes': 'three'}


def rows_of_one_lambda(rank, lambdas):
    "What a rank knows of the rows of all: whether they share one row of weights; and their numbers."
    hard = batch(rank)['hard'][:4 + rank]
    if lambdas == 'three': t = mix(mix(hard, .3), .5) if rank == 1 else mix(hard, .3)
    else: t = mix(hard, torch.tensor(.3) if lambdas[rank] is None else lambdas[rank])
    joined = SparseTargets.cat(targets_of_ranks(t))
    return joined.weights.stride(0) == 0, joined.host_row, t.dense(), joined.dense()


@pytest.mark.parametrize('case', LAMBDAS)
def test_ranks_that_share_one_lambda_know_it(pool, case):
    "Then all rows have one row of weights, which a card need not be asked about; else each has its own."
    found = pool.run(3, rows_of_one_lambda, LAMBDAS[case])
    wanted = torch.cat([own for *_, own, _ in found])
    for one, row, _, joined in found:
        assert one == (case == 'agree') and row == ((.3, .7) if one else None)
        assert_close(joined, wanted, rtol=0, atol=0)


def mixed_kinds(rank):
    b = batch(0)
    said = []
    for kinds in (('ids', 'dense'), ('sparse', 'varied'), ('sparse', 'dense')):
        try: targets_of_ranks(b[kinds[rank]])
        except ValueError as error: said.append(str(error))
    return said


def test_kinds_that_differ_are_refused_on_every_rank(pool):
    for said in pool.run(2, mixed_kinds):
        assert len(said) == 3 and all('targets must be of one kind on all ranks' in s for s in said)


def traffic(rank, even):
    "Calls and bytes that this rank sends in a step of 256 rows of 1000 classes, in single precision."
    sent, g = [], generator(rank)
    send = dist.all_gather
    dist.all_gather = lambda parts, t: (sent.append(t.numel()*t.element_size()), send(parts, t))
    hard = SparseTargets(torch.randint(1000, (256, 1), generator=g), torch.ones(256, 1), num_classes=1000)
    sparse, result = smooth(mix(hard, .7), .1), {}
    for name, t in (('ids', hard.indices[:, 0]), ('sparse', sparse), ('dense', sparse.dense())):
        sent.clear()
        micro_batch_noise([t[:100], t[100:]], even=even, ranks='all')
        result[name] = list(sent)
    dist.all_gather = send
    return result


@pytest.mark.parametrize('even', [False, True])
def test_sparse_targets_travel_as_ids_and_weights(pool, even):
    head = [] if even else [10*8]
    for sent in pool.run(2, traffic, even):
        assert sent == {'ids': head + [256*4], 'sparse': head + [256*2*(4+4)], 'dense': head + [256*1000*4]}


# ---------------------------------------------------------------- evaluation, modules, DDP

def a_rank_of_ddp(rank, parts, accumulate):
    "Three steps of SGD by the recipe of the notebook; the parameters and what the queue holds."
    torch.manual_seed(0)
    net = torch.nn.Linear(D, K).double()
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    loss = SoftTargetInfoNCE(noise_probs=ETA, noise_samples=Queue(N + 5, ranks='all'))
    optimizer = torch.optim.SGD(model.parameters(), .5)
    for step in range(3):
        b, slices = batch(step), rows_of(parts, rank, accumulate)
        targets = [b['sparse'][rows] for rows in slices]
        sources, weight = micro_batch_noise(targets, loss.noise_samples), rank_weight(targets)
        n = sum(map(len, targets))
        for i, (rows, t, source) in enumerate(zip(slices, targets, sources)):
            with model.no_sync() if dist.is_initialized() and i < len(slices)-1 else contextlib.nullcontext():
                (weight*len(t)/n*loss(model(b['x'][rows]), t, noise_samples=source)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.weight.detach(), net.bias.detach(), loss.noise_samples.targets.dense()


@pytest.mark.parametrize('accumulate', [False, True], ids=['at once', 'accumulated'])
@pytest.mark.parametrize('world', PARTS)
def test_ddp_takes_the_steps_of_one_process(pool, world, accumulate):
    expected = a_rank_of_ddp(0, (N,), False)
    for found in pool.run(len(PARTS[world]), a_rank_of_ddp, PARTS[world], accumulate):
        assert_close(found, expected, rtol=0, atol=1e-12)


def compiled(rank):
    "A loss that exchanges nothing compiles in one piece; one that gathers by itself with a break."
    b, w, results = batch(rank), weights().detach(), []
    f = lambda x, t, source: soft_target_info_nce(x @ w, t, noise_probs=ETA, noise_samples=source)
    for kind in ('ids', 'dense', 'sparse'):
        for source, whole in ((micro_batch_noise([b[kind]], ranks='all')[0], True),
                              (micro_batch_noise([b[kind]], Queue(8, ranks='all'))[0], True), (None, True),
                              (InBatch(ranks='all'), False), (Fresh(4), False)):
            x = b['x'].clone().requires_grad_()
            torch.manual_seed(1)
            expected = f(x, b[kind], source)
            torch.manual_seed(1)
            value = torch.compile(f, fullgraph=whole, backend='eager')(x, b[kind], source)
            results.append((value.detach(), expected.detach(),
                            torch.autograd.grad(value, x)[0], torch.autograd.grad(expected, x)[0]))
        torch.compiler.reset()
    return results


@pytest.mark.slow
def test_compiled(pool):
    for results in pool.run(2, compiled, timeout=300):
        for value, expected, grad, expected_grad in results:
            assert_close(value, expected, rtol=0, atol=1e-12)
            assert_close(grad, expected_grad, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- nothing is exchanged unless asked for

LONE = {'batch': lambda: None, 'in-batch': InBatch, 'queue': lambda: Queue(3),
        'fresh': lambda: Fresh(4, generator=generator(5)), 'closed form': ClosedForm, 'extra': lambda: EXTRA['dense']}


def alone(rank, steps):
    "Rank 0 trains, evaluates and accumulates by itself; the others make no call."
    if rank: return None
    b, found = batch(0), []
    for source in (make() for make in LONE.values()):
        for step in range(steps):
            w = weights()
            value = call(soft_target_info_nce, b['x'][:4], w, b['dense'][:4], source)
            found += [value.detach(), torch.autograd.grad(value, w)[0]]
            with torch.no_grad(): found.append(call(soft_target_info_nce, b['x'][:4], w, b['dense'][:4], source))
        first, _ = micro_batch_noise(b['dense'][:4].split(2), source)
        found.append(call(soft_target_info_nce, b['x'][:2], w, b['dense'][:2], first).detach())
    return found


def test_a_rank_may_call_a_loss_alone(pool):
    assert_close(pool.run(2, alone, 2, timeout=5)[0], alone(0, 2), rtol=0, atol=1e-14)


STEPS = 4, 2  # of each rank



def joined(rank):
    "SGD under `DDP.join` where rank 0 has two batches more than rank 1; the weights."
    torch.manual_seed(0)
    net, loss = torch.nn.Linear(D, K).double(), SoftTargetInfoNCE(noise_probs=ETA)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), .5)
    with model.join():
        for step in range(STEPS[rank]):
            b = batch(2*step + rank)
            loss(model(b['x']), b['sparse']).backward()
            optimizer.step()
            optimizer.zero_grad()
    return net.weight.detach()


def mean_over_ranks():
    "The same in one process: each rank's gradient by itself, divided by the number of ranks at the start."
    torch.manual_seed(0)
    net, loss = torch.nn.Linear(D, K).double(), SoftTargetInfoNCE(noise_probs=ETA)
    optimizer = torch.optim.SGD(net.parameters(), .5)
    for step in range(max(STEPS)):
        for b in [batch(2*step + rank) for rank in range(2) if step < STEPS[rank]]:
            (loss(net(b['x']), b['sparse'])/2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.weight.detach()


def test_ranks_with_uneven_batches_join(pool):
    for found in pool.run(2, joined, timeout=5): assert_close(found, mean_over_ranks(), rtol=0, atol=1e-12)


def in_both_modes(rank, name):
    "Losses of a rank's rows in training and in evaluation, each by a source that has seen nothing."
    b, w = batch(0), weights()
    rows, = rows_of(PARTS['2 uneven ranks'], rank, False)
    def value(): return call(soft_target_info_nce, b['x'][rows], w, b['dense'][rows], SOURCES[name](rank)).detach()
    with torch.no_grad(): evaluated = value()
    return value(), evaluated


@pytest.mark.parametrize('source', SOURCES)
def test_training_and_evaluation_are_on_one_scale(pool, source):
    for trained, evaluated in pool.run(2, in_both_modes, source, timeout=5):
        assert_close(trained, evaluated, rtol=0, atol=1e-14)


def recomputed(rank, name, reentrant):
    "Two steps whose loss is computed again in the backward pass, as activation checkpointing does; and without."
    found = []
    for again in (True, False):
        source, rows = SOURCES[name](rank), rows_of(PARTS['2 uneven ranks'], rank, False)[0]
        for step in range(2):
            b, w = batch(step), weights()
            def value(w): return call(soft_target_info_nce, b['x'][rows], w, b['dense'][rows], source)
            loss = checkpoint(value, w, use_reentrant=reentrant) if again else value(w)
            loss.backward()
            found.append(torch.cat([loss.detach()[None], w.grad.flatten()]))
    return found[:2], found[2:]


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('source', ['batch', 'own', 'queue'])
def test_a_loss_that_is_recomputed_has_the_same_candidates(pool, source, reentrant):
    for again, once in pool.run(2, recomputed, source, reentrant, timeout=5):
        assert_close(again, once, rtol=0, atol=1e-12)


def other_kinds(rank):
    "Class ids on one rank and probabilities on the other, in training and in evaluation."
    b, said = batch(0), []
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), pytest.raises(ValueError) as error:
            call(soft_target_info_nce, b['x'], weights(), b['dense' if rank else 'varied'], InBatch(ranks='all'))
        said.append(str(error.value))
    return said


def test_a_loss_of_all_ranks_names_other_kinds_on_every_rank(pool):
    for said in pool.run(2, other_kinds, timeout=5):
        assert len(said) == 2 and all('targets must be of one kind on all ranks' in s for s in said)


def missed(rank):
    "Rank 1 makes no call, and leaves: what rank 0 is told."
    if rank: return []
    b = batch(0)
    with pytest.raises(RuntimeError) as error:
        call(soft_target_info_nce, b['x'], weights(), b['dense'], InBatch(ranks='all'))
    return error.value.__notes__


def test_a_rank_that_does_not_come_is_explained(pool):
    (note,), _ = pool.run(2, missed, timeout=5)
    assert "every rank must make it, and as often as the others" in note and "ranks='own'" in note


@pytest.mark.parametrize('make', [InBatch, lambda ranks: Queue(3, ranks=ranks), lambda ranks: Fresh(3, ranks=ranks),
                                  lambda ranks: micro_batch_noise([torch.arange(3)], ranks=ranks)])
def test_ranks_are_own_or_all(make):
    for bad in ('local', True, 1):
        with pytest.raises(ValueError, match=f"ranks must be 'own' or 'all', got {bad!r}"): make(bad)
    for ranks in ('own', 'all'): make(ranks)


# ---------------------------------------------------------------- errors

def raises(rank, bad):
    if rank == bad: raise KeyError(f'rank {rank}')
    targets_of_ranks(batch(0)['ids'])


@pytest.mark.parametrize('size, bad', [(2, 0), (2, 1), (4, 2)])
def test_a_rank_that_raises_fails_the_test(pool, size, bad):
    with pytest.raises(KeyError, match=f'rank {bad}'): pool.run(size, raises, bad)
    assert len(pool.run(size, own_draws)) == size  # and the pool lives on


def dies(rank): os._exit(3) if rank else targets_of_ranks(batch(0)['ids'])
def sleeps(rank): time.sleep(600) if rank else targets_of_ranks(batch(0)['ids'])


@pytest.mark.slow
@pytest.mark.parametrize('task', [dies, sleeps])
def test_a_rank_that_does_not_come_back_fails_the_test(pool, task):
    with pytest.raises(Exception, match='terminated abruptly'): pool.run(2, task, timeout=2)
    assert len(pool.run(2, own_draws)) == 2


def test_sources_of_a_step():
    b, w = batch(0), weights()
    parts = [b['dense'][:3], b['dense'][3:5]]
    for bad in ([], [b['dense'], b['ids']], [b['dense'], b['sparse']]):
        with pytest.raises(ValueError, match='step_targets must be targets of one kind'): micro_batch_noise(bad)
    with pytest.raises(ValueError, match='made for 3 rows, got targets of 2'):
        call(soft_target_info_nce, b['x'][:2], w, parts[1], micro_batch_noise(parts)[0])
    loss = SoftDistributionInfoNCE(noise_samples=b['dense'])
    with pytest.raises(ValueError, match='targets must be class ids in a micro-batch'):
        loss(b['x'][:3] @ w, parts[0], noise_samples=micro_batch_noise(parts)[0])
    ids = [b['ids'][:3], b['ids'][3:5]]
    with pytest.raises(ValueError, match='noise_samples must be class ids in a micro-batch'):
        loss(b['x'][:3] @ w, ids[0], noise_samples=micro_batch_noise(ids, loss.noise_samples)[0])
    bad = [parts[0], parts[1]*2]
    with pytest.raises(ValueError, match='noise_samples must sum to 1'):
        call(soft_target_info_nce, b['x'][:3], w, bad[0], micro_batch_noise(bad)[0])


def test_evaluation_leaves_a_queue_alone():
    b, w, queue = batch(0), weights(), Queue(9)
    with torch.no_grad(): call(soft_target_info_nce, b['x'], w, b['dense'], micro_batch_noise([b['dense']], queue)[0])
    assert queue.targets is None


@pytest.mark.parametrize('module', [InfoNCE, SoftDistributionInfoNCE, SoftTargetInfoNCE])
def test_modules_take_the_noise_of_one_call(module):
    b, w = batch(0), weights()
    own = module(ETA, .7, noise_samples=EXTRA['ids'])
    assert_close(own(b['x'] @ w, b['ids'], noise_samples=InBatch()), module(ETA, .7)(b['x'] @ w, b['ids']),
                 rtol=0, atol=0)
    assert_close(own(b['x'] @ w, b['ids']),
                 info_nce(b['x'] @ w, b['ids'], noise_probs=ETA, temperature=.7, noise_samples=EXTRA['ids']),
                 rtol=0, atol=0)


def test_targets_with_a_graph_lend_no_gradient_to_other_rows():
    b, w = batch(0), weights()
    soft = torch.randn(N, K, dtype=torch.float64, requires_grad=True)
    parts = soft.softmax(1).split([5, 7])
    sources = micro_batch_noise(parts)
    for rows, t, source in zip((slice(0, 5), slice(5, N)), parts, sources):
        assert all(not d.requires_grad for d in source.draw(ETA) if d is not None)
        call(soft_target_info_nce, b['x'][rows], w, t.detach(), source).backward()
    assert soft.grad is None
