"softnce.runs.execute: a run and its skip, failures, stop signals, kills, full disks, and two writers."
import json, os, re, signal, socket, subprocess, sys
from io import StringIO
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from small_experiments import SCRIPT, START, cli, notebook, start, wait_for

from softnce.runs.cli import exit_codes
from softnce.runs.execute import RunFailed, RunStopped, run_experiment
from softnce.runs.experiment import run_id
from softnce.runs.locks import RunLocked, lock
from softnce.runs.report import collect
from softnce.runs.run import Run

WORK = ["import os, sys\nimport pandas as pd\nfrom matplotlib.figure import Figure\n"+START, '#md ## Training',
        "print('python', sys.executable, flush=True)\nprint('in', os.getcwd())\nprint('\\x1b[31mred\\x1b[0m')\n"
        "print('1%\\r2%\\r3%')\nprint('half', end='')",
        '#md ## Results',
        "run.log_row(seed=0, epoch=0, split='valid', loss=lr)\n"
        "run.save_table(pd.DataFrame({'loss': [loss], 'value': [alignment*lr]}), 'table1')\n"
        "run.save_figure(Figure(), 'figure1')\n"
        "run.save_metrics([{'seed': s, 'split': 'valid', 'value': s+lr} for s in seeds])"]


def test_a_run_and_its_skip(tmp_path, monkeypatch, capsys):
    "Everything a finished run leaves: with a kernelspec and a path that lead elsewhere, in a folder with braces."
    cwd = tmp_path/'some {0} folder'
    spec = tmp_path/'jupyter'/'kernels'/'python3'
    for d in (cwd, spec): d.mkdir(parents=True)
    kernel = {'argv': ['/bin/false', '{connection_file}'], 'display_name': 'x', 'language': 'python'}
    (spec/'kernel.json').write_text(json.dumps(kernel))
    notebook(cwd/'n.ipynb', *WORK)
    args = ('run', 'n.ipynb', '-p', 'lr=1e-1', '-p', 'seeds=[3, 4]')
    done = cli(*args, cwd=cwd, JUPYTER_PATH=str(tmp_path/'jupyter'), PATH='/usr/bin:/bin')
    assert done.returncode == 0, done.stdout+done.stderr
    resolved = {'alignment': 40, 'lr': .1, 'loss': 'nll', 'seeds': [3, 4], 'rates': [.1, 1], 'debug': False,
                'path': None}
    folder = cwd/'runs'/'n'/run_id('n', resolved)
    label = f'run n {folder.name}'
    order = [f'{label}: 4 cells, in runs/n/{folder.name}\n', '[cell 3/4] Training\n',
             f'python {Path(sys.executable).parent}', f'in {cwd}\n', 'half\n[cell 4/4] Results\n',
             f'{label}: finished\n', 'table1\nloss  value\n nll      4\n', f'figure runs/n/{folder.name}/figure1.png\n',
             f'run    runs/n/{folder.name}\n']
    at = [done.stdout.find(o) for o in order]
    assert -1 not in at and at == sorted(at), (at, done.stdout)
    assert '\x1b' not in done.stdout and not done.stderr
    log = (folder/'log.txt').read_text()
    assert '\nred\n3%\nhalf\n' in log and '\x1b' not in log
    assert re.search(r'\[\d{4}-\d\d-\d\d [\d:]{8}\] '+label+': finished', log)
    assert yaml.safe_load((folder/'params.yaml').read_text()) == resolved
    want = [{'seed': s, 'split': 'valid', 'value': s+.1} for s in (3, 4)]
    assert json.loads((folder/'metrics.json').read_text()) == want
    env = json.loads((folder/'env.json').read_text())
    assert env['versions']['numpy'] == np.__version__ and env['versions']['softnce']
    assert {'commit', 'device', 'python', 'code'} <= set(env)
    cells = nbformat.read(folder/'notebook.ipynb', 4).cells
    assert all(c.execution_count for c in cells if c.cell_type == 'code')
    assert {p.name for p in folder.iterdir()} == {
        'params.yaml', 'env.json', 'log.txt', 'notebook.ipynb', 'metrics.json', 'history.csv', 'report.json',
        'table1.csv', 'figure1.png', '.lock'}
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    again = cli(*args, cwd=cwd)  # skipped: nothing is written, the report is printed again
    assert again.returncode == 0 and f'{label}: already finished, skipped' in again.stdout
    assert 'Training' not in again.stdout
    assert again.stdout.endswith(done.stdout[at[6]:]) and 'has changed' not in again.stdout
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    notebook(cwd/'n.ipynb', *WORK, '1+1')
    monkeypatch.chdir(cwd)
    run_experiment('n.ipynb', {'lr': .1, 'seeds': [3, 4]})  # from Python it is the same run
    assert f'note: n.ipynb has changed since this run; remove runs/n/{folder.name}' in capsys.readouterr().out
    table = cli('collect', 'runs', cwd=cwd)
    assert table.returncode == 0 and 'value' in table.stderr
    assert pd.read_csv(StringIO(table.stdout))['value'].tolist() == [3.1, 4.1]
    assert cli('collect', folder, '--csv', 'all.csv', cwd=cwd).stdout.count('value') == 1
    assert pd.read_csv(cwd/'all.csv')['seed'].tolist() == [3, 4]


