"softnce.training.loop: the loop written out, exact micro-batches, several ranks, a loss that stops being finite."
import math, os, random, signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch import nn
from training_jobs import NOISE, job, weights

from softnce.losses import NLL, InfoNCE, SoftDistributionInfoNCE, SoftTargetCrossEntropy, SoftTargetInfoNCE
from softnce.noise import ClosedForm, Fresh, InBatch, Queue
from softnce.targets import SparseTargets, mix, smooth
from softnce.training.checkpoints import StopRequested, load_checkpoint
from softnce.training.config import TrainConfig, param_groups
from softnce.training.evaluation import evaluate, predict
from softnce.training.loop import _ranks_set, fit, micro_losses
from softnce.training.nodes import launch_nodes, ranks
from softnce.vision.batches import Batches, Mixing
from softnce.vision.images import digits
from softnce.vision.models import SmallCNN


def test_fit_is_the_loop_written_out(splits):
    "Seed, AdamW at the scheduled rate, twice through the data: the same weights, to the bit."
    model, loss, train, valid = job('cross-entropy', splits)
    rows, config = [], TrainConfig(epochs=2, lr=.02, weight_decay=.3, warmup_epochs=.8, seed=5)
    last = fit(model, loss, train, valid, config, on_epoch=rows.append)
    plain, loss, train, valid = job('cross-entropy', splits)
    optimizer, step, means = torch.optim.AdamW(plain.parameters(), weight_decay=.3), 0, []
    torch.manual_seed(5)
    for epoch in range(2):
        plain.train(); train.seek(epoch)
        values = []
        for x, t in train:
            optimizer.param_groups[0]['lr'] = .02*(step+1)/4 if step < 4 else .02*(1+math.cos(math.pi*(step-4)/6))/2
            optimizer.zero_grad()
            values.append(loss(plain(x), t))
            values[-1].backward()
            optimizer.step()
            step += 1
        means.append(sum(v.item() for v in values)/5)
        metrics = evaluate(plain, loss, valid, config)
    assert torch.equal(weights(model), weights(plain))
    assert [r['train_loss'] for r in rows] == pytest.approx(means, rel=1e-12)
    assert {k: last[k] for k in metrics} == metrics
    assert [(r['seed'], r['epoch'], r['split']) for r in rows] == [(5, 1, 'valid'), (5, 2, 'valid')]


def test_clipping_averaging_and_layer_rates_written_out(splits):
    "A rate a layer, changed by the epoch; gradient norm cut to .01; an average of the weights with decay .8."
    class Groups(SmallCNN): # as timm names depths
        def group_matcher(self, coarse=False): return dict(stem=r'^body', blocks=[(r'^head\.(\d+)', None)])
    make = lambda: (torch.manual_seed(1), Groups(10, width=4, hidden=8))[1]
    model, config = make(), TrainConfig(epochs=3, lr=.02, warmup_epochs=1, schedule='epoch', layer_decay=.5,
                                        clip_norm=.01, ema=.8, seed=2)
    _, loss, train, valid = job('cross-entropy', splits)
    fit(model, loss, train, valid, config)
    plain = make()
    groups = param_groups(plain, config)
    optimizer, average = torch.optim.AdamW(groups, lr=1.), {k: v.clone() for k, v in plain.state_dict().items()}
    torch.manual_seed(2)
    for epoch in range(3):
        plain.train(); train.seek(epoch)
        rate = .02*(1 if epoch == 0 else (1+math.cos(math.pi*(epoch-1)/2))/2)
        for g in optimizer.param_groups: g['lr'] = rate*g['lr_scale']
        for x, t in train:
            optimizer.zero_grad()
            loss(plain(x), t).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), .01)
            optimizer.step()
            for k, v in plain.state_dict().items():
                average[k] = average[k]*.8 + v*.2 if v.is_floating_point() else v.clone()
    assert len({g['lr_scale'] for g in groups}) > 2
    for k, v in model.state_dict().items(): torch.testing.assert_close(v, average[k], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights(plain), weights(model))


def test_the_seed_matters_and_the_callers_generators_are_left_alone(splits):
    runs = {}
    for key, seed in (('a', 0), ('b', 0), ('c', 1)):
        parts = job('cross-entropy', splits)
        torch.manual_seed(123); np.random.seed(4); random.seed(5)
        fit(*parts, TrainConfig(epochs=2, seed=seed))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(123)))
        assert np.random.rand() == np.random.RandomState(4).rand() and random.random() == random.Random(5).random()
        runs[key] = weights(parts[0])
    assert torch.equal(runs['a'], runs['b']) and not torch.equal(runs['a'], runs['c'])


