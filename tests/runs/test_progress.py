"softnce.runs.progress: the state of every run, watched, and runs that failed removed."
import os, time

import pytest
from small_experiments import COMMAND, START, cli, notebook

import softnce.runs.progress as progress
from softnce.runs.execute import RunFailed
from softnce.runs.experiment import run_id
from softnce.runs.locks import lock
from softnce.runs.progress import clean, show_status, status
from softnce.runs.sweeps import grid, run_all
from softnce.runs.values import UsageError


def square(tmp_path):
    "An experiment that fails below zero."
    params = f"x = 1.  # a number\nlog = {str(tmp_path/'log')!r}  # where to note a call"
    return notebook(tmp_path/'square.ipynb', START, "if x < 0: raise ValueError(f'x is {x}')\n"
                    "run.save_metrics({'square': x*x})", params=params)


def test_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = square(tmp_path)
    (tmp_path/'plan.yaml').write_text("targets:\n  a: {notebook: square.ipynb, parameters: {x: 3, log: ''}}\n"
                                      "  b: {notebook: square.ipynb, parameters: {x: 2}}\n")
    with pytest.raises(RunFailed): run_all(path, grid(x=[2, -1]), 'runs')
    stopped, killed, running = [tmp_path/'runs'/'square'/(i*8) for i in '123']
    logs = {stopped: '[2026-01-01 00:00:00] run square 1: 3 cells, in x\n'
                     '[2026-01-01 00:00:10] run square 1: stopped and unfinished\n'
                     '[2026-01-01 00:10:00] run square 1: 3 cells, resuming in x\n'
                     '[2026-01-01 01:10:05] run square 1: stopped and unfinished\n',
            killed: '[2026-01-01 00:00:00] run square 2: 3 cells, in x\n',
            running: time.strftime('[%F %T] run square 3: 3 cells, in x\n')}
    for folder, text in logs.items():
        folder.mkdir()
        (folder/'log.txt').write_text(text)
        (folder/'params.yaml').write_text('x: 1\n')
    (stopped/'history.csv').write_text('seed,epoch,loss\n0,1,.5\n0,2,.123456\n')
    (running/'.progress').write_text('epoch 1/3, step 2/9, 80 images/s')
    (killed/'.progress').write_text('of before')
    with lock(running): df, failures = status('runs', 'plan.yaml')
    by = df.set_index('id')
    id = lambda x, log=str(tmp_path/'log'): run_id('square', {'x': x, 'log': log})
    want = {id(2.): 'done', id(-1.): 'failed', '1'*8: 'stopped', '2'*8: 'killed', '3'*8: 'running',
            id(3., ''): 'missing'}
    assert by['parameters'][id(-1.)] == f"x=-1.0 log={tmp_path/'log'}" and by['parameters']['1'*8] == 'x=1'
    assert by['parameters'][id(3., '')] == ''  # it is not there yet
    assert by['state'].to_dict() == want
    assert by['seconds']['1'*8] == 10+3605 and by['last']['1'*8] == 'seed=0 epoch=2 loss=0.1235'
    assert f'epoch 1/3, step 2/9, 80 images/s, process {os.getpid()} on' in by['note']['3'*8]
    assert by['note']['2'*8] == ''
    failed, = failures
    assert want[failed] == 'failed' and by['note'][failed] == 'square.ipynb, cell 3 of 3: ValueError: x is -1.0'
    assert failures[failed].endswith('ValueError: x is -1.0')
    show_status('runs', 'plan.yaml', False)
    out = capsys.readouterr().out
    assert '6 runs: ' in out and '1 missing' in out and '1:00:15' in out
    assert 'softnce status --errors shows the tracebacks' in out
    show_status('runs', None, True)
    assert capsys.readouterr().out.endswith('ValueError: x is -1.0\n')
    with pytest.raises(UsageError, match="there is no run in 'nowhere'"): status('nowhere')


def a_run(folder, log='', **files):
    folder.mkdir(parents=True)
    (folder/'params.yaml').write_text('x: 1\n')
    (folder/'log.txt').write_text(f'[2026-01-01 00:00:00] run n {folder.name}: 3 cells, in x\n{log}')
    for name, text in files.items(): (folder/name.replace('_', '.')).write_text(text)
    return folder


FAILED = '[2026-01-01 00:00:10] run n x: failed, no metrics.json; the same command resumes it\nn.ipynb: KeyError\n'


def test_a_damaged_run_does_not_hide_the_others(tmp_path, capsys):
    a_run(tmp_path/'n'/'a', metrics_json='[{')
    a_run(tmp_path/'n'/'b', metrics_json='[{"y": 2}]')
    a_run(tmp_path/'n'/'c', metrics_json='[{"y": 2}]')
    (tmp_path/'n'/'c'/'params.yaml').write_text('x: [')
    df, texts = status(tmp_path)
    assert df['state'].tolist() == ['damaged', 'done', 'damaged'] and 'n/a/metrics.json is damaged' in texts['a']
    assert 'n/c/params.yaml is damaged' in texts['c']
    show_status(tmp_path, None, False)
    assert '3 runs: 2 damaged, 1 done' in capsys.readouterr().out