def test_a_failing_notebook(tmp_path):
    cells = [START+"\nrun.save_metrics({'a': 1})", "x = 'before'\nprint(x)\nraise KeyError('boom')", "print('after')"]
    notebook(tmp_path/'n.ipynb', *cells)
    done = cli('run', 'n.ipynb', '--out', 'elsewhere', cwd=tmp_path)
    folder, = (tmp_path/'elsewhere'/'n').iterdir()
    assert done.returncode == 1 and not (folder/'metrics.json').exists()
    last = f'run n {folder.name}: failed, no metrics.json; the same command resumes it\n'
    assert done.stdout.endswith('before\n'+last)
    message = ("n.ipynb, cell 3 of 4: KeyError: 'boom'\n\n"
               "    x = 'before'\n    print(x)\n    raise KeyError('boom')\n\n")
    assert done.stderr.startswith(f'softnce: {message}') and 'Traceback' in done.stderr
    assert done.stderr.endswith("KeyError: 'boom'\n")
    log = (folder/'log.txt').read_text()
    assert 'before\n' in log and message in log and log.endswith("KeyError: 'boom'\n") and '\x1b' not in done.stderr+log
    partial = [c.execution_count for c in nbformat.read(folder/'notebook.ipynb', 4).cells if c.cell_type == 'code']
    assert partial == [1, 2, 3, None]


@pytest.mark.parametrize('cell, message', [
    ("import sys\nsys.exit(0)", 'the notebook left early'), ("import os\nos.kill(os.getpid(), 9)", 'the kernel died')])
def test_a_notebook_that_ends_without_an_error(tmp_path, capsys, cell, message):
    notebook(tmp_path/'n.ipynb', cell, "print('after')")
    with pytest.raises(RunFailed, match=f'n.ipynb, cell 2 of 3: {message}\n\n    import'):
        run_experiment(tmp_path/'n.ipynb', {}, tmp_path/'runs')
    assert 'after' not in capsys.readouterr().out and not list(tmp_path.glob('runs/n/*/metrics.json'))


STEPS = ["import os, time\n"+START+"\n(run.checkpoint_dir/'kernel').write_text(str(os.getpid()))",
         "done = run.checkpoint_dir/'done'\nstart = int(done.read_text()) if done.exists() else 0\n"
         "print('start', start, flush=True)\nfor step in range(start, steps):\n"
         "    run.log_row(seed=0, epoch=step, split='train')\n    done.write_text(str(step+1))\n"
         "    try:\n        while step == 4 and not os.path.exists(gate): time.sleep(.02)\n"
         "    except KeyboardInterrupt: done.with_name('interrupted').touch(); raise",
         "run.save_metrics({'seed': 0, 'epoch': steps, 'split': 'train', 'start': start})"]


