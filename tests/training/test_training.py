"softnce.training.loop: evaluation by hand, the loop written out, exact micro-batches, resumption to the last bit, signals, two ranks."
import math, os, pickle, random, signal, subprocess, sys, time
import numpy as np, pytest, torch
pytest.importorskip('sklearn'); pytest.importorskip('accelerate')
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from softnce.training import loop as training
from softnce.vision.batches import Batches, Mixing
from softnce.vision.images import digits
from softnce.losses import NLL, InfoNCE, SoftDistributionInfoNCE, SoftTargetCrossEntropy, SoftTargetInfoNCE
from softnce.vision.models import SmallCNN
from softnce.training.nodes import launch_nodes
from softnce.noise import ClosedForm, Fresh, Queue
from softnce.targets import SparseTargets, mix, smooth
from softnce.training.loop import (StopRequested, TrainConfig, cosine_lr, evaluate, fit, load_checkpoint, micro_losses, param_groups, predict,
                              read_out, save_checkpoint, scaled_lr)


@pytest.fixture(scope='module')
def splits(): return digits()


class Killed(Exception): pass


class Net(SmallCNN): # dropout draws from torch's generator in every step
    def forward(self, x): return super().forward(nn.functional.dropout(x, .1, self.training))


NOISE = torch.full((10,), .1)
NAMES = ['nll on drawn labels', 'cross-entropy', 'queue', 'fresh', 'sampled', 'hard']


def job(name, splits):
    "A model, its loss and its batches."
    torch.manual_seed(0)
    own = torch.Generator().manual_seed(3)
    loss, mixing = {
        'nll on drawn labels': (NLL(), Mixing(10, draw=True)),
        'cross-entropy': (SoftTargetCrossEntropy(), Mixing(10)),
        'queue': (SoftTargetInfoNCE(noise_probs=NOISE, noise_samples=Queue(300)), Mixing(10)),
        'fresh': (SoftTargetInfoNCE(noise_probs=NOISE, noise_samples=Fresh(40, generator=own)), Mixing(10)),
        'sampled': (SoftDistributionInfoNCE(noise_probs=NOISE, generator=own), Mixing(10)),
        'hard': (InfoNCE(noise_probs=NOISE), None)}[name]
    return Net(10, width=4, hidden=8), loss, Batches(splits.train, 120, True, mixing=mixing), Batches(splits.valid, 359)


def weights(model): return torch.cat([v.double().flatten() for v in model.state_dict().values()])


# ---- settings, evaluation

@pytest.mark.parametrize('change,message', [
    (dict(epochs=0), 'epochs must be at least 1'), (dict(lr=0.), 'lr must be positive'), (dict(weight_decay=-1.), 'weight_decay must not be negative'),
    (dict(epsilon=1.), 'epsilon must be in'), (dict(epochs=3, warmup_epochs=3), 'warmup_epochs must be in'), (dict(min_lr=1.), 'min_lr must be in'),
    (dict(accumulate=0), 'accumulate must be at least 1'), (dict(layer_decay=0.), 'layer_decay must be in'), (dict(ema=1.), 'ema must be in'),
    (dict(clip_norm=0.), 'clip_norm must be positive'), (dict(schedule='linear'), "schedule must be one of step, epoch, got 'linear'"),
    (dict(precision='fp8'), "precision must be one of fp32, bf16, fp16, got 'fp8'"),
])
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message): TrainConfig(**change)


def test_evaluation_by_hand():
    "Three images, two classes, logits chosen: everything counted on paper."
    class Given(nn.Module):
        def forward(self, x): return torch.stack([x[:, 0], torch.zeros(len(x))], -1)
    x, y = torch.tensor([[math.log(3)], [math.log(3)], [-math.log(4)]]), torch.tensor([0, 1, 1])  # P(0) = 3/4, 3/4, 1/5
    got = evaluate(Given(), nn.CrossEntropyLoss(), DataLoader(TensorDataset(x, y), 2), TrainConfig())
    assert got['top1'] == pytest.approx(2/3) and 'top5' not in got
    assert got['nll'] == pytest.approx((math.log(4/3)+math.log(4)+math.log(5/4))/3, rel=1e-6)
    assert got['brier'] == pytest.approx((2*.25**2+2*.75**2+2*.2**2)/3, rel=1e-6)
    assert got['ece'] == pytest.approx((2*.25+.2)/3, rel=1e-6)  # bins: .75 twice (right once), .8 once (right)
    nll = lambda T: sum(math.log(1+math.exp(-v/T)) for v in (math.log(3), -math.log(3), math.log(4)))
    assert nll(got['temperature']) < min(nll(got['temperature']*1.01), nll(got['temperature']/1.01))


