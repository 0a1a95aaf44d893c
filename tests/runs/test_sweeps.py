"softnce.runs.sweeps: grids, the runs behind a figure, and many runs with failures, sharing and stop signals."
import os, re, subprocess, sys, time
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import softnce.runs.sweeps as sweeps
from softnce.runs.runs import RunFailed, UsageError, resolve, run_experiment, run_id
from softnce.runs.locks import lock
from softnce.runs.sweeps import Plan, grid, needs, run_all, run_dir, runs_root, status


def experiment(path, params, *cells, runs=None):
    "A small experiment; `runs` becomes its cell tagged so."
    made = [new_markdown_cell('# Test\n\n> A subtitle'), new_code_cell(params, metadata={'tags': ['parameters']})]
    made += [new_code_cell(c) for c in cells]
    if runs: made.insert(3, new_code_cell(runs, metadata={'tags': ['runs']}))  # after the imports
    nbformat.write(new_notebook(cells=made), path)
    return path


START = "from softnce.runs.runs import this_run\nrun = this_run()"
SQUARE = ["with open(log, 'a') as f: f.write(f'{x}\\n')\nif x < 0: raise ValueError(f'x is {x}')\nrun.save_metrics({'square': x*x})"]


def square(tmp_path):
    return experiment(tmp_path/'square.ipynb', f"x = 1.  # a number\nlog = {str(tmp_path/'log')!r}  # where to note a call", START, *SQUARE)


def test_grid():
    assert grid(a=[1, 2], b='xy', c=(3, 4)) == [dict(a=a, b='xy', c=c) for a in (1, 2) for c in (3, 4)]
    assert grid() == [{}] and grid(a=range(2)) == [{'a': 0}, {'a': 1}] and grid(a=[[0, 1]]) == [{'a': [0, 1]}] and grid(a=None) == [{'a': None}]
    with pytest.raises(ValueError, match='b is an empty list'): grid(a=1, b=[])


def test_roots(tmp_path, monkeypatch):
    monkeypatch.delenv('SOFTNCE_RUN_DIR', raising=False)
    monkeypatch.chdir(tmp_path)
    assert runs_root() == tmp_path/'runs' and runs_root('a') == tmp_path/'a'
    monkeypatch.chdir(Path(__file__).parent)
    assert runs_root() == Path(__file__).parents[2]/'runs'  # a notebook by hand, in nbs/experiments
    monkeypatch.setenv('SOFTNCE_RUN_DIR', str(tmp_path/'elsewhere'/'figure'/'0123'))
    assert runs_root() == tmp_path/'elsewhere' and runs_root('a') == Path(__file__).parent/'a'
    path = square(tmp_path)
    assert run_dir(path, {'x': 3, 'log': ''}) == tmp_path/'elsewhere'/'square'/run_id('square', {'x': 3., 'log': ''})


def test_run_all(tmp_path, capsys):
    path, log = square(tmp_path), tmp_path/'log'
    first = run_experiment(path, {'x': 2}, tmp_path/'runs')
    capsys.readouterr()
    with pytest.raises(RunFailed, match=r'(?s)1 of 4 runs failed:\n.*square/[0-9a-f]{8}: ValueError: x is -1.0 \(all of it in log.txt there\)') as e:
        run_all(path, grid(x=[2, -1, 3, 3.]), tmp_path/'runs')
    assert first.dir.name not in str(e.value)
    out = capsys.readouterr().out.splitlines()
    assert [re.sub(' [0-9a-f]{8} ', ' ', o) for o in out] == ['2/4 square x=-1', '3/4 square x=3']  # 3. is the run of 3
    df = run_all(path, grid(x=[3, 2]), tmp_path/'runs')
    assert df['square'].tolist() == [9, 4] and df['x'].tolist() == [3, 2] and df['id'][1] == first.dir.name
    assert not capsys.readouterr().out and log.read_text().splitlines() == ['2.0', '-1.0', '3.0']
    with pytest.raises(UsageError, match="square has no parameter 'y'"): run_all(path, [{'x': 7}, {'y': 7}], tmp_path/'runs')
    assert log.read_text().splitlines() == ['2.0', '-1.0', '3.0']


