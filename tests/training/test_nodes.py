"softnce.training.nodes: several machines, which are processes of this one; their loss, and errors of any rank."
import os, signal, subprocess, sys, threading, time

import psutil
import pytest
import torch

from softnce.training.nodes import launch_nodes, slurm_hosts
from softnce.targets import one_hot, smooth
from softnce.losses import SoftTargetInfoNCE

slow = pytest.mark.slow


def step(rank, world):
    "Value and gradient of one step, on the rows of this rank."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 5, generator=g, dtype=torch.float64), torch.randint(4, (12,), generator=g)
    net = torch.nn.Linear(5, 4).double()
    torch.nn.init.constant_(net.bias, .3)
    torch.nn.init.normal_(net.weight, generator=torch.Generator().manual_seed(1))
    targets = smooth(one_hot(y, 4).double(), .1)
    loss = SoftTargetInfoNCE()(net(x[rank::world]), targets[rank::world])
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


def job(how='', machine_rank=1):
    "What a rank does: the mean over ranks of value and gradient."
    import torch.distributed as dist
    dist.init_process_group('gloo')
    rank, world = dist.get_rank(), dist.get_world_size()
    if how and rank == world-1:
        if how == 'raises': raise ValueError(f'rank {rank} has no data')
        os.kill(os.getpid(), signal.SIGKILL)
    value, gradient = step(rank, world)
    for t in (value, gradient): dist.all_reduce(t); t /= world
    dist.destroy_process_group()
    return dict(rank=rank, world=world, value=value.item(), gradient=gradient)


def here(tmp_path, n=2): return dict(hosts=['localhost']*n, start=lambda host: [], folder=tmp_path)


@slow
def test_two_machines_see_the_loss_of_one_process(tmp_path):
    import test_nodes
    value, gradient = step(0, 1)
    got = launch_nodes(test_nodes.job, processes=2, **here(tmp_path))
    assert got['rank'] == 0 and got['world'] == 4 and got['value'] == pytest.approx(value.item(), abs=1e-12)
    torch.testing.assert_close(got['gradient'], gradient, rtol=0, atol=1e-12)


@slow
@pytest.mark.parametrize('how, message', [
    ('raises', '(?s)rank 1 of 2 failed\nTraceback.*ValueError: rank 1 has no data'),
    ('killed', 'rank 1 was killed by SIGKILL; was there enough memory')])