def test_top5_by_a_loop(splits):
    torch.manual_seed(0)
    probs, labels = torch.softmax(torch.randn(200, 9), 1), torch.randint(9, (200,))
    got = training.classification_metrics(probs, labels)
    assert got['top5'] == sum(int(y) in sorted(range(9), key=lambda k: -p[k])[:5] for p, y in zip(probs.tolist(), labels))/200


def test_evaluation_uses_the_losses_read_out():
    torch.manual_seed(0)
    eta, eps, logits = torch.tensor([.7, .2, .1]), .1, torch.randn(9, 3)
    s = logits.double() - eta.double().log()
    want = ((1-eps)*s + eta.double().log()).softmax(-1)
    torch.testing.assert_close(read_out(SoftTargetInfoNCE(noise_probs=eta), logits, eps), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(read_out(nn.CrossEntropyLoss(), logits), logits.double().softmax(-1), rtol=0, atol=1e-12)


def test_predict_uses_evaluation_mode_and_puts_the_mode_back(splits):
    model = SmallCNN(10, width=4, hidden=None)
    for mode in (True, False):
        model.train(mode)
        before = weights(model)
        a, b = predict(model, Batches(splits.valid, 50))[0], predict(model, Batches(splits.valid, 359))[0]
        torch.testing.assert_close(a, b)
        assert model.training is mode and torch.equal(before, weights(model))
    assert predict(model.double(), [(torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.zeros(2))])[0].dtype == torch.float64


def test_schedule():
    lrs = [cosine_lr(t, 20, 5, 2.) for t in range(20)]
    assert lrs[:5] == pytest.approx([.4, .8, 1.2, 1.6, 2.]) and lrs[5] == 2 and 0 < lrs[-1] < .05
    assert all(a >= b for a, b in zip(lrs[5:], lrs[6:]))
    assert cosine_lr(0, 10, 0, 1.) == 1 and cosine_lr(5, 10, 0, 1.) == pytest.approx(.5) and cosine_lr(10, 10, 0, 1., .2) == .2
    assert scaled_lr(3e-4, 1024) == pytest.approx(.0012)


def test_layer_decay_is_a_power_of_the_depth():
    pytest.importorskip('timm')
    from softnce.vision.models import make_model
    model = make_model('vit_tiny', 4, 64, hidden=8)
    groups, config = param_groups(model, TrainConfig(layer_decay=.65)), TrainConfig(layer_decay=.65)
    scale = {id(p): (g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']}
    assert len(scale) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        depth = 0 if name in ('cls_token', 'pos_embed') or name.startswith('patch_embed') else 1+int(name.split('.')[1]) if name.startswith('blocks') else 13
        if name.startswith('head'): depth = 13
        assert scale[id(p)][0] == pytest.approx(.65**(13-depth)), name
        assert scale[id(p)][1] == (0. if p.ndim == 1 or name in ('cls_token', 'pos_embed') else config.weight_decay), name


# ---- the loop

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
    assert [r['train_loss'] for r in rows] == pytest.approx(means, rel=1e-12) and {k: last[k] for k in metrics} == metrics
    assert [(r['seed'], r['epoch'], r['split']) for r in rows] == [(5, 1, 'valid'), (5, 2, 'valid')]


def test_clipping_averaging_and_layer_rates_written_out(splits):
    "One parameter tensor a group, gradient norm cut to .01, an average of the weights with decay .8, the rate changed by the epoch."
    class Groups(SmallCNN): # as timm names depths
        def group_matcher(self, coarse=False): return dict(stem=r'^body', blocks=[(r'^head\.(\d+)', None)])
    make = lambda: (torch.manual_seed(1), Groups(10, width=4, hidden=8))[1]
    model, config = make(), TrainConfig(epochs=3, lr=.02, warmup_epochs=1, schedule='epoch', layer_decay=.5, clip_norm=.01, ema=.8, seed=2)
    _, loss, train, valid = job('cross-entropy', splits)
    fit(model, loss, train, valid, config)
    plain = make()
    groups = param_groups(plain, config)
    optimizer, average = torch.optim.AdamW(groups, lr=1.), {k: v.clone() for k, v in plain.state_dict().items()}
    torch.manual_seed(2)
    for epoch in range(3):
        plain.train(); train.seek(epoch)
        for g in optimizer.param_groups: g['lr'] = .02*(1 if epoch == 0 else (1+math.cos(math.pi*(epoch-1)/2))/2)*g['lr_scale']
        for x, t in train:
            optimizer.zero_grad()
            loss(plain(x), t).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), .01)
            optimizer.step()
            for k, v in plain.state_dict().items(): average[k] = average[k]*.8 + v*.2 if v.is_floating_point() else v.clone()
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
def test_training_learns(name, splits):
    "A few epochs take every kind of loss far above chance on images that it has not seen."
    _, loss, _, valid = job(name, splits)
    train = Batches(splits.train, 32, True, mixing=None if name == 'hard' else Mixing(10, cutmix=0.))
    torch.manual_seed(0)
    assert fit(SmallCNN(10, width=8, hidden=32), loss, train, valid, TrainConfig(epochs=6, lr=.03, epsilon=.1))['top1'] > .7


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
    model.body[0].register_forward_hook(lambda m, i, o: seen.append((o.dtype, i[0].is_contiguous(memory_format=torch.channels_last))))
    a = fit(model, loss, train, valid, TrainConfig(epochs=2, lr=.01, precision=precision, channels_last=channels_last))
    b = fit(*full, TrainConfig(epochs=2, lr=.01))
    assert seen[0][0] == (torch.bfloat16 if precision == 'bf16' else torch.float32)
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
    for p in (parts, same): p[0].forward = SmallCNN.forward.__get__(p[0]) # without dropout, which draws otherwise when compiled
    a, b = (fit(*p, TrainConfig(epochs=2, compile=c)) for p, c in ((parts, True), (same, False)))
    assert a['train_loss'] == pytest.approx(b['train_loss'], rel=1e-4) and list(parts[0].state_dict()) == list(same[0].state_dict())


def test_trackers_of_accelerate(splits, tmp_path):
    with pytest.raises(ValueError, match=r'trackers must be among those of Accelerate that are installed \(.*\), got nonsense'): fit(*job('hard', splits), TrainConfig(trackers=('nonsense',)))
    pytest.importorskip('tensorboard')
    fit(*job('hard', splits), TrainConfig(epochs=2, checkpoint_dir=tmp_path, trackers=('tensorboard',)))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(next(tmp_path.rglob('events*')).parent)); events.Reload()
    assert {'top1', 'train_loss'} <= set(events.Tags()['scalars']) and [e.step for e in events.Scalars('top1')] == [1, 2]


