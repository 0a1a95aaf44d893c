"softnce.images, softnce.models and softnce.training: splits, mixing, evaluation by hand, and resumption to the last bit."
import math, os, pickle
from collections import Counter
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import TensorDataset
pytest.importorskip('sklearn')
from softnce.images import MixUp, digits, loader, mix_images
from softnce.losses import NLL, InfoNCE, SoftDistributionInfoNCE, SoftTargetCrossEntropy, SoftTargetInfoNCE, sample_labels
from softnce.models import SmallCNN, make_head
from softnce.noise import Fresh, Queue
from softnce.targets import SparseTargets, mix, one_hot, smooth
from softnce.training import TrainConfig, cosine_lr, evaluate, fit, load_checkpoint, predict, read_out, save_checkpoint
from softnce import training


@pytest.fixture(scope='module')
def splits(): return digits()


# ---- splits

@pytest.mark.parametrize('seed', [0, 1])
def test_splits_are_disjoint_complete_and_stratified(seed):
    from sklearn.datasets import load_digits
    data, parts = load_digits(), digits(seed)
    as_keys = lambda x: Counter(bytes(v) for v in (np.asarray(x)*(16 if np.asarray(x).max() <= 1 else 1)).round().astype('uint8').reshape(len(x), -1))
    assert sum((as_keys(p.tensors[0]) for p in parts), Counter()) == as_keys(data.images)
    assert all(not as_keys(a.tensors[0]) & as_keys(b.tensors[0]) for a, b in zip(parts, parts[1:]+parts[:1]))
    truth = {bytes(v): y for v, y in zip(data.images.astype('uint8').reshape(1797, -1), data.target)}
    for part in parts:
        x, y = part.tensors
        assert x.shape[1:] == (1, 8, 8) and x.dtype == torch.float32 and 0 <= x.min() and x.max() == 1
        assert [truth[bytes(v)] for v in (16*x).numpy().round().astype('uint8').reshape(len(x), -1)] == y.tolist()
        share = torch.bincount(y, minlength=10)/len(y)
        assert (share - torch.bincount(torch.tensor(data.target))/1797).abs().max() < 1/len(y)*1.5


def test_split_depends_on_the_seed_alone():
    a, b, c = digits(0), digits(0), digits(1)
    assert all(torch.equal(p.tensors[0], q.tensors[0]) for p, q in zip(a, b))
    assert not torch.equal(a.test.tensors[0], c.test.tensors[0])


@pytest.mark.parametrize('valid,test', [(0, .4), (.2, 0), (.5, .5), (-.1, .4)])
def test_split_shares_are_checked(valid, test):
    with pytest.raises(ValueError, match='valid and test must be positive'): digits(valid=valid, test=test)


# ---- mixing

@given(st.integers(1, 8), st.integers(2, 6), st.floats(0, 1), st.booleans(), st.booleans(), st.integers(0, 999))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_images_and_targets_mix_by_the_same_weights(n, k, lam, per_row, permuted, seed):
    "Images that are the one-hot labels: the mixed image is the mixed target, by a loop."
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=g)
    lam = torch.rand(n, generator=g, dtype=torch.float64) if per_row else lam
    perm = torch.randperm(n, generator=g) if permuted else None
    images = torch.eye(k, dtype=torch.float64)[labels].reshape(n, 1, 1, k)
    want = torch.zeros(n, k, dtype=torch.float64)
    for i in range(n):
        w = float(lam[i]) if per_row else lam
        want[i, labels[i]] += w
        want[i, labels[perm[i] if permuted else n-1-i]] += 1-w
    torch.testing.assert_close(mix_images(images, lam, perm).reshape(n, k), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(mix(images.reshape(n, k), lam, perm), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize('alpha,smoothing', [(.8, .1), (.8, 0.), (0., .1), (0., 0.), (5., .5)])
def test_mixup_is_dense_mixing_of_one_hots(alpha, smoothing):
    torch.manual_seed(0)
    images, labels = torch.rand(7, 3, 4, 5), torch.randint(6, (7,))
    mixed, targets = MixUp(6, alpha, smoothing)(images, labels)
    lam = targets.weights[0, 0] if alpha else torch.tensor(1.)
    assert isinstance(targets, SparseTargets) and (not alpha or 0 < lam < 1)
    hot = torch.eye(6)[labels]
    torch.testing.assert_close(targets.dense(), (1-smoothing)*(lam*hot+(1-lam)*hot.flip(0))+smoothing/6)
    torch.testing.assert_close(mixed, lam*images+(1-lam)*images.flip(0))


def test_mixup_agrees_with_timm():
    Mixup = pytest.importorskip('timm.data').Mixup
    images, labels = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 3, 4, 5])
    np.random.seed(0)
    theirs, dense = Mixup(mixup_alpha=.8, label_smoothing=.1, num_classes=10)(images.clone(), labels.clone())
    lam = (dense[0, 0].item()-.01)/.9
    torch.testing.assert_close(dense, smooth(mix(one_hot(labels, 10), lam), .1), rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs, mix_images(images, lam), rtol=0, atol=1e-6)


