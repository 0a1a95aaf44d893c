"softnce.training.checkpoints: files that are never half written, resumption to the last bit, stop signals."
import os, pickle, random, signal, subprocess, sys, time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from training_jobs import NAMES, Killed, job, weights

from softnce.losses import InfoNCE
from softnce.training import checkpoints
from softnce.training.checkpoints import StopRequested, load_checkpoint, save_checkpoint
from softnce.training.config import TrainConfig
from softnce.training.loop import fit
from softnce.vision.batches import Batches
from softnce.vision.models import SmallCNN

# ---- the file

def test_checkpoint_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path/'a'/'last.pt'
    save_checkpoint(dict(v=1), path)
    monkeypatch.setattr(checkpoints.os, 'replace', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): save_checkpoint(dict(v=2), path)  # killed after writing, before renaming
    assert load_checkpoint(path) == dict(v=1)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints.torch, 'save', lambda s, f: (f.write(b'half'), 1/0))
    with pytest.raises(ZeroDivisionError): save_checkpoint(dict(v=3), path)  # killed while writing
    assert load_checkpoint(path) == dict(v=1)
    monkeypatch.undo()
    save_checkpoint(dict(v=4), path)  # a leftover is in nobody's way
    assert load_checkpoint(path) == dict(v=4) and sorted(os.listdir(tmp_path/'a')) == ['last.pt', 'last.pt.before']


def test_checkpoint_loads_without_running_code(tmp_path):
    save_checkpoint(dict(f=os.getcwd), tmp_path/'x.pt')
    torch.save(dict(f=os.getcwd), tmp_path/'y.pt')  # without a checksum
    for name in ('x.pt', 'y.pt'):
        with pytest.raises(pickle.UnpicklingError): load_checkpoint(tmp_path/name)
    assert sorted(os.listdir(tmp_path)) == ['x.pt', 'y.pt']  # refused, not damaged


def steps(path, *numbers):
    for n in numbers: save_checkpoint(dict(step=n, weight=torch.arange(500.)), path)


@pytest.mark.parametrize('where', [0, 3, 100, 1500, 2500, -400, -100, -82, -5])  # headers, tensors, checksum
def test_a_flipped_byte_is_found(where, tmp_path):
    "torch itself reads a flipped byte of a tensor without a word."
    path = tmp_path/'last.pt'
    steps(path, 1, 2)
    damaged = bytearray(path.read_bytes())
    damaged[where] ^= 1
    path.write_bytes(damaged)
    said = r'last.pt is damaged: .*It is now last.pt.damaged-\w{8}; going on from the one before'
    with pytest.warns(UserWarning, match=said): assert load_checkpoint(path)['step'] == 1
    aside, = tmp_path.glob('*.damaged-*')
    assert aside.read_bytes() == damaged and load_checkpoint(path)['step'] == 1  # without a word from now on
    steps(path, 3)
    assert load_checkpoint(path)['step'] == 3 and len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize('left', [0, 10, 700, -90])
def test_half_a_file_is_found(left, tmp_path):
    path = tmp_path/'last.pt'
    steps(path, 1, 2)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.warns(UserWarning, match='going on from the one before'): assert load_checkpoint(path)['step'] == 1


def test_no_whole_checkpoint_is_none(tmp_path):
    path = tmp_path/'last.pt'
    steps(path, 1, 2)
    for p in (path, tmp_path/'last.pt.before'): p.write_bytes(b'x'+p.read_bytes()[1:])
    with pytest.warns(UserWarning, match='no whole checkpoint before it'): assert load_checkpoint(path) is None
    assert load_checkpoint(path) is None and list(tmp_path.glob('last.pt.damaged-*'))


def test_a_file_without_checksum_is_read(tmp_path):
    torch.save(dict(step=1), tmp_path/'old.pt')
    assert load_checkpoint(tmp_path/'old.pt') == dict(step=1)
    save_checkpoint(dict(step=2), tmp_path/'new.pt')
    assert torch.load(tmp_path/'new.pt', weights_only=True) == dict(step=2)  # by anyone


@pytest.mark.parametrize('size', [10, 100_000])  # it fails at the end, or in the middle
def test_a_full_disk_is_an_os_error(size, tmp_path):
    "torch itself says `unexpected pos`."
    path = tmp_path/'last.pt'
    steps(path, 1)
    path.with_name('last.pt.part').symlink_to('/dev/full')
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*last.pt'"):
        save_checkpoint(dict(weight=torch.zeros(size)), path)
    assert os.listdir(tmp_path) == ['last.pt'] and load_checkpoint(path)['step'] == 1
    steps(path, 2)
    assert load_checkpoint(path)['step'] == 2