# ---- micro-batches

N, K = 12, 5
ETA = torch.tensor([.3, .1, .2, .25, .15], dtype=torch.float64)
SOURCES = dict(in_batch=lambda: None, queue=lambda: Queue(20), closed_form=ClosedForm, fresh=lambda: Fresh(7, generator=torch.Generator().manual_seed(4)))


def step_of(kind, source, seed=0):
    "A linear model, a loss, and two steps' inputs and targets, in float64."
    g = torch.Generator().manual_seed(seed)
    loss = {'soft': SoftTargetInfoNCE, 'hard': InfoNCE, 'ce': SoftTargetCrossEntropy, 'sampled': SoftDistributionInfoNCE}[kind]
    more = dict(generator=torch.Generator().manual_seed(9)) if kind == 'sampled' else {}
    loss = loss() if kind == 'ce' else loss(noise_probs=ETA, noise_samples=SOURCES[source](), **more)
    steps = []
    for _ in range(2):
        x, y = torch.randn(N, 3, generator=g, dtype=torch.float64), torch.randint(K, (N,), generator=g)
        t = y if kind == 'hard' else smooth(mix(SparseTargets(y[:, None], torch.ones(N, 1, dtype=torch.float64), num_classes=K), .7), .1)
        steps.append((x, t))
    return torch.randn(3, K, generator=g, dtype=torch.float64).requires_grad_(), loss, steps