def test_kill_lock_interrupt_and_resume(tmp_path):
    "A second writer, SIGTERM, SIGKILL to runner and kernel; then the run is finished, with one history."
    notebook(tmp_path/'n.ipynb', *STEPS, params="steps = 10  # a\ngate = ''  # b")
    gate = tmp_path/'open'
    args = ['run', 'n.ipynb', '-p', f'gate={gate}']
    folder = tmp_path/'runs'/'n'/run_id('n', {'steps': 10, 'gate': str(gate)})
    epochs = lambda: Run(folder).history()['epoch'].tolist() if (folder/'history.csv').exists() else []
    at_gate = lambda: epochs() == [0, 1, 2, 3, 4] and (folder/'checkpoint'/'done').read_text() == '5'

    first = start(*args, cwd=tmp_path)  # waits at step 4
    wait_for(at_gate)
    second = cli(*args, cwd=tmp_path)
    assert second.returncode == 3 and f'already being written by process {first.pid}' in second.stderr
    assert 'Traceback' not in second.stderr
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate()
    assert first.returncode == 75 and err == 'softnce: stopped\n'
    assert 'stopped and unfinished; the same command resumes it' in out and not (folder/'metrics.json').exists()
    assert (folder/'checkpoint'/'interrupted').exists()  # the cell was told, and could save
    with lock(folder): pass  # the kernel is gone too

    (folder/'checkpoint'/'done').write_text('4')  # back to before the gate, as if the last checkpoint had been missed
    (folder/'history.csv').write_text('seed,epoch,split\n'+''.join(f'0,{e},train\n' for e in range(4)))
    third = start(*args, cwd=tmp_path)
    wait_for(at_gate)
    kernel = int((folder/'checkpoint'/'kernel').read_text())
    os.kill(kernel, signal.SIGSTOP)  # so that it does not notice the death of its runner
    third.kill()
    third.wait()
    with pytest.raises(RunLocked):  # the orphaned kernel may still write, so the lock holds
        with lock(folder): pass
    os.kill(kernel, signal.SIGKILL)
    third.communicate()
    with (folder/'history.csv').open('a') as f: f.write('0,5,tr')
    gate.touch()
    last = cli(*args, cwd=tmp_path)
    assert last.returncode == 0, last.stdout+last.stderr
    assert f'resuming in runs/n/{folder.name}' in last.stdout and 'start 5' in last.stdout
    assert epochs() == list(range(10))
    assert Run(folder).metrics() == [{'seed': 0, 'epoch': 10, 'split': 'train', 'start': 5}]
    assert [p.name for p in (tmp_path/'runs'/'n').iterdir()] == [folder.name]