@pytest.mark.parametrize('name', ['cross-entropy', 'queue', 'hard'])
def test_loop_learns(name, splits):
    "A few epochs take every kind of loss far above chance on images that it has not seen."
    _, loss, _, valid = job(name, splits)
    train = Batches(splits.train, 32, True, mixing=None if name == 'hard' else Mixing(10, cutmix=0.))
    torch.manual_seed(0)
    last = fit(SmallCNN(10, width=8, hidden=32), loss, train, valid, TrainConfig(epochs=6, lr=.03, epsilon=.1))
    assert last['top1'] > .7


def test_own_metrics_and_inputs_that_are_no_tensors(splits):
    class Graph: # anything with `.to`
        def __init__(self, x): self.x = x
        def to(self, device): return Graph(self.x.to(device))
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.layer = nn.Linear(4, 3)
        def forward(self, g): return self.layer(g.x)
    class Loader(list): pass
    g = torch.Generator().manual_seed(0)
    train = Loader([(Graph(torch.randn(n, 4, generator=g)), torch.randint(3, (n,), generator=g)) for n in (5, 7)])
    def mine(model, loss, loader, config): return dict(rows=sum(len(y) for _, y in loader), mode=model.training)
    last = fit(Net(), NLL(), train, train, TrainConfig(epochs=2), evaluate=mine)
    assert last['rows'] == 12 and 'top1' not in last and last['epoch'] == 2


@pytest.mark.parametrize('precision,channels_last', [('bf16', False), ('bf16', True), ('fp32', True)])
def test_precision_and_memory_format(precision, channels_last, splits):
    model, loss, train, valid = job('cross-entropy', splits)
    full = job('cross-entropy', splits)
    seen = []
    model.body[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    a = fit(model, loss, train, valid, TrainConfig(epochs=2, lr=.01, precision=precision, channels_last=channels_last))
    b = fit(*full, TrainConfig(epochs=2, lr=.01))
    assert seen[0].is_contiguous(memory_format=torch.channels_last) is channels_last
    assert seen[0].dtype == (torch.bfloat16 if precision == 'bf16' else torch.float32)
    assert next(model.parameters()).dtype == torch.float32 and 'forward' not in vars(model)  # the model is as it was
    assert abs(a['train_loss']-b['train_loss']) < .05 and (precision == 'fp32' or a['train_loss'] != b['train_loss'])


def test_float64_on_the_cpu(splits):
    model, loss, train, valid = job('cross-entropy', splits)
    double = [(x.double(), t.to(torch.float64)) for x, t in train]
    fit(model.double(), loss, double, [(x.double(), y) for x, y in valid], TrainConfig(epochs=2))
    assert all(p.dtype == torch.float64 for p in model.parameters())


@pytest.mark.slow
def test_compiled_is_the_same_up_to_rounding(splits):
    parts, same = job('hard', splits), job('hard', splits)
    for p in (parts, same): # without dropout, which draws otherwise when compiled
        p[0].forward = SmallCNN.forward.__get__(p[0])
    a, b = (fit(*p, TrainConfig(epochs=2, compile=c)) for p, c in ((parts, True), (same, False)))
    assert a['train_loss'] == pytest.approx(b['train_loss'], rel=1e-4)
    assert list(parts[0].state_dict()) == list(same[0].state_dict())


def test_trackers_of_accelerate(splits, tmp_path):
    said = r'trackers must be among those of Accelerate that are installed \(.*\), got nonsense'
    with pytest.raises(ValueError, match=said): fit(*job('hard', splits), TrainConfig(trackers=('nonsense',)))
    pytest.importorskip('tensorboard')
    fit(*job('hard', splits), TrainConfig(epochs=2, checkpoint_dir=tmp_path, trackers=('tensorboard',)))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(next(tmp_path.rglob('events*')).parent)); events.Reload()
    assert {'top1', 'train_loss'} <= set(events.Tags()['scalars'])
    assert [e.step for e in events.Scalars('top1')] == [1, 2]