@pytest.mark.parametrize('kind,source', [('soft', 'in_batch'), ('soft', 'queue'), ('soft', 'closed_form'), ('soft', 'fresh'), ('hard', 'in_batch'), ('hard', 'queue'), ('ce', 'in_batch'),
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
    if source == 'queue': assert torch.equal(*(torch.as_tensor(q.noise_samples.targets if kind in ('hard', 'sampled') else q.noise_samples.targets.dense()) for q in (loss, whole)))


def test_plain_accumulation_would_be_another_loss():
    w, loss, ((x, t), _) = step_of('soft', 'in_batch')
    naive = sum(loss(x[p] @ w, t[p]).item()/2 for p in (slice(0, 6), slice(6, 12)))
    assert abs(naive - loss(x @ w, t).item()) > .1


@pytest.mark.parametrize('name', ['cross-entropy', 'queue', 'hard', 'sampled'])
def test_fit_in_micro_batches(name, splits):
    "Without batch normalisation, four micro-batches a step train the network of the whole batch."
    class Mlp(nn.Sequential):
        def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))
    runs = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model, (_, loss, train, valid) = Mlp().double(), job(name, splits)
        double = lambda b, e: (b.seek(e), [(x.double(), t.to(torch.float64) if isinstance(t, SparseTargets) else t) for x, t in b])[1]
        last = fit(model, loss, double(train, 0), [(x.double(), y) for x, y in valid], TrainConfig(epochs=2, lr=.01, accumulate=accumulate))
        runs.append((weights(model), last['train_loss']))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=0, atol=1e-6) # Adam divides by the gradient's size
    assert runs[0][1] == pytest.approx(runs[1][1], abs=1e-8)


# ---- checkpoints

def test_checkpoint_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path/'a'/'last.pt'
    save_checkpoint(dict(v=1), path)
    monkeypatch.setattr(training.os, 'replace', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): save_checkpoint(dict(v=2), path)  # killed after writing, before renaming
    assert load_checkpoint(path) == dict(v=1)
    monkeypatch.undo()
    monkeypatch.setattr(training.torch, 'save', lambda s, p: (open(p, 'wb').write(b'half'), 1/0))
    with pytest.raises(ZeroDivisionError): save_checkpoint(dict(v=3), path)  # killed while writing
    assert load_checkpoint(path) == dict(v=1)
    monkeypatch.undo()
    save_checkpoint(dict(v=4), path)  # a leftover is in nobody's way
    assert load_checkpoint(path) == dict(v=4) and os.listdir(tmp_path/'a') == ['last.pt']


def test_checkpoint_loads_without_running_code(tmp_path):
    save_checkpoint(dict(f=os.getcwd), tmp_path/'x.pt')
    with pytest.raises(pickle.UnpicklingError): load_checkpoint(tmp_path/'x.pt')


EXTRAS = dict(plain={}, ema_clip=dict(ema=.9, clip_norm=.5), accumulate=dict(accumulate=3))