def test_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.os, 'link', lambda *a: (_ for _ in ()).throw(PermissionError))
    path = tmp_path/'last.pt'
    steps(path, 1, 2)
    path.write_bytes(b'')
    with pytest.warns(UserWarning, match='damaged'): assert load_checkpoint(path)['step'] == 1
    assert len(os.listdir(tmp_path)) == 3


# ---- resumption

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
        due = sum(done) == 14*common.get('accumulate', 1)+2 # 2: evaluations
        if where == 'in the middle of epoch 3' and killed[0].training and due: raise Killed
    killed[0].register_forward_hook(stop_in_the_middle)
    def at_epoch(row):
        if where == 'end of epoch 3' and row['epoch'] == 3: raise Killed
    with pytest.raises(Killed): fit(*killed, config, on_epoch=at_epoch)
    state = load_checkpoint(tmp_path/'last.pt')
    assert len(state['history']) == 2 and state['batch'] == (2 if where == 'in the middle of epoch 3' else 5)
    torch.manual_seed(77)
    again, new = job(name, splits), []
    for p in again[0].parameters(): p.data.normal_()  # nothing of the start may matter
    assert fit(*again, config, on_epoch=new.append) == last
    assert [r['epoch'] for r in new] == [3, 4] and new == rows[2:]
    assert torch.equal(weights(parts[0]), weights(again[0]))
    if name == 'queue': assert torch.equal(*(p[1].noise_samples.targets.dense() for p in (parts, again)))


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
        train = DataLoader(data, 10, shuffle=True, collate_fn=collate, num_workers=workers,
                           generator=own if workers else None)
        return SmallCNN(10, width=4, hidden=8), InfoNCE(), train, Batches(splits.valid, 359)
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
    with pytest.raises(ValueError, match='lr: 0.001 -> 0.01'):
        fit(*job('hard', splits), TrainConfig(epochs=2, lr=.01, checkpoint_dir=tmp_path))


@pytest.mark.parametrize('keep', [lambda c: c[:-500], lambda c: bytes([*c[:400], c[400] ^ 8, *c[401:]])],
                         ids=['half', 'flipped'])
def test_a_damaged_checkpoint_costs_an_epoch_and_nothing_else(keep, splits, tmp_path):
    last = fit(*(whole := job('queue', splits)), TrainConfig(epochs=4))
    config = TrainConfig(epochs=4, checkpoint_dir=tmp_path)
    def at_epoch(row):
        if row['epoch'] == 4: raise Killed
    with pytest.raises(Killed): fit(*job('queue', splits), config, on_epoch=at_epoch)
    path = tmp_path/'last.pt'
    path.write_bytes(keep(path.read_bytes()))
    again, rows = job('queue', splits), []
    with pytest.warns(UserWarning, match='last.pt is damaged'):
        assert fit(*again, config, on_epoch=rows.append) == last
    assert torch.equal(weights(whole[0]), weights(again[0])) and [r['epoch'] for r in rows] == [3, 4]


def test_killed_processes_end_bit_identical(splits, tmp_path):
    "SIGKILL at four random moments, to a process that trains; then the training is finished here."
    import multiprocessing
    torch.set_num_threads(1)
    def work(config): fit(*job('queue', splits), config)
    settings, draw = dict(epochs=6, lr=.01), random.Random(3)
    begin = time.monotonic()
    last = fit(*(whole := job('queue', splits)), TrainConfig(**settings))
    length, reached = time.monotonic()-begin, []
    config = TrainConfig(**settings, checkpoint_dir=tmp_path, checkpoint_steps=1)
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
    said = rf'{number.name} came: stopped after step 7; checkpoint: epoch 1, batch 2 in .*last.pt'
    with pytest.raises(StopRequested, match=said) as stopped: fit(*parts, config)
    assert stopped.value.signals == (number.name,)
    assert signal.getsignal(number) is before and len(steps) == 8
    again = job('queue', splits)
    assert fit(*again, config) == last


# ---- the experiment, killed