def test_lam_follows_its_beta_law():
    torch.manual_seed(0)
    make = MixUp(3, alpha=.8)
    lams = torch.stack([make(torch.zeros(2, 1), torch.tensor([0, 1]))[1].weights[0, 0] for _ in range(2000)])
    assert abs(lams.mean()-.5) < .04 and abs(lams.var()-1/(4*(2*.8+1))) < .01  # Beta(a, a): mean 1/2, variance 1/(4(2a+1))


@pytest.mark.parametrize('call,message', [
    (lambda: MixUp(10, alpha=-1), 'alpha must not be negative, got -1'),
    (lambda: MixUp(10, smoothing=1.5), r'smoothing must be in \[0, 1\], got 1.5'),
    (lambda: mix_images(torch.rand(3, 2), 1.5), r'lam must lie in \[0, 1\]'),
    (lambda: mix_images(torch.rand(3, 2), torch.rand(2)), r'lam must be a number or \(3,\), got \(2,\)'),
    (lambda: loader(TensorDataset(torch.rand(3, 1)), 0), 'batch_size must be positive'),
    (lambda: loader(TensorDataset(torch.rand(3, 1)), 4, train=True), 'batch_size must be at most the 3 rows of the data set, got 4'),
    (lambda: make_head(8, 0), 'num_classes must be at least 1, got 0'),
    (lambda: make_head(8, 2, hidden=0), 'hidden must be at least 1, got 0'),
    (lambda: SmallCNN(2)(torch.rand(2, 3, 8, 8)), r'images must be \(N, 1, H, W\), got \(2, 3, 8, 8\)'),
    (lambda: TrainConfig(epochs=0), 'epochs must be at least 1'),
    (lambda: TrainConfig(lr=0.), 'lr must be positive'),
    (lambda: TrainConfig(weight_decay=-1.), 'weight_decay must not be negative'),
    (lambda: TrainConfig(epsilon=1.), 'epsilon must be in'),
    (lambda: TrainConfig(epochs=3, warmup_epochs=3), 'warmup_epochs must be in'),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message): call()


# ---- batches

def test_training_batches_are_whole_and_evaluation_is_in_order(splits):
    torch.manual_seed(0)
    x, y = splits.train.tensors
    seen = [(a, b) for a, b in loader(splits.train, 100, train=True)]
    assert [len(b) for _, b in seen] == [100]*7 and len(loader(splits.train, 100, train=True)) == 7
    pairs = lambda x, y: Counter((bytes((16*v).to(torch.uint8).numpy()), int(k)) for v, k in zip(x, y))
    assert not pairs(*(torch.cat(t) for t in zip(*seen))) - pairs(x, y)  # each row with its own label, none twice
    got = [torch.cat(t) for t in zip(*loader(splits.valid, 100))]
    assert torch.equal(got[0], splits.valid.tensors[0]) and torch.equal(got[1], splits.valid.tensors[1])


# ---- models

def test_head_has_three_layers_or_one():
    linear = [m for m in make_head(5, 3, 7).modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(5, 7), (7, 7), (7, 3)]
    assert isinstance(make_head(5, 3, None), torch.nn.Linear)
    h = torch.randn(4, 5)
    with torch.no_grad():
        a, b, c = linear
        gelu = lambda v: v*.5*(1+torch.erf(v/2**.5))
        want = gelu(gelu(h@a.weight.T+a.bias)@b.weight.T+b.bias)@c.weight.T+c.bias
        torch.testing.assert_close(torch.nn.Sequential(a, torch.nn.GELU(), b, torch.nn.GELU(), c)(h), want)


# ---- evaluation

def test_evaluation_by_hand():
    "Three images, two classes, logits chosen: everything counted on paper."
    class Given(torch.nn.Module):
        def forward(self, x): return torch.stack([x[:, 0], torch.zeros(len(x))], -1)
    x, y = torch.tensor([[math.log(3)], [math.log(3)], [-math.log(4)]]), torch.tensor([0, 1, 1])  # P(0) = 3/4, 3/4, 1/5
    got = evaluate(Given(), torch.nn.CrossEntropyLoss(), loader(TensorDataset(x, y), 2), TrainConfig())
    assert got['top1'] == pytest.approx(2/3)
    assert got['nll'] == pytest.approx((math.log(4/3)+math.log(4)+math.log(5/4))/3, rel=1e-6)
    assert got['brier'] == pytest.approx((2*.25**2+2*.75**2+2*.2**2)/3, rel=1e-6)
    assert got['ece'] == pytest.approx((2*.25+.2)/3, rel=1e-6)  # bins: .75 twice (right once), .8 once (right)


def test_evaluation_uses_the_losses_read_out():
    torch.manual_seed(0)
    eta, eps, logits = torch.tensor([.7, .2, .1]), .1, torch.randn(9, 3)
    s = logits.double() - eta.double().log()
    want = ((1-eps)*s + eta.double().log()).softmax(-1)
    torch.testing.assert_close(read_out(SoftTargetInfoNCE(noise_probs=eta), logits, eps), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(read_out(torch.nn.CrossEntropyLoss(), logits), logits.double().softmax(-1), rtol=0, atol=1e-12)


def test_predict_uses_evaluation_mode_and_puts_the_mode_back(splits):
    torch.manual_seed(0)
    model = SmallCNN(10, width=4, hidden=None)
    for mode in (True, False):
        model.train(mode)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        a, b = predict(model, loader(splits.valid, 50))[0], predict(model, loader(splits.valid, 360))[0]
        torch.testing.assert_close(a, b)
        assert model.training is mode and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_schedule():
    lrs = [cosine_lr(t, 20, 5, 2.) for t in range(20)]
    assert lrs[:5] == pytest.approx([.4, .8, 1.2, 1.6, 2.]) and lrs[5] == 2 and 0 < lrs[-1] < .05
    assert all(a >= b for a, b in zip(lrs[5:], lrs[6:]))
    assert cosine_lr(0, 10, 0, 1.) == 1 and cosine_lr(5, 10, 0, 1.) == pytest.approx(.5)


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


class Killed(Exception): pass


def job(name, splits):
    "A model, its loss, its batches and the generators of its own."
    torch.manual_seed(0)
    own, noise = torch.Generator().manual_seed(3), torch.full((10,), .1)
    soft = MixUp(10)
    loss, transform = {
        'nll on drawn labels': (NLL(), lambda x, y: (soft(x, y)[0], sample_labels(soft(x, y)[1], own))),
        'cross-entropy': (SoftTargetCrossEntropy(), soft),
        'queue': (SoftTargetInfoNCE(noise_probs=noise, noise_samples=Queue(300)), soft),
        'fresh': (SoftTargetInfoNCE(noise_probs=noise, noise_samples=Fresh(40, generator=own)), soft),
        'sampled': (SoftDistributionInfoNCE(noise_probs=noise, generator=own), soft),
        'hard': (InfoNCE(noise_probs=noise), None)}[name]
    class Net(SmallCNN):  # dropout draws from torch's generator in every step
        def forward(self, x): return super().forward(torch.nn.functional.dropout(x, .1, self.training))
    return (Net(10, width=4, hidden=8), loss, loader(splits.train, 120, train=True, transform=transform), loader(splits.valid, 360)), [own] if 'nll' in name else []


@pytest.mark.parametrize('name', ['nll on drawn labels', 'cross-entropy', 'queue', 'fresh', 'sampled', 'hard'])
@pytest.mark.parametrize('where', ['first batches', 'end of epoch 3'])
def test_a_killed_run_ends_bit_identical(name, where, splits, tmp_path):
    settings = dict(epochs=4, lr=.01, epsilon=.1, warmup_epochs=.5)
    parts, own = job(name, splits)
    rows = []
    last = fit(*parts, TrainConfig(**settings), on_epoch=rows.append, generators=own)
    config = TrainConfig(**settings, checkpoint_dir=tmp_path)
    killed, own = job(name, splits)
    steps = []
    def hook(*_):
        steps.append(1)
        if where == 'first batches' and len(steps) == 14: raise Killed  # epochs have 5 steps and an evaluation: in the third
    killed[0].register_forward_hook(hook)
    def at_epoch(row):
        if where == 'end of epoch 3' and row['epoch'] == 3: raise Killed
    with pytest.raises(Killed): fit(*killed, config, on_epoch=at_epoch, generators=own)
    assert len(load_checkpoint(tmp_path/'last.pt')['history']) == 2
    torch.manual_seed(77)
    again, own = job(name, splits)
    for p in again[0].parameters(): p.data.normal_()  # nothing of the start may matter
    new = []
    assert fit(*again, config, on_epoch=new.append, generators=own) == last
    assert [r['epoch'] for r in new] == [3, 4] and new == rows[2:]
    states = [m.state_dict() for m in (parts[0], again[0])]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    if name == 'queue': assert torch.equal(parts[1].noise_samples.targets.dense(), again[1].noise_samples.targets.dense())


def test_fit_is_the_loop_written_out(splits):
    "Seed, shuffle, AdamW at the scheduled rate, twice through the data: the same weights, to the bit."
    (model, loss, train, valid), _ = job('cross-entropy', splits)
    rows, config = [], TrainConfig(epochs=2, lr=.02, weight_decay=.3, warmup_epochs=.8, seed=5)
    last = fit(model, loss, train, valid, config, on_epoch=rows.append)
    (plain, loss, train, valid), _ = job('cross-entropy', splits)
    optimizer, step, means = torch.optim.AdamW(plain.parameters(), weight_decay=.3), 0, []
    torch.manual_seed(5)
    for _ in range(2):
        plain.train()
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
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))
    assert [r['train_loss'] for r in rows] == pytest.approx(means, rel=1e-12) and {k: last[k] for k in metrics} == metrics
    assert [(r['seed'], r['epoch'], r['split']) for r in rows] == [(5, 1, 'valid'), (5, 2, 'valid')]