@pytest.mark.parametrize('name,extra', [(n, 'plain') for n in NAMES] + [('queue', 'ema_clip'), ('queue', 'accumulate')])
@pytest.mark.parametrize('where', ['in the middle of epoch 3', 'end of epoch 3'])
def test_a_killed_run_ends_bit_identical(name, extra, where, splits, tmp_path):
    "Epochs have 5 steps and an evaluation; a checkpoint after every third step and every epoch."
    common = dict(epochs=4, lr=.01, epsilon=.1, warmup_epochs=.5, **EXTRAS[extra])
    parts, rows = job(name, splits), []
    last = fit(*parts, TrainConfig(**common), on_epoch=rows.append)
    config = TrainConfig(**common, checkpoint_dir=tmp_path, checkpoint_steps=3)
    killed, done = job(name, splits), []
    def stop_in_the_middle(*_):
        done.append(1)
        if where == 'in the middle of epoch 3' and killed[0].training and sum(done) == 14*common.get('accumulate', 1)+2: raise Killed # 2: evaluations
    killed[0].register_forward_hook(stop_in_the_middle)
    def at_epoch(row):
        if where == 'end of epoch 3' and row['epoch'] == 3: raise Killed
    with pytest.raises(Killed): fit(*killed, config, on_epoch=at_epoch)
    state = load_checkpoint(tmp_path/'last.pt')
    assert (len(state['history']), state['batch']) == ((2, 2) if where == 'in the middle of epoch 3' else (2, 5)) or state['batch'] in (2, 5)
    torch.manual_seed(77)
    again, new = job(name, splits), []
    for p in again[0].parameters(): p.data.normal_()  # nothing of the start may matter
    assert fit(*again, config, on_epoch=new.append) == last
    assert [r['epoch'] for r in new] == [3, 4] and new == rows[2:]
    assert torch.equal(weights(parts[0]), weights(again[0]))
    if name == 'queue': assert torch.equal(parts[1].noise_samples.targets.dense(), again[1].noise_samples.targets.dense())


@pytest.mark.parametrize('workers', [0, 2])
def test_any_loader_resumes_within_an_epoch(workers, splits, tmp_path):
    "A shuffled DataLoader whose transform draws from the global generators: its order is drawn again and passed over."
    data = TensorDataset(torch.stack([splits.train.image(i) for i in range(100)]), splits.train.labels[:100])
    def collate(rows):
        x, y = (torch.stack(v) for v in zip(*rows))
        return x+.1*torch.rand_like(x)+.01*random.random()+.01*float(np.random.rand()), y
    def parts():
        torch.manual_seed(0)
        own = torch.Generator().manual_seed(1)
        return (SmallCNN(10, width=4, hidden=8), InfoNCE(), DataLoader(data, 10, shuffle=True, collate_fn=collate, num_workers=workers, generator=own if workers else None),
                Batches(splits.valid, 359))
    whole = parts()
    config = dict(epochs=2, lr=.01)
    last = fit(*whole, TrainConfig(**config))
    killed, config, count = parts(), TrainConfig(**config, checkpoint_dir=tmp_path, checkpoint_steps=1), []
    def stop(*_):
        count.append(1)
        if len(count) == 16: raise Killed
    killed[0].register_forward_hook(stop)
    with pytest.raises(Killed): fit(*killed, config)
    assert load_checkpoint(tmp_path/'last.pt')['batch'] == 4
    again = parts()
    assert fit(*again, config) == last and torch.equal(weights(whole[0]), weights(again[0]))


def test_a_checkpoint_of_other_settings_is_refused(splits, tmp_path):
    fit(*job('hard', splits), TrainConfig(epochs=2, checkpoint_dir=tmp_path))
    with pytest.raises(ValueError, match='lr: 0.001 -> 0.01'): fit(*job('hard', splits), TrainConfig(epochs=2, lr=.01, checkpoint_dir=tmp_path))


def test_a_non_finite_loss_stops_at_its_step(splits, tmp_path):
    parts = job('hard', splits)
    class Bad(nn.Module):
        calls = 0
        def forward(self, logits, targets):
            self.calls += 1
            return logits.mean()*(math.inf if self.calls == 8 else 1)
    with pytest.raises(FloatingPointError, match=r'at step 8 \(epoch 2, batch 3 of 5\); learning rate .*; 120 rows; logits from .* 0 of 1200 not finite; inputs from 0 to 1, '
                       r'0 of 7680 not finite; last good checkpoint: epoch 1, batch 0 in .*last.pt'):
        fit(parts[0], Bad(), *parts[2:], TrainConfig(epochs=3, checkpoint_dir=tmp_path))
    assert len(load_checkpoint(tmp_path/'last.pt')['history']) == 1 and weights(parts[0]).isfinite().all()