def start(out, *parameters):
    main = [sys.executable, '-c', 'from softnce.runs.cli import main; main()']
    command = [*main, 'run', 'images', *(v for p in parameters for v in ('-p', p)), '--out', str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill(p): # the runner and its kernel; until both are gone the kernel may hold the run's lock
    import psutil
    runner = psutil.Process(p.pid)
    runner.suspend() # no further children
    processes = [*runner.children(recursive=True), runner]
    for q in processes: q.kill()
    p.wait()
    psutil.wait_procs(processes, timeout=60)


def result(out):
    names = 'metrics.json', 'history.csv', 'reliability.csv', 'predictions.csv', 'model/model.safetensors'
    kept = next(out.glob('images/*/model')).iterdir() # also best.safetensors, and the noise of the loss
    return {n: next(out.glob(f'images/*/{n}')).read_bytes() for n in names} | {f.name: f.read_bytes() for f in kept}


@pytest.mark.slow
@pytest.mark.parametrize('more', [(), ('noise=queue', 'noise_size=256', 'ema=0.9', 'checkpoint_steps=3')],
                         ids=['as documented', 'queue, average, checkpoints within epochs'])
def test_the_experiment_killed_at_random_moments_has_the_same_result(more, tmp_path):
    """SIGKILL to the runner and its kernel, SOFTNCE_KILLS times at random moments, each followed by the same command.

    Every file is the same, to the byte."""
    import shutil
    pytest.importorskip('psutil'); pytest.importorskip('papermill')
    parameters = 'dataset=digits', 'loss=soft_target_info_nce', *more
    kills = int(os.environ.get('SOFTNCE_KILLS', 3))
    draw = random.Random(int(os.environ.get('SOFTNCE_KILL_SEED', 0)))
    def finish(out):
        p = start(out, *parameters)
        assert p.wait(600) == 0, p.stderr.read()
        return result(out)
    lines = lambda: sum(f.read_bytes().count(b'\n') for f in tmp_path.glob('killed/images/*/history.csv'))
    whole, where = finish(tmp_path/'whole'), []
    while len(where) < kills: # one to three epochs further, and a moment more: in a step, an evaluation, a checkpoint,
        # or the cells after the training
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


# ---- the best epoch

NLLS = [.9, .5, .7, .4, .6, .8, .3]


def stopped_early(splits, folder, dies_after=99, patience=2):
    "A training whose NLLs are given: with patience 2 the fourth epoch is the best, and the sixth the last."
    model, loss, train, valid = job('cross-entropy', splits)
    seen = {}
    def judge(net, *args):
        epoch = len(seen)+1
        seen[epoch] = {k: v.clone() for k, v in net.state_dict().items()}
        return dict(nll=NLLS[epoch-1])
    def row_done(row):
        if row['epoch'] == dies_after: raise KeyboardInterrupt
    config = TrainConfig(epochs=7, lr=.02, warmup_epochs=0, ema=.5, patience=patience, keep_best=True,
                         checkpoint_dir=folder)
    return model, seen, lambda: fit(model, loss, train, valid, config, row_done, evaluate=judge)


def test_early_stopping_takes_the_best_weights(splits, tmp_path):
    model, seen, go = stopped_early(splits, tmp_path)
    row = go()
    assert list(seen) == [1, 2, 3, 4, 5, 6] and (row['epoch'], row['nll']) == (4, .4)
    assert all(torch.equal(v, seen[4][k]) for k, v in model.state_dict().items())
    assert not all(torch.equal(v, seen[6][k]) for k, v in model.state_dict().items())
    again, none, go = stopped_early(splits, tmp_path)  # a finished training: read back
    assert go() == row and not none
    assert all(torch.equal(v, seen[4][k]) for k, v in again.state_dict().items())


def test_without_patience_the_last_counts_and_the_best_is_kept(splits, tmp_path):
    model, seen, go = stopped_early(splits, tmp_path, patience=None)
    assert go()['epoch'] == 7 and all(torch.equal(v, seen[7][k]) for k, v in model.state_dict().items())
    best = load_checkpoint(tmp_path/'best.pt')
    assert best['epoch'] == 7
    plain = TrainConfig(epochs=7, checkpoint_dir=tmp_path/'other')
    fit(*job('cross-entropy', splits), plain)
    assert not (tmp_path/'other'/'best.pt').exists()  # nobody asked for it


def test_early_stopping_resumes(splits, tmp_path):
    "Killed after an epoch is judged and before its checkpoint: the same best weights, the same end."
    _, seen, go = stopped_early(splits, tmp_path/'whole')
    whole = go()
    _, first, go = stopped_early(splits, tmp_path/'killed', dies_after=5)
    with pytest.raises(KeyboardInterrupt): go()
    model, rest, go = stopped_early(splits, tmp_path/'killed')
    rest.update({n: None for n in (1, 2, 3, 4)})  # epochs that are done
    assert go() == whole and len(rest) == 6
    assert all(torch.equal(v, seen[4][k]) for k, v in model.state_dict().items())


def test_best_weights_of_another_epoch_are_refused(splits, tmp_path):
    _, _, go = stopped_early(splits, tmp_path)
    go()
    (tmp_path/'best.pt').write_bytes(b'half')  # the one before is that of epoch 2
    with pytest.warns(UserWarning, match='best.pt is damaged'), pytest.raises(ValueError, match='must hold epoch 4'):
        stopped_early(splits, tmp_path)[2]()