def test_a_non_finite_loss_stops_at_its_step(splits, tmp_path):
    parts = job('hard', splits)
    class Bad(nn.Module):
        calls = 0
        def forward(self, logits, targets):
            self.calls += 1
            return logits.mean()*(math.inf if self.calls == 8 else 1)
    said = (r'at step 8 \(epoch 2, batch 3 of 5\); learning rate .*; 120 rows; logits from .* 0 of 1200 not finite; '
            r'inputs from 0 to 1, 0 of 7680 not finite; last good checkpoint: epoch 1, batch 0 in .*last.pt')
    with pytest.raises(FloatingPointError, match=said):
        fit(parts[0], Bad(), *parts[2:], TrainConfig(epochs=3, checkpoint_dir=tmp_path))
    assert len(load_checkpoint(tmp_path/'last.pt')['history']) == 1 and weights(parts[0]).isfinite().all()


# ---- micro-batches

def written_out(targets):
    "Rows of a queue, which holds class ids as they were given or as sparse targets."
    if isinstance(targets, torch.Tensor): targets = SparseTargets.from_labels(targets, K, torch.float64)
    return targets.dense()


def in_float64(targets): return targets.to(torch.float64) if isinstance(targets, SparseTargets) else targets


N, K = 12, 5
ETA = torch.tensor([.3, .1, .2, .25, .15], dtype=torch.float64)
SOURCES = dict(in_batch=lambda: None, queue=lambda: Queue(20), closed_form=ClosedForm,
               fresh=lambda: Fresh(7, generator=torch.Generator().manual_seed(4)))
LOSSES = dict(soft=SoftTargetInfoNCE, hard=InfoNCE, ce=SoftTargetCrossEntropy, sampled=SoftDistributionInfoNCE)


def step_of(kind, source, seed=0):
    "A linear model, a loss, and two steps' inputs and targets, in float64."
    g = torch.Generator().manual_seed(seed)
    more = dict(generator=torch.Generator().manual_seed(9)) if kind == 'sampled' else {}
    options = {} if kind == 'ce' else dict(noise_probs=ETA, noise_samples=SOURCES[source](), **more)
    loss = LOSSES[kind](**options)
    steps = []
    for _ in range(2):
        x, y = torch.randn(N, 3, generator=g, dtype=torch.float64), torch.randint(K, (N,), generator=g)
        soft = SparseTargets(y[:, None], torch.ones(N, 1, dtype=torch.float64), num_classes=K)
        steps.append((x, y if kind == 'hard' else smooth(mix(soft, .7), .1)))
    return torch.randn(3, K, generator=g, dtype=torch.float64).requires_grad_(), loss, steps


@pytest.mark.parametrize('kind,source', [('soft', 'in_batch'), ('soft', 'queue'), ('soft', 'closed_form'),
                                         ('soft', 'fresh'), ('hard', 'in_batch'), ('hard', 'queue'), ('ce', 'in_batch'),
                                         ('sampled', 'in_batch'), ('sampled', 'queue')])
@pytest.mark.parametrize('edges', [(0, 6, 12), (0, 4, 8, 12), (0, 1, 12), (0, 5, 10, 11, 12)])
def test_micro_batches_are_the_large_batch(kind, source, edges):
    "Value and gradient of two steps in a row (the second sees the queue) against the whole batch at once."
    (w, loss, steps), (v, whole, _) = step_of(kind, source), step_of(kind, source)
    parts = [slice(a, b) for a, b in zip(edges, edges[1:])]
    for x, t in steps:
        want = whole(x @ v, t)
        wanted, = torch.autograd.grad(want, v)
        got, grad = 0., 0.
        for value in micro_losses(loss, lambda j: x[parts[j]] @ w, t, parts):
            g, = torch.autograd.grad(value, w)
            got, grad = got+value.item(), grad+g
        assert got == pytest.approx(want.item(), abs=1e-10)
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-10)
    if source == 'queue':
        queued = [q.noise_samples.targets for q in (loss, whole)]
        assert torch.equal(*(written_out(t) for t in queued))


def test_plain_accumulation_would_be_another_loss():
    w, loss, ((x, t), _) = step_of('soft', 'in_batch')
    naive = sum(loss(x[p] @ w, t[p]).item()/2 for p in (slice(0, 6), slice(6, 12)))
    assert abs(naive - loss(x @ w, t).item()) > .1