def test_values_reach_a_run_as_they_are(tmp_path):
    params = "a = 1  # a\nb = .5  # b\nc = 'x'  # c\nd = [1.]  # d\ne = False  # e\nf = None  # f"
    path = experiment(tmp_path/'n.ipynb', params, START, "run.save_metrics({'seen': repr([a, b, c, d, e, f])})")
    values = dict(a=-3, b=1e-7, c='- y: "1e3" [ü]', d=[1, 2e-9], e=True, f='null')
    df = run_all(path, [values, {}], tmp_path/'runs')
    assert df['seen'].tolist() == [repr([-3, 1e-7, '- y: "1e3" [ü]', [1., 2e-9], True, 'null']), repr([1, .5, 'x', [1.], False, None])]


def test_figures_share_runs(tmp_path):
    "Two figures, run by the runner, ask for overlapping runs; the runs go beside the figures' own."
    path = square(tmp_path)
    for name, xs in (('one', [1, 2]), ('two', [2, 3])):
        experiment(tmp_path/f'{name}.ipynb', f"xs = {xs}  # points", START+"\nfrom softnce.runs.sweeps import grid, run_all",
                   f"df = run_all({str(path)!r}, needs['square'])\nrun.save_metrics({{'sum': int(df['square'].sum())}})", runs="needs = {'square': grid(x=xs)}")
    assert needs(tmp_path/'one.ipynb') == {'square': [{'x': 1}, {'x': 2}]} and needs(tmp_path/'one.ipynb', {'xs': [5]}) == {'square': [{'x': 5}]}
    assert needs(path) == {}
    assert [run_experiment(tmp_path/f'{n}.ipynb', {}, tmp_path/'runs').metrics() for n in ('one', 'two')] == [[{'sum': 5}], [{'sum': 13}]]
    assert sorted((tmp_path/'log').read_text().split()) == ['1.0', '2.0', '3.0'] and len(list((tmp_path/'runs'/'square').iterdir())) == 3


@pytest.mark.parametrize('cell, message', [
    ("needs = {'a': grid(x=y)}", "may use its parameters and grid only; NameError: name 'y' is not defined"), ("need = {}", 'must set needs = .* got None'),
    ("needs = grid(x=x)", 'must set needs'), ("needs = {'a': grid(x=[])}", 'x is an empty list'), ("needs = {'a': {'x': 1}}", 'must set needs')])
def test_needs_refuses(tmp_path, cell, message):
    with pytest.raises(UsageError, match=message): needs(experiment(tmp_path/'f.ipynb', "x = 1  # x", runs=cell))


def test_a_stop_reaches_the_inner_run(tmp_path):
    "SIGTERM to the runner of a figure: its inner run is stopped too and left unfinished; the same command finishes both."
    inner = experiment(tmp_path/'inner.ipynb', "x = 1  # x", START, "import time\nready, told = run.checkpoint_dir/'ready', run.checkpoint_dir/'told'\n"
        "try:\n    if not ready.exists(): ready.touch(); time.sleep(300)\nexcept KeyboardInterrupt: told.touch(); raise", "run.save_metrics({'x': x})")
    figure = experiment(tmp_path/'figure.ipynb', "xs = [1]  # xs", START+"\nfrom softnce.runs.sweeps import grid, run_all", f"df = run_all({str(inner)!r}, needs['i'])",
                        runs="needs = {'i': grid(x=xs)}")
    command = [sys.executable, '-c', 'from softnce.runs.runs import main; main()', 'run', str(figure), '--out', str(tmp_path/'runs')]
    ready = tmp_path/'runs'/'inner'/run_id('inner', {'x': 1})/'checkpoint'/'ready'
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic()+240
        while not ready.exists(): assert time.monotonic() < end and process.poll() is None; time.sleep(.05)
        process.terminate()
        assert process.wait() == 75
    assert ready.with_name('told').exists() and not list(tmp_path.glob('runs/*/*/metrics.json'))
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0 and len(list(tmp_path.glob('runs/*/*/metrics.json'))) == 2


# ---- plans and their state