def test_an_error_on_the_other_machine_is_an_error_here(tmp_path, how, message):
    import test_nodes
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match=message): launch_nodes(test_nodes.job, how, processes=1, **here(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is handler


def abort_after_failure(mark):
    "Rank 1 fails, and takes its time to end; rank 0 is aborted, as gloo does at times to a rank that has lost another."
    if os.environ['RANK'] == '1':
        threading.Thread(target=time.sleep, args=(30,)).start()
        mark.write_text('failing')
        raise ValueError('rank 1 has no data')
    while not mark.exists(): time.sleep(.05)
    time.sleep(.5)
    os.abort()


@pytest.mark.parametrize('machines', [1, 2])
def test_an_abort_does_not_hide_the_error_before_it(tmp_path, machines):
    import test_nodes
    said = ('(?s)^rank 0 was killed by SIGABRT; often because another rank failed\nrank 1 of 2 failed\n'
            'Traceback.*ValueError: rank 1 has no data$')
    with pytest.raises(RuntimeError, match=said) as e:
        launch_nodes(test_nodes.abort_after_failure, tmp_path/'mark', processes=2//machines, **here(tmp_path, machines))
    assert str(e.value).count('Traceback') == 1


@slow
def test_a_machine_that_never_comes(tmp_path):
    import test_nodes
    with pytest.raises(RuntimeError, match='machine 1 ended with exit code 5: no such machine'):
        launch_nodes(test_nodes.job, hosts=['localhost']*2, folder=tmp_path,
                     start=lambda host: ['sh', '-c', 'echo no such machine; exit 5'])


def sleeper(path):
    "A rank that notes the stop signal, as `fit` does, and says so."
    from softnce.training.checkpoints import StopRequested
    came = []
    signal.signal(signal.SIGTERM, lambda *a: came.append(1))
    with open(f"{path}-{os.environ['RANK']}", 'w') as f: f.write('ready')
    while not came: time.sleep(.05)
    with open(f"{path}-{os.environ['RANK']}", 'w') as f: f.write('checkpoint')
    raise StopRequested('step 5', ['SIGTERM'])


@pytest.mark.parametrize('machines', [1, 2])
def test_no_rank_outlives_a_killed_notebook(tmp_path, machines):
    "Else it would go on writing to a run that the next start takes over."
    code = f"""import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_nodes
from pathlib import Path
here = test_nodes.here(Path({str(tmp_path)!r}), {machines})
test_nodes.launch_nodes(test_nodes.sleeper, {str(tmp_path/'r')!r}, processes={2//machines}, **here)"""
    notebook = subprocess.Popen([sys.executable, '-c', code])
    while not all((tmp_path/f'r-{i}').exists() for i in (0, 1)): time.sleep(.1); assert notebook.poll() is None
    family = psutil.Process(notebook.pid).children(recursive=True)
    assert len(family) >= machines + 2
    notebook.kill(); notebook.wait()
    assert not psutil.wait_procs(family, timeout=60)[1]


def stops_late(signals):
    "Rank 0 is still at its checkpoint when rank 1 is ready; neither was told by the agent."
    from softnce.training.checkpoints import StopRequested
    if os.environ['RANK'] == '0': time.sleep(2)
    raise StopRequested('step 7', signals)


@pytest.mark.parametrize('machines, sent', [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_stop_signal_reaches_every_rank(tmp_path, machines, sent, capfd):
    import test_nodes
    from softnce.training.checkpoints import StopRequested
    ready = [tmp_path/f'r-{i}' for i in (0, 1)]
    def stop():
        while not all(p.exists() and p.read_text() for p in ready): time.sleep(.05)
        os.kill(os.getpid(), sent)
    threading.Thread(target=stop, daemon=True).start()
    before = psutil.Process().children()
    with pytest.raises(StopRequested):
        launch_nodes(test_nodes.sleeper, str(tmp_path/'r'), processes=2//machines, **here(tmp_path, machines))
    assert [p.read_text() for p in ready] == ['checkpoint']*2
    assert psutil.Process().children() == before, 'nothing that a closing kernel would wait for'
    logs = capfd.readouterr().out + ''.join(p.read_text() for p in tmp_path.glob('nodes-*/agent*.log'))
    assert 'Closing process' in logs, 'the agents told them'
    assert 'Unable to shutdown' not in logs, 'ranks end by themselves, they are not killed'


@slow
@pytest.mark.parametrize('machines', [1, 2])
@pytest.mark.parametrize('signals', [['SIGUSR1'], ['SIGTERM']])
def test_ranks_that_stop_by_themselves(tmp_path, machines, signals):
    import test_nodes
    from softnce.training.checkpoints import StopRequested
    with pytest.raises(StopRequested, match='^step 7$'):
        launch_nodes(test_nodes.stops_late, signals, processes=2//machines, **here(tmp_path, machines))


def test_one_machine_needs_no_folder(monkeypatch):
    monkeypatch.delenv('SLURM_JOB_NODELIST', raising=False)
    assert len(slurm_hosts()) == 1 and launch_nodes(max, 3, 5) == 5
    with pytest.raises(ValueError, match='nodes must be at most 1, the machines of this job, got 3'): slurm_hosts(3)
    with pytest.raises(ValueError, match='folder must be one that all 2 machines see'):
        launch_nodes(max, 3, 5, hosts=['a', 'b'])


def test_one_lambda_for_a_global_batch():
    "Every rank mixes with the same factor, for MixUp as for CutMix, and in all a step sees each row once."
    from softnce.vision.batches import Batches, Mixing
    from softnce.vision.images import load
    data = load('digits')
    def batches(rank, world, mixing):
        mixing = Mixing(10, smoothing=.1, **mixing)
        return [(x, t) for x, t in Batches(data.train, 64, True, mixing=mixing, seed=3, rank=rank, world=world)]
    def factors_of(batches): return [{round(v, 6) for v in t.weights.max(1).values.tolist()} for x, t in batches]
    for mixing in (dict(mixup=.8, cutmix=0.), dict(mixup=0., cutmix=1.)):
        one, two = batches(0, 1, mixing), [batches(0, 2, mixing), batches(1, 2, mixing)]
        assert len(one) == len(two[0]) == len(two[1]) > 10
        factors = [{v for v in a | b if v < .999999} for a, b in zip(*map(factors_of, two))]
        assert all(len(f) <= 1 for f in factors), 'one factor a step'
        assert len(set().union(*factors)) > 4, 'another in the next'
        assert all(len(a[0])+len(b[0]) == len(c[0]) for a, b, c in zip(*two, one))