def test_killed_processes_end_bit_identical(splits, tmp_path):
    "SIGKILL at four random moments, to a process that trains; then the training is finished here."
    import multiprocessing
    torch.set_num_threads(1)
    def work(config): fit(*job('queue', splits), config)
    settings, draw = dict(epochs=6, lr=.01), random.Random(3)
    begin = time.monotonic()
    last = fit(*(whole := job('queue', splits)), TrainConfig(**settings))
    length, config, reached = time.monotonic()-begin, TrainConfig(**settings, checkpoint_dir=tmp_path, checkpoint_steps=1), []
    for _ in range(4):
        p = multiprocessing.get_context('fork').Process(target=work, args=(config,))
        p.start(); p.join(draw.uniform(.1, .5)*length); p.kill(); p.join()
        state = load_checkpoint(tmp_path/'last.pt')
        reached.append((len(state['history']), state['batch']) if state else (0, 0))
    again = job('queue', splits)
    assert fit(*again, config) == last and torch.equal(weights(whole[0]), weights(again[0]))
    assert reached == sorted(reached) and reached[-1] > (0, 0)


# ---- signals

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_after_the_step(number, splits, tmp_path):
    last = fit(*job('queue', splits), TrainConfig(epochs=3))
    parts, steps, before = job('queue', splits), [], signal.getsignal(number)
    def send(*_):
        steps.append(1)
        if len(steps) == 8: os.kill(os.getpid(), number)  # 5 steps, an evaluation, and in the second step of epoch 2
    parts[0].register_forward_hook(send)
    config = TrainConfig(epochs=3, checkpoint_dir=tmp_path)
    with pytest.raises(StopRequested, match=rf'{number.name} came: stopped after step 7; checkpoint: epoch 1, batch 2 in .*last.pt'): fit(*parts, config)
    assert signal.getsignal(number) is before and len(steps) == 8
    again = job('queue', splits)
    assert fit(*again, config) == last


# ---- several ranks

class Plain(nn.Sequential): # no batch normalisation, which each rank would do on its own rows
    def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))


def rank_job(source, folder, accumulate=1, stop=False, fail=False):
    "What a rank does: float64, so that the ranks can be compared with one process."
    rank, world, _ = training.ranks('cpu')
    torch.manual_seed(0)
    splits, model = digits(), Plain().double()
    class Double(Batches):
        def __iter__(self): return ((x.double(), t.to(torch.float64) if isinstance(t, SparseTargets) else t) for x, t in super().__iter__())
    mixing = None if source == 'hard' else Fixed()
    loss = {'in_batch': lambda: SoftTargetInfoNCE(NOISE.double()), 'queue': lambda: SoftTargetInfoNCE(NOISE.double(), noise_samples=Queue(240)), 'hard': lambda: InfoNCE(NOISE.double())}[source]()
    train, valid = Double(splits.train, 120, True, mixing=mixing, rank=rank, world=world), Double(splits.valid, 60, rank=rank, world=world)
    if fail and rank == 1: raise RuntimeError('rank 1 fails')
    steps = []
    def send(*_):
        if model.training: steps.append(1)
        if len(steps) == 6 and model.training: os.kill(os.getpid(), signal.SIGUSR1)
    if stop and rank == 1: model.register_forward_hook(send)
    last = fit(model, loss, train, valid, TrainConfig(epochs=2, lr=.01, accumulate=accumulate, checkpoint_dir=folder, device='cpu'))
    return dict(last=last, weights=weights(model), logits=predict(model, valid)[0])


class Fixed: # smoothing only: mixing partners depend on the rows a rank has
    def __call__(self, x, y): return x, smooth(SparseTargets(y[:, None], torch.ones(len(y), 1), num_classes=10), .1)


@pytest.fixture(autouse=True)
def importable(monkeypatch): # by the processes that `launch_nodes` spawns
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([os.path.dirname(__file__), os.environ.get('PYTHONPATH', '')]))


