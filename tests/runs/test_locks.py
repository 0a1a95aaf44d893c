"softnce.runs.locks: one writer, owners that died or are elsewhere, file systems without flock, a lock that is lost."
import errno, fcntl, json, multiprocessing, os, subprocess, sys, threading, time

import pytest

import softnce.runs.locks as locks
from softnce.runs.locks import RunLocked, lock


def failing(number):
    "A call to the system that ends in this error."
    def call(*args): raise OSError(number, os.strerror(number))
    return call


def elsewhere(folder, age=0., **changes):
    "A lock that a process of another machine holds, its last heartbeat `age` seconds ago."
    (folder/'.owner').write_text(json.dumps({**locks._this_process(), 'host': 'node7', 'pid': 4711, **changes}))
    os.utime(folder/'.owner', (time.time()-age,)*2)


def test_lock(tmp_path):
    with lock(tmp_path) as held:
        assert held.mine() and not held.lost
        message = f'already being written by process {os.getpid()} on .*; wait for it to end'
        with pytest.raises(RunLocked, match=message):
            with lock(tmp_path): pass
        assert held.mine()
    assert [p.name for p in tmp_path.iterdir()] == ['.lock']
    with lock(tmp_path): pass


@pytest.mark.parametrize('flock', [True, False])
def test_another_process_and_its_death(tmp_path, monkeypatch, flock):
    if not flock: monkeypatch.setattr(fcntl, 'flock', failing(errno.ENOLCK))
    code = (f"import sys, time\nfrom softnce.runs import lock\n"
            f"with lock({str(tmp_path)!r}): print('held', flush=True); time.sleep(300)")
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(RunLocked, match=f'process {other.pid} on '):
            with lock(tmp_path): pass
        other.kill()
    assert (tmp_path/'.owner').exists()
    with lock(tmp_path) as held: assert held.mine()


@pytest.mark.parametrize('changes', [{}, {'ns': 'pid:[1]'}, {'boot': 'another'}])
def test_an_owner_elsewhere_lives_as_long_as_its_heart_beats(tmp_path, changes):
    elsewhere(tmp_path, 50, **changes)
    with pytest.raises(RunLocked, match='process 4711 on node7; wait for it to end, or stop it'):
        with lock(tmp_path): pass
    elsewhere(tmp_path, 61, job='12', **changes)
    with lock(tmp_path) as held: assert held.mine()


def test_the_slurm_job_is_named(tmp_path):
    elsewhere(tmp_path, job='12')
    with pytest.raises(RunLocked, match='process 4711 on node7, Slurm job 12;'):
        with lock(tmp_path): pass


def test_a_process_id_used_again(tmp_path):
    "The owner's id is that of a living process, which started at another time."
    (tmp_path/'.owner').write_text(json.dumps({**locks._this_process(), 'token': 'x', 'start': '1'}))
    with lock(tmp_path) as held: assert held.mine()


def test_an_owner_that_never_wrote_its_name(tmp_path):
    (tmp_path/'.owner').touch()
    with pytest.raises(RunLocked, match='process \\? on an unknown machine'):
        with lock(tmp_path): pass
    os.utime(tmp_path/'.owner', (time.time()-61,)*2)
    with lock(tmp_path) as held: assert held.mine()


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    real = os.open
    def full(path, *a, **kw):
        fd = real(path, *a, **kw)
        if str(path).endswith('.owner'): os.close(fd); return real('/dev/full', os.O_WRONLY)
        return fd
    monkeypatch.setattr(os, 'open', full)
    with pytest.raises(OSError, match='No space left'):
        with lock(tmp_path): pass
    assert [p.name for p in tmp_path.iterdir()] == ['.lock']


def test_wait(tmp_path, capsys):
    elsewhere(tmp_path)
    threading.Timer(1.5, (tmp_path/'.owner').unlink).start()
    with lock(tmp_path, wait=True) as held: assert held.mine()
    assert capsys.readouterr().out.count('already being written by process 4711 on node7\n') == 1


def test_a_lost_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, 'HEARTBEAT', .05)
    told = threading.Event()
    with lock(tmp_path) as held:
        held.on_lost = told.set
        beats, end = set(), time.monotonic()+60
        while len(beats) < 4 and time.monotonic() < end:
            beats.add((tmp_path/'.owner').stat().st_mtime_ns)
            time.sleep(.01)
        assert len(beats) == 4 and not told.is_set()
        elsewhere(tmp_path)
        assert told.wait(60) and held.lost
    assert json.loads((tmp_path/'.owner').read_text())['host'] == 'node7'  # another's lock is left alone


def test_a_file_system_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, 'HEARTBEAT', .05), monkeypatch.setattr(locks, 'GONE_AFTER', .5)
    told = threading.Event()
    with lock(tmp_path) as held:
        held.on_lost = told.set
        monkeypatch.setattr(os, 'utime', failing(errno.EIO))
        assert told.wait(60) and held.lost


def count(folder, shared, barrier):
    "Without flock, as on some shared file systems: take the lock, be alone for a moment."
    fcntl.flock = failing(errno.ENOTSUP)
    barrier.wait()
    with lock(folder, wait=True):
        shared[0] += 1
        shared[1] = max(shared[1], shared[0])
        time.sleep(.3)
        shared[0] -= 1
        shared[2] += 1


@pytest.mark.slow
def test_one_at_a_time_after_a_dead_owner(tmp_path):
    "Six processes that start together find a dead owner: never two of them inside, and each gets its turn."
    context = multiprocessing.get_context('spawn')
    elsewhere(tmp_path, 100)
    shared, barrier = context.Array('i', 3), context.Barrier(6)
    processes = [context.Process(target=count, args=(tmp_path, shared, barrier)) for _ in range(6)]
    for p in processes: p.start()
    for p in processes: p.join()
    assert list(shared) == [0, 1, 6]