def test_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = square(tmp_path)
    experiment(tmp_path/'fig.ipynb', "xs = [1]  # points", START, runs="needs = {'square.ipynb': grid(x=xs, log='')}")
    figure = lambda xs: {'notebook': 'fig.ipynb', 'parameters': {'xs': xs}}
    plan = Plan({'targets': {'figure1': figure([1, 2]), 'figure2': figure([2, 3]), 'figure3': {'notebook': 'square.ipynb'}, 'figure4': figure([2, 3])},
                 'resources': {'default': {'runtime': 5}, 'square': {'gpu': 2}}, 'out': 'out'})
    assert len(plan.runs) == 6 and plan.targets['figure2'] == plan.targets['figure4'] and plan.names(True) == 'fig' and plan.names(False) == 'square'
    id = run_id('square', {'x': 2., 'log': ''})
    assert [f'out/square/{id}/metrics.json' in plan.inputs(*plan.targets[f'figure{i}'][0]) for i in (1, 2, 3)] == [True, True, False]
    assert plan.files('figure3') == [f"out/square/{run_id('square', {'x': 1., 'log': str(tmp_path/'log')})}/metrics.json"]
    assert plan.command('square', id) == "softnce run square.ipynb -p x=2.0 -p 'log=\"\"' --out out --wait --restart --requeue"
    class Wildcards: pass
    w = Wildcards()
    w.experiment, w.id = 'square', id
    assert [plan.resource(*o)(w) for o in (('gpu', 0), ('runtime', 60), ('mem_mb', 7))] == [2, 5, 7]
    before = plan.code('square', id)
    experiment(path, f"x = 1.  # a number\nlog = {str(tmp_path/'log')!r}  # where to note a call", START, *SQUARE, '1+1')
    assert plan.code('square', id) != before


@pytest.mark.parametrize('config, message', [
    ({'targets': {'f': {'notebook': 'nothing'}}}, "no experiment 'nothing'"), ({'targets': {}, 'seeds': 1}, "config has no key 'seeds'; it has targets, resources, out"),
    ({'targets': {'f': {'notebook': 'gmm', 'parameters': {'seed': 1}}}}, "gmm has no parameter 'seed'"),
    ({'targets': {'f': {'notebook': 'gmm', 'parameter': {}}}}, "targets: f takes notebook, parameters and grid, got notebook, parameter"), ({}, 'config names no targets')])
def test_plan_refuses(config, message):
    with pytest.raises(UsageError, match=message): Plan(config)


def test_a_target_of_several_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    square(tmp_path)
    plan = Plan({'targets': {'t': [{'notebook': 'square.ipynb', 'parameters': {'log': 'a'}, 'grid': {'x': [1, 2]}}, {'notebook': 'square.ipynb', 'parameters': {'x': 5}}]}})
    want = [{'x': 1., 'log': 'a'}, {'x': 2., 'log': 'a'}, {'x': 5., 'log': str(tmp_path/'log')}]
    assert plan.files('t') == [f"runs/square/{run_id('square', o)}/metrics.json" for o in want] and len(plan.runs) == 3


@pytest.mark.parametrize('size', ['paper', 'small'])
def test_the_configs(size):
    "Every run of the committed configs: parameters that exist, one id a run, and all the paper's tables and figures."
    config = yaml.safe_load((Path(__file__).parents[2]/'config'/f'{size}.yaml').read_text())
    plan = Plan(config)
    assert {'table1', 'table2', 'figure1', 'figure3a', 'figure3b', 'figure4', 'figure5', 'figure6'} <= set(plan.targets)
    assert {k[0] for k in plan.runs} >= {'gmm', 'images', 'graphs'} and not set(config['resources'])-{k[0] for k in plan.runs}
    for key, run in plan.runs.items(): assert key[1] == run_id(key[0], resolve(run.experiment, run.parameters))


def test_processes_are_gpus(tmp_path):
    path = experiment(tmp_path/'n.ipynb', "processes = 1  # one a GPU", START)
    plan = Plan({'targets': {'a': {'notebook': str(path), 'parameters': {'processes': 8}}, 'b': {'notebook': str(path)}}, 'resources': {'n': {'gpu': 1}}})
    class Wildcards: pass
    w = Wildcards()
    gpus = []
    for (w.experiment, w.id), in plan.targets.values(): gpus.append(plan.resource('gpu', 0)(w))
    assert gpus == [8, 1]