@pytest.mark.slow
@pytest.mark.parametrize('source,accumulate', [('in_batch', 1), ('queue', 1), ('hard', 1), ('queue', 3)])
def test_two_ranks_train_the_network_of_one(source, accumulate, tmp_path):
    import test_training
    one = rank_job(source, None)
    two = launch_nodes(test_training.rank_job, source, str(tmp_path), accumulate, processes=2)
    torch.testing.assert_close(two['weights'], one['weights'], rtol=0, atol=1e-7)
    torch.testing.assert_close(two['logits'], one['logits'], rtol=0, atol=1e-6)
    assert {k: two['last'][k] for k in ('train_loss', 'nll', 'top1')} == pytest.approx({k: one['last'][k] for k in ('train_loss', 'nll', 'top1')}, abs=1e-7)


@pytest.mark.slow
def test_an_error_in_one_rank_is_an_error_here(tmp_path):
    import test_training
    with pytest.raises(RuntimeError, match='(?s)rank 1 of 2 failed\n.*rank 1 fails'): launch_nodes(test_training.rank_job, 'hard', str(tmp_path), fail=True, processes=2)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_they_resume(tmp_path):
    import test_training
    whole = launch_nodes(test_training.rank_job, 'queue', str(tmp_path/'whole'), processes=2)
    with pytest.raises(StopRequested, match='SIGUSR1 came: stopped after step 6'): launch_nodes(test_training.rank_job, 'queue', str(tmp_path/'parts'), stop=True, processes=2)
    again = launch_nodes(test_training.rank_job, 'queue', str(tmp_path/'parts'), processes=2)
    assert again['last'] == whole['last'] and torch.equal(again['weights'], whole['weights'])


# ---- the experiment, killed

def start(out, *parameters):
    command = [sys.executable, '-c', 'from softnce.runs.cli import main; main()', 'run', 'images', *(v for p in parameters for v in ('-p', p)), '--out', str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill(p): # the runner and its kernel; until both are gone the kernel may hold the run's lock
    import psutil
    runner = psutil.Process(p.pid)
    runner.suspend() # no further children
    processes = [*runner.children(recursive=True), runner]
    for q in processes: q.kill()
    p.wait()
    psutil.wait_procs(processes, timeout=60)


def result(out): return {n: next(out.glob(f'images/*/{n}')).read_bytes() for n in ('metrics.json', 'history.csv', 'reliability.csv')}


@pytest.mark.slow
@pytest.mark.parametrize('more', [(), ('noise=queue', 'noise_size=256', 'ema=0.9', 'checkpoint_steps=3')], ids=['as documented', 'queue, average, checkpoints within epochs'])
def test_the_experiment_killed_at_random_moments_has_the_same_result(more, tmp_path):
    "SIGKILL to the runner and its kernel, SOFTNCE_KILLS times at random moments, each followed by the same command: every file the same, to the byte."
    import shutil
    pytest.importorskip('psutil'); pytest.importorskip('papermill')
    parameters, kills, draw = ('dataset=digits', 'loss=soft_target_info_nce', *more), int(os.environ.get('SOFTNCE_KILLS', 3)), random.Random(int(os.environ.get('SOFTNCE_KILL_SEED', 0)))
    def finish(out):
        p = start(out, *parameters)
        assert p.wait(600) == 0, p.stderr.read()
        return result(out)
    lines = lambda: sum(f.read_bytes().count(b'\n') for f in tmp_path.glob('killed/images/*/history.csv'))
    whole, where = finish(tmp_path/'whole'), []
    while len(where) < kills: # one to three epochs further, and a moment more: in a step, an evaluation, a checkpoint, or the cells after the training
        p, goal = start(tmp_path/'killed', *parameters), lines()+draw.choice((1, 2, 3))
        while lines() < goal and p.poll() is None: time.sleep(.005)
        until = time.monotonic()+draw.uniform(0., .8)
        while time.monotonic() < until and p.poll() is None: time.sleep(.005)
        if p.poll() is None:
            kill(p)
            where.append(lines())
        else: # finished before the shot: from scratch, so that the next ones still hit something
            assert p.returncode == 0 and result(tmp_path/'killed') == whole
            shutil.rmtree(tmp_path/'killed')
    assert finish(tmp_path/'killed') == whole
    print(f'{kills} kills, lines of history.csv at each: {where}')