def test_the_seed_matters_and_the_callers_generator_is_left_alone(splits):
    runs = {}
    for key, seed in (('a', 0), ('b', 0), ('c', 1)):
        parts, _ = job('cross-entropy', splits)
        torch.manual_seed(123)
        fit(*parts, TrainConfig(epochs=2, seed=seed))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(123)))
        runs[key] = torch.cat([p.flatten() for p in parts[0].parameters()])
    assert torch.equal(runs['a'], runs['b']) and not torch.equal(runs['a'], runs['c'])


def test_a_checkpoint_of_other_settings_is_refused(splits, tmp_path):
    fit(*job('hard', splits)[0], TrainConfig(epochs=2, checkpoint_dir=tmp_path))
    with pytest.raises(ValueError, match='lr: 0.001 -> 0.01'): fit(*job('hard', splits)[0], TrainConfig(epochs=2, lr=.01, checkpoint_dir=tmp_path))


def test_a_non_finite_loss_stops_at_its_step(splits, tmp_path):
    parts, _ = job('hard', splits)
    class Bad(torch.nn.Module):
        calls = 0
        def forward(self, logits, targets):
            self.calls += 1
            return logits.mean()*(math.inf if self.calls == 8 else 1)
    with pytest.raises(FloatingPointError, match=r'at step 8 \(epoch 2, batch 3 of 5\); logits from .* checkpoint of epoch 1'):
        fit(parts[0], Bad(), *parts[2:], TrainConfig(epochs=3, checkpoint_dir=tmp_path))
    assert len(load_checkpoint(tmp_path/'last.pt')['history']) == 1