STOP = ["import os, signal, time\n"+START+"\nrun.save_metrics({'a': 1})",
        "class StopRequested(Exception): pass\nfirst = not (run.checkpoint_dir/'seen').exists()\n"
        "(run.checkpoint_dir/'seen').write_text(str(os.getpid()))",
        "if first and how == 'fit': raise StopRequested('step 5')\n"
        "if first and how == 'kernel': os.kill(os.getpid(), signal.SIGTERM)\n"
        "if first and how == 'dies':\n    signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "    (run.checkpoint_dir/'ready').touch()\n    time.sleep(300)"]


def test_a_kernel_that_does_not_close(tmp_path):
    "After the last cell the result counts; a kernel that hangs on its way out is ended, without a traceback."
    hang = ("import time\nfrom ipykernel.kernelapp import IPKernelApp\n"
            "IPKernelApp.instance().iopub_thread.thread.join = lambda timeout: time.sleep(600)")
    notebook(tmp_path/'n.ipynb', hang, START+"\nrun.save_metrics({'value': 1})")
    done = cli('run', 'n.ipynb', cwd=tmp_path)
    assert done.returncode == 0 and ': finished' in done.stdout and not done.stderr, done.stdout+done.stderr


@pytest.mark.parametrize('how', ['fit', 'kernel'])
def test_a_stopped_cell_is_no_failure(tmp_path, capsys, how):
    notebook(tmp_path/'n.ipynb', *STOP, params="how = 'fit'  # how it stops")
    with pytest.raises(RunStopped): run_experiment(tmp_path/'n.ipynb', {'how': how}, tmp_path/'runs')
    folder, = (tmp_path/'runs'/'n').iterdir()
    assert not (folder/'metrics.json').exists()
    assert 'stopped and unfinished; the same command resumes it' in capsys.readouterr().out
    assert run_experiment(tmp_path/'n.ipynb', {'how': how}, tmp_path/'runs').metrics() == [{'a': 1}]


def test_a_kernel_that_dies_of_the_stop_signal(tmp_path):
    notebook(tmp_path/'n.ipynb', *STOP, params="how = 'fit'  # how it stops")
    args = ['run', 'n.ipynb', '-p', 'how=dies']
    ready = tmp_path/'runs'/'n'/run_id('n', {'how': 'dies'})/'checkpoint'/'ready'
    with subprocess.Popen([SCRIPT, *args], cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        wait_for(ready.exists)
        process.send_signal(signal.SIGUSR1)  # the kernel handles it: KeyboardInterrupt in its cell
        assert process.wait() == 75
    ready.unlink(), ready.with_name('seen').unlink()
    with subprocess.Popen([SCRIPT, *args], cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        wait_for(ready.exists)
        process.send_signal(signal.SIGTERM)  # the kernel does not: it dies
        assert process.wait() == 75
    done = cli(*args, cwd=tmp_path)
    assert done.returncode == 0 and (ready.parents[1]/'metrics.json').exists()


FULL = [START+"\nrun.log_row(seed=0)", "if not (run.dir/'room').exists(): open('/dev/full', 'w').write('x'*100000)",
        "run.save_metrics({'a': 1})"]


def test_a_full_disk_under_the_notebook(tmp_path):
    "/dev/full fails every write as a full disk does: the message says what to do, and with room again the run goes on."
    notebook(tmp_path/'n.ipynb', *FULL)
    message = (r'n.ipynb, cell 3 of 4: OSError: \[Errno 28\] No space left on device\n\n'
               'No space is left for .*: free some, or give another folder with --out')
    with pytest.raises(RunFailed, match=message): run_experiment(tmp_path/'n.ipynb', {}, tmp_path/'runs')
    folder, = (tmp_path/'runs'/'n').iterdir()
    assert not (folder/'metrics.json').exists()
    (folder/'room').touch()
    assert run_experiment(tmp_path/'n.ipynb', {}, tmp_path/'runs').metrics() == [{'a': 1}]


@pytest.mark.parametrize('save', ['torch.save(x, open("/dev/full", "wb"))', 'torch.save(x, "/dev/full")',
                                  'save_checkpoint(x, run.checkpoint_dir/"last.pt")'])
def test_a_full_disk_under_torch(tmp_path, save):
    "torch says `unexpected pos`; the message is the same as for any other file."
    begin = (START+"\nimport torch\nfrom softnce.training import save_checkpoint\n"
             "x = dict(w=torch.zeros(100_000))\n(run.checkpoint_dir/'last.pt.part').symlink_to('/dev/full')")
    notebook(tmp_path/'n.ipynb', begin, save)
    with pytest.raises(RunFailed, match='No space is left for .*: free some, or give another folder with --out'):
        run_experiment(tmp_path/'n.ipynb', {}, tmp_path/'runs')


@pytest.mark.parametrize('name', ['params.yaml', 'env.json', 'metrics.json', 'notebook.ipynb'])
def test_a_full_disk_under_the_runner(tmp_path, monkeypatch, capsys, name):
    "Whichever file the disk is full at: exit code 1, one message, nothing half-written, and then the run is finished."
    notebook(tmp_path/'n.ipynb', START, "run.save_metrics({'a': 1})")
    real, failed = os.replace, []
    def full(src, dst):
        if Path(dst).name != name or failed: return real(src, dst)
        failed.append(dst)
        raise OSError(28, 'No space left on device', str(dst))
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(SystemExit) as e, exit_codes(): run_experiment(tmp_path/'n.ipynb', {}, tmp_path/'runs')
    assert e.value.code == 1 and failed and not list(tmp_path.glob('runs/*/*/metrics.json'))
    message = f'softnce: No space is left for .*{name}: free some, .* The same command then resumes the run.\n'
    assert re.fullmatch(message, capsys.readouterr().err)
    assert run_experiment(tmp_path/'n.ipynb', {}, tmp_path/'runs').metrics() == [{'a': 1}]


def test_restart_after_a_change_of_code(tmp_path, capsys):
    "Text and outputs do not count; code does, and only when asked the run is set aside, finished or not."
    cells = [START, "(run.checkpoint_dir/'seen').touch()\nrun.save_metrics({'a': 1})"]
    path = notebook(tmp_path/'n.ipynb', *cells)
    run = lambda **kw: run_experiment(path, {}, tmp_path/'runs', **kw)
    first = run()
    notebook(path, '#md A new text', *cells)
    assert run(restart=True).metrics() == [{'a': 1}] and not (tmp_path/'runs'/'n'/'.changed').exists()
    new = "assert not (run.checkpoint_dir/'seen').exists(), 'an old checkpoint'\nrun.save_metrics({'a': 2})"
    notebook(path, cells[0], new)
    assert run().metrics() == [{'a': 1}] and 'n.ipynb has changed since this run' in capsys.readouterr().out
    (first.dir/'metrics.json').unlink()  # unfinished, and of other code
    with pytest.raises(RunFailed, match='an old checkpoint'): run()
    assert 'n.ipynb has changed since this run' not in capsys.readouterr().out.splitlines()[-1]
    (first.dir/'env.json').write_text(json.dumps({'code': 'old'}))
    assert run(restart=True).metrics() == [{'a': 2}]
    aside, = (tmp_path/'runs'/'n'/'.changed').iterdir()
    assert (aside/'checkpoint'/'seen').exists() and aside.name.startswith(first.dir.name)
    assert len(collect(tmp_path/'runs')) == len(collect(tmp_path/'runs'/'n')) == 1


def test_waiting_for_another_writer(tmp_path):
    "A second process waits, and finds the run finished: it ran once."
    cells = ["import os, time\n"+START+"\nrun.log_row(seed=0)\n(run.checkpoint_dir/'ready').touch()",
             "while not gate or not os.path.exists(gate): time.sleep(.05)\nrun.save_metrics({'a': 1})"]
    notebook(tmp_path/'n.ipynb', *cells, params="gate = ''  # a file")
    gate = tmp_path/'open'
    args, folder = ['run', 'n.ipynb', '-p', f'gate={gate}'], tmp_path/'runs'/'n'/run_id('n', {'gate': str(gate)})
    first = start(*args, cwd=tmp_path)
    wait_for((folder/'checkpoint'/'ready').exists)
    second = start(*args, '--wait', cwd=tmp_path)
    who = f'process {first.pid} on {socket.gethostname()}'
    assert second.stdout.readline() == f'waiting: runs/n/{folder.name} is already being written by {who}\n'
    gate.touch()
    first.communicate()
    assert first.returncode == 0 and second.communicate()[0].count('[cell') == 0 and second.returncode == 0
    assert len(Run(folder).history()) == 1 and (folder/'log.txt').read_text().count(': finished') == 1


@pytest.mark.parametrize('taken', [1, 99])
def test_a_kernel_whose_port_is_taken_is_started_again(tmp_path, monkeypatch, capsys, taken):
    "The port was free when it was chosen: another process has it when the kernel binds it."
    from jupyter_client import LocalPortCache
    path, find, found = notebook(tmp_path/'n.ipynb', *WORK), LocalPortCache.find_available_port, []
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        def find_port(self, ip): # five for a kernel
            found.append(find(self, ip) if len(found) >= 5*taken else other.getsockname()[1])
            return found[-1]
        monkeypatch.setattr(LocalPortCache, 'find_available_port', find_port)
        if taken == 1: assert run_experiment(path, out_dir=tmp_path/'runs').finished
        else:
            with pytest.raises(RunFailed, match=r'^n.ipynb: the kernel did not start: '):
                run_experiment(path, out_dir=tmp_path/'runs')
    starts = 2 if taken == 1 else 3
    assert len(found) == 5*starts and capsys.readouterr().out.count('starting it again') == starts-1