@pytest.mark.parametrize('name', ['cross-entropy', 'queue', 'hard', 'sampled'])
def test_fit_in_micro_batches(name, splits):
    "Without batch normalisation, four micro-batches a step train the network of the whole batch."
    class Mlp(nn.Sequential):
        def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))
    def double(batches):
        batches.seek(0)
        return [(x.double(), in_float64(t)) for x, t in batches]
    runs = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model, (_, loss, train, valid) = Mlp().double(), job(name, splits)
        last = fit(model, loss, double(train), [(x.double(), y) for x, y in valid],
                   TrainConfig(epochs=2, lr=.01, accumulate=accumulate))
        runs.append((weights(model), last['train_loss']))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=0, atol=1e-6) # Adam divides by the gradient's size
    assert runs[0][1] == pytest.approx(runs[1][1], abs=1e-8)


# ---- several ranks

class Plain(nn.Sequential): # no batch normalisation, which each rank would do on its own rows
    def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))


def rank_job(source, folder, accumulate=1, stop=False, fail=False, ranks_of='all'):
    "What a rank does: float64, so that the ranks can be compared with one process."
    rank, world, _ = ranks('cpu')
    torch.manual_seed(0)
    splits, model = digits(), Plain().double()
    class Double(Batches):
        def __iter__(self): return ((x.double(), in_float64(t)) for x, t in super().__iter__())
    mixing = None if source == 'hard' else Fixed()
    loss = {'in_batch': SoftTargetInfoNCE(NOISE.double()),
            'queue': SoftTargetInfoNCE(NOISE.double(), noise_samples=Queue(240)),
            'hard': InfoNCE(NOISE.double())}[source]
    train = Double(splits.train, 120, True, mixing=mixing, rank=rank, world=world)
    valid = Double(splits.valid, 60, rank=rank, world=world)
    if fail and rank == 1: raise RuntimeError('rank 1 fails')
    steps = []
    def send(*_):
        if model.training: steps.append(1)
        if len(steps) == 6 and model.training: os.kill(os.getpid(), signal.SIGUSR1)
    if stop and rank == 1: model.register_forward_hook(send)
    config = TrainConfig(epochs=2, lr=.01, accumulate=accumulate, checkpoint_dir=folder, device='cpu', ranks=ranks_of)
    last = fit(model, loss, train, valid, config)
    return dict(last=last, weights=weights(model), logits=predict(model, valid)[0])


class Sum(nn.Module):
    "A contrastive loss within another."
    def __init__(self, loss):
        super().__init__()
        self.loss = loss
    def forward(self, logits, targets): return self.loss(logits, targets) + logits.square().mean()


def other(given): return SoftTargetInfoNCE(ETA, noise_samples=given)


EXTRA = torch.eye(K, dtype=torch.float64)[:2]*.8 + .2/K
SAYS_NOTHING = {
    'in-batch': lambda: other(None), 'in-batch of its own': lambda: other(InBatch()), 'queue': lambda: other(Queue(9)),
    'fresh': lambda: other(Fresh(7, generator=torch.Generator().manual_seed(4 + ranks('cpu')[0]))),
    'closed form': lambda: other(ClosedForm()), 'ids': lambda: other(torch.tensor([1, 1, 4])),
    'probabilities': lambda: other(EXTRA), 'within': lambda: Sum(other(None)), 'ids within': lambda: Sum(other(EXTRA)),
    'drawn': lambda: SoftDistributionInfoNCE(ETA), 'cross-entropy': SoftTargetCrossEntropy}