def test_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = square(tmp_path)
    (tmp_path/'plan.yaml').write_text("targets:\n  a: {notebook: square.ipynb, parameters: {x: 3, log: ''}}\n  b: {notebook: square.ipynb, parameters: {x: 2}}\n")
    with pytest.raises(RunFailed): run_all(path, grid(x=[2, -1]), 'runs')
    stopped, killed, running = [tmp_path/'runs'/'square'/(i*8) for i in '123']
    for folder, text in ((stopped, '[2026-01-01 00:00:00] run square 1: 3 cells, in x\n[2026-01-01 00:00:10] run square 1: stopped and unfinished\n'
                                   '[2026-01-01 00:10:00] run square 1: 3 cells, resuming in x\n[2026-01-01 01:10:05] run square 1: stopped and unfinished\n'),
                         (killed, '[2026-01-01 00:00:00] run square 2: 3 cells, in x\n'), (running, time.strftime('[%F %T] run square 3: 3 cells, in x\n'))):
        folder.mkdir()
        (folder/'log.txt').write_text(text)
        (folder/'params.yaml').write_text('x: 1\n')
    (stopped/'history.csv').write_text('seed,epoch,loss\n0,1,.5\n0,2,.123456\n')
    with lock(running): df, failures = status('runs', 'plan.yaml')
    by = df.set_index('id')
    want = {run_id('square', {'x': 2., 'log': str(tmp_path/'log')}): 'done', run_id('square', {'x': -1., 'log': str(tmp_path/'log')}): 'failed', '1'*8: 'stopped', '2'*8: 'killed',
            '3'*8: 'running', run_id('square', {'x': 3., 'log': ''}): 'missing'}
    assert by['state'].to_dict() == want
    assert by['seconds']['1'*8] == 10+3605 and by['last']['1'*8] == 'seed=0 epoch=2 loss=0.1235' and f'process {os.getpid()} on' in by['note']['3'*8]
    failed, = failures
    assert want[failed] == 'failed' and by['note'][failed] == 'square.ipynb, cell 3 of 3: ValueError: x is -1.0' and failures[failed].endswith('ValueError: x is -1.0')
    sweeps.show_status('runs', 'plan.yaml', False)
    out = capsys.readouterr().out
    assert '6 runs: ' in out and '1 missing' in out and '1:00:15' in out and 'softnce status --errors shows the tracebacks' in out
    sweeps.show_status('runs', None, True)
    assert capsys.readouterr().out.endswith('ValueError: x is -1.0\n')
    with pytest.raises(UsageError, match="there is no run in 'nowhere'"): status('nowhere')


def test_waiting_for_the_jobs_of_an_earlier_head(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers = [f'7|softnce_ab|{tmp_path}\n8|softnce_ab|/elsewhere\n9|other|{tmp_path}\n10|softnce_ab|{tmp_path}', f'10|softnce_ab|{tmp_path}', '8|softnce_ab|/elsewhere']
    monkeypatch.setattr(sweeps.shutil, 'which', lambda name: name == 'squeue')
    monkeypatch.setattr(sweeps, '_output', lambda *cmd: answers.pop(0))
    sweeps.wait_for_queue(every=0)
    assert not answers and re.findall('scancel [0-9 ]+', capsys.readouterr().err) == ['scancel 7 10', 'scancel 10']
    monkeypatch.setattr(sweeps.shutil, 'which', lambda name: None)
    sweeps.wait_for_queue()


def test_a_partition_that_is_not_there(monkeypatch):
    monkeypatch.setattr(sweeps.shutil, 'which', lambda name: name == 'sinfo')
    monkeypatch.setattr(sweeps, '_output', lambda *cmd: 'spot\ngpu\ngpu')
    from types import SimpleNamespace
    default = lambda name: SimpleNamespace(args=['mem_mb=5', f'slurm_partition={name}'])
    for settings in (default('gpu'), default("'gpu,spot'"), SimpleNamespace(args=['mem_mb=5']), None): sweeps.check_partition(settings)
    with pytest.raises(UsageError, match="no partition 'gpus' on this cluster; it has: gpu, spot. Set slurm_partition in profiles/slurm/config.yaml"): sweeps.check_partition(default('gpus'))
    monkeypatch.setattr(sweeps, '_output', lambda *cmd: None)
    sweeps.check_partition(default('gpus'))