@pytest.mark.parametrize('name', ['cross-entropy', 'queue', 'hard'])
def test_training_learns(name, splits):
    "A few epochs take every kind of loss far above chance on images that it has not seen."
    torch.manual_seed(0)
    _, loss, train, valid = job(name, splits)[0]
    train = loader(splits.train, 32, train=True, transform=None if name == 'hard' else MixUp(10))
    assert fit(SmallCNN(10, width=8, hidden=32), loss, train, valid, TrainConfig(epochs=6, lr=.03, epsilon=.1))['top1'] > .7


@pytest.mark.slow
def test_the_experiment_killed_and_started_again_has_the_same_metrics(tmp_path):
    "SIGKILL to the runner and its kernel once during the second and once during the eighth training; metrics and history to the byte."
    import subprocess, sys, time
    psutil = pytest.importorskip('psutil'); pytest.importorskip('papermill')
    def start(out):
        command = [sys.executable, '-c', 'from softnce.runs import main; main()', 'run', 'images', '-p', 'epochs=2', '-p', 'seeds=[0]', '--out', str(out)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    def result(out): return [next(out.glob(f'images/*/{name}')).read_bytes() for name in ('metrics.json', 'history.csv')]
    def finish(out):
        p = start(out)
        assert p.wait(600) == 0, p.stderr.read()
        return result(out)
    for lines in (4, 16):  # a header and two rows a training
        p = start(tmp_path/'killed')
        done = lambda: sum(f.read_bytes().count(b'\n') for f in tmp_path.glob('killed/images/*/history.csv'))
        while done() < lines and p.poll() is None: time.sleep(.02)
        for q in [*psutil.Process(p.pid).children(recursive=True), psutil.Process(p.pid)]: q.kill()
        p.wait()
        assert not list(tmp_path.glob('killed/images/*/metrics.json')) and done() < 21
    assert finish(tmp_path/'killed') == finish(tmp_path/'whole')