def losses_of_a_rank(rank, name, parts):
    "Shares of the loss within a step of all ranks, and of this rank before and after it."
    os.environ['RANK'] = str(rank)
    g = torch.Generator().manual_seed(2)
    logits, ids = torch.randn(N, K, generator=g, dtype=torch.float64), torch.randint(K, (N,), generator=g)
    share = N//2 if torch.distributed.is_initialized() else N
    loss, rows = SAYS_NOTHING[name](), slice(share*rank, share*(rank+1))
    mine, t = logits[rows], ids[rows]
    slices = [slice(i*len(t)//parts, (i+1)*len(t)//parts) for i in range(parts)]
    with torch.no_grad(): before = loss(mine, t).item()
    with _ranks_set(loss, 'all'):
        value = sum(v.item() for v in micro_losses(loss, lambda j: mine[slices[j]], t, slices, 'all'))
    if rank: return value, None, None # the other may now call it alone
    with torch.no_grad(): return value, before, loss(mine, t).item()


@pytest.mark.parametrize('parts', [1, 3])
@pytest.mark.parametrize('name', SAYS_NOTHING)
def test_a_step_compares_with_all_ranks_and_a_loss_outside_of_it_with_its_own(name, parts, pool):
    if name in ('within', 'ids within') and parts > 1: pytest.skip('micro-batches are those of a loss that is given')
    (first, before, after), (second, _, _) = pool.run(2, losses_of_a_rank, name, parts, timeout=5)
    whole, alone, _ = losses_of_a_rank(0, name, 1)
    assert (first + second)/2 == pytest.approx(whole, abs=1e-10)
    if name not in ('queue', 'fresh'): assert before == after
    if name not in ('closed form', 'fresh', 'cross-entropy'): assert before < alone - .1 # of fewer candidates


class Fixed: # smoothing only: mixing partners depend on the rows a rank has
    def __call__(self, x, y): return x, smooth(SparseTargets(y[:, None], torch.ones(len(y), 1), num_classes=10), .1)


@pytest.mark.slow
@pytest.mark.parametrize('source,accumulate', [('in_batch', 1), ('queue', 1), ('hard', 1), ('queue', 3)])
def test_two_ranks_train_the_network_of_one(source, accumulate, tmp_path):
    import test_loop
    one = rank_job(source, None)
    two = launch_nodes(test_loop.rank_job, source, str(tmp_path), accumulate, processes=2)
    torch.testing.assert_close(two['weights'], one['weights'], rtol=0, atol=1e-7)
    torch.testing.assert_close(two['logits'], one['logits'], rtol=0, atol=1e-6)
    for k in ('train_loss', 'nll', 'top1'): assert two['last'][k] == pytest.approx(one['last'][k], abs=1e-7), k


@pytest.mark.slow
def test_ranks_may_train_each_with_its_own_candidates(tmp_path):
    import test_loop
    apart, _ = (launch_nodes(test_loop.rank_job, 'in_batch', str(tmp_path), ranks_of='own', processes=2)
                for _ in range(2)) # the second has nothing to do
    assert apart['last']['train_loss'] < rank_job('in_batch', None)['last']['train_loss'] - .1
    assert load_checkpoint(tmp_path/'last.pt')['config']['ranks'] == '2 apart'
    with pytest.raises(RuntimeError, match='ranks: 2 apart -> 2'):
        launch_nodes(test_loop.rank_job, 'in_batch', str(tmp_path), processes=2)


@pytest.mark.slow
def test_an_error_in_one_rank_is_an_error_here(tmp_path):
    import test_loop
    with pytest.raises(RuntimeError, match='(?s)rank 1 of 2 failed\n.*rank 1 fails'):
        launch_nodes(test_loop.rank_job, 'hard', str(tmp_path), fail=True, processes=2)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_they_resume(tmp_path):
    import test_loop
    whole = launch_nodes(test_loop.rank_job, 'queue', str(tmp_path/'whole'), processes=2)
    with pytest.raises(StopRequested, match='SIGUSR1 came: stopped after step 6'):
        launch_nodes(test_loop.rank_job, 'queue', str(tmp_path/'parts'), stop=True, processes=2)
    again = launch_nodes(test_loop.rank_job, 'queue', str(tmp_path/'parts'), processes=2)
    assert again['last'] == whole['last'] and torch.equal(again['weights'], whole['weights'])


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('loss', [SoftTargetCrossEntropy, SoftTargetInfoNCE])
def test_a_sum_over_micro_batches_is_the_sum(loss, reduction):
    torch.manual_seed(0)
    x, y, w = torch.randn(N, 3).double(), torch.randint(K, (N,)), torch.randn(3, K).double().requires_grad_()
    one, many = (sum(micro_losses(loss(reduction=reduction), lambda j: x[parts[j]] @ w, y, parts))
                 for parts in ([slice(0, N)], [slice(0, 5), slice(5, N)]))
    torch.testing.assert_close(one, many)
    torch.testing.assert_close(*(torch.autograd.grad(v, w)[0] for v in (one, many)))


def test_a_learnable_temperature_is_trained():
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(32, 4), torch.randint(3, (32,))), batch_size=16)
    loss = SoftTargetInfoNCE(temperature=torch.nn.Parameter(torch.tensor(.5)))
    fit(torch.nn.Linear(4, 3), loss, loader, loader, TrainConfig(epochs=2, lr=.1, warmup_epochs=0))
    assert loss.temperature.item() != .5