def test_damaged_metrics_of_a_run_with_a_history_are_seen(tmp_path):
    folder = a_run(tmp_path/'n'/'a', metrics_json='[{')
    (folder/'history.csv').write_text('epoch,nll\n1,0.5\n')
    df, texts = status(tmp_path)
    assert df['state'].tolist() == ['damaged'] and 'n/a/metrics.json is damaged' in texts['a']


def test_watching_ends_with_the_runs(tmp_path, monkeypatch, capsys):
    folder, looks = a_run(tmp_path/'n'/'a'), []
    monkeypatch.setattr(progress.sys.stdout, 'isatty', lambda: True, raising=False)
    with lock(folder):
        def finish(seconds):
            looks.append(seconds)
            if len(looks) == 2: (folder/'metrics.json').write_text('{"y": 2}')
        monkeypatch.setattr(progress.time, 'sleep', finish)
        progress.watch_status(tmp_path, None, 7.)
    out = capsys.readouterr().out
    assert looks == [7., 7.] and out.count('running') == 2*2 and out.count('\x1b[2J') == 3 and out.endswith('1 done\n')


def test_clean(tmp_path):
    failed, again = a_run(tmp_path/'runs'/'n'/'a', FAILED), a_run(tmp_path/'runs'/'n'/'b', FAILED)
    begun = f'{FAILED}[2026-01-01 00:01:00] run n c: 3 cells, resuming in x\n'
    others = [a_run(tmp_path/'runs'/'n'/'c', begun), a_run(tmp_path/'runs'/'n'/'d', FAILED, metrics_json='{"y": 2}'),
              a_run(tmp_path/'runs'/'n'/'e', '[2026-01-01 00:00:10] run n e: stopped and unfinished\n')]
    assert clean(tmp_path/'runs', dry_run=True) == [failed, again] and failed.exists()
    with lock(again): assert clean(tmp_path/'runs') == [failed]  # another process has just begun it anew
    assert not failed.exists() and again.exists() and all(o.exists() for o in others)
    done = cli('clean', 'runs', cwd=tmp_path)
    assert done.returncode == 2 and '--failed' in done.stderr and again.exists()
    done = cli('clean', 'runs', '--failed', '--dry-run', cwd=tmp_path)
    assert done.stdout.startswith('would remove runs/n/b\n1 failed run; ') and again.exists()
    done = cli('clean', 'runs', '--failed', cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith('removed runs/n/b\n1 failed run; ') and not again.exists()
    assert sorted(p.name for p in (tmp_path/'runs'/'n').iterdir()) == ['c', 'd', 'e']
    with pytest.raises(UsageError, match='there is no run'): clean(tmp_path/'nowhere')


# ---- a line of where a run is, while it runs

WORK = START+"""
import time
for epoch in range(3):
    run.progress_file.write_text(f'epoch {epoch}/3, 80 images/s')
    time.sleep(1.6)
    print('row', epoch, flush=True)
run.save_metrics({'a': 1})"""


def on_a_terminal(command, cwd, **env):
    "What a command writes to a terminal."
    import pty, subprocess
    ours, theirs = pty.openpty()
    streams = dict(stdout=theirs, stderr=theirs, stdin=theirs)
    with subprocess.Popen(command, cwd=cwd, env=os.environ | env, **streams) as process:
        os.close(theirs)
        said = b''
        try:
            while piece := os.read(ours, 10_000): said += piece
        except OSError: pass  # the other end is closed
    assert process.returncode == 0, said
    return said.decode()


@pytest.mark.slow
def test_a_terminal_shows_where_a_run_is_and_a_log_does_not(tmp_path):
    notebook(tmp_path/'n.ipynb', WORK, params='x = 1')
    said = on_a_terminal([*COMMAND, 'run', 'n.ipynb'], tmp_path, COLUMNS='60')
    assert '\repoch 0/3, 80 images/s\x1b[K' in said and '\r\x1b[Krow 0' in said
    folder, = (tmp_path/'runs'/'n').iterdir()
    assert 'images/s' not in (folder/'log.txt').read_text() and not (folder/'.progress').exists()


@pytest.mark.slow
def test_a_sweep_shows_the_run_that_it_makes(tmp_path):
    "The inner run says it to the outer one, whose command shows it."
    notebook(tmp_path/'n.ipynb', WORK, params='x = 1')
    outer = ("from softnce.runs import run_all\n"
             f"run_all({str(tmp_path/'n.ipynb')!r}, [dict(x=2), dict(x=3)])\nrun.save_metrics({{'a': 1}})")
    notebook(tmp_path/'outer.ipynb', START, outer, params='x = 1')
    said = on_a_terminal([*COMMAND, 'run', 'outer.ipynb'], tmp_path)
    assert '1/2 n ' in said and ': epoch 1/3, 80 images/s' in said and '2/2 n ' in said


def test_without_a_terminal_there_is_a_line_a_minute(tmp_path, capsys, monkeypatch):
    import io
    import softnce.runs.execute as execute
    log = io.StringIO()
    tee = execute._Tee(log)
    tee.progress('epoch 1')
    assert capsys.readouterr().out == ''  # not yet a minute
    monkeypatch.setattr(execute, 'LINE_EVERY', 0.)
    tee.progress('epoch 2')
    tee.write('half a line')
    tee.progress('epoch 3')  # would go into the middle of it
    tee.line('stage')
    assert capsys.readouterr().out == 'epoch 2\nhalf a line\nstage\n' and 'epoch' not in log.getvalue()
