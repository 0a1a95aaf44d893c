"softnce.runs.sweeps: grids, the runs behind a figure, and many runs with failures, sharing and stop signals."
import re, subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from small_experiments import COMMAND, REPO, START, cli, notebook, wait_for

import softnce.runs.sweeps as sweeps
from softnce.runs.execute import RunFailed, run_experiment
from softnce.runs.experiment import resolve, run_id
from softnce.runs.sweeps import Plan, grid, needs, run_all, run_dir, runs_root
from softnce.runs.values import UsageError

SQUARE = ["with open(log, 'a') as f: f.write(f'{x}\\n')\nif x < 0: raise ValueError(f'x is {x}')\n"
          "run.save_metrics({'square': x*x})"]


def square(tmp_path, *more):
    "An experiment that notes its calls in `log` and fails below zero."
    params = f"x = 1.  # a number\nlog = {str(tmp_path/'log')!r}  # where to note a call"
    return notebook(tmp_path/'square.ipynb', START, *SQUARE, *more, params=params)


def test_grid():
    assert grid(a=[1, 2], b='xy', c=(3, 4)) == [dict(a=a, b='xy', c=c) for a in (1, 2) for c in (3, 4)]
    assert grid() == [{}] and grid(a=range(2)) == [{'a': 0}, {'a': 1}]
    assert grid(a=[[0, 1]]) == [{'a': [0, 1]}] and grid(a=None) == [{'a': None}]
    with pytest.raises(ValueError, match='b is an empty list'): grid(a=1, b=[])


def test_roots(tmp_path, monkeypatch):
    monkeypatch.delenv('SOFTNCE_RUN_DIR', raising=False)
    monkeypatch.chdir(tmp_path)
    assert runs_root() == tmp_path/'runs' and runs_root('a') == tmp_path/'a'
    monkeypatch.chdir(Path(__file__).parent)
    assert runs_root() == REPO/'runs'  # a notebook by hand, in nbs/experiments
    monkeypatch.setenv('SOFTNCE_RUN_DIR', str(tmp_path/'elsewhere'/'figure'/'0123'))
    assert runs_root() == tmp_path/'elsewhere' and runs_root('a') == Path(__file__).parent/'a'
    path = square(tmp_path)
    want = tmp_path/'elsewhere'/'square'/run_id('square', {'x': 3., 'log': ''})
    assert run_dir(path, {'x': 3, 'log': ''}) == want


def test_run_all(tmp_path, capsys):
    path, log = square(tmp_path), tmp_path/'log'
    first = run_experiment(path, {'x': 2}, tmp_path/'runs')
    capsys.readouterr()
    message = r'(?s)1 of 4 runs failed:\n.*square/[0-9a-f]{8}: ValueError: x is -1.0 \(all of it in log.txt there\)'
    with pytest.raises(RunFailed, match=message) as e: run_all(path, grid(x=[2, -1, 3, 3.]), tmp_path/'runs')
    assert first.dir.name not in str(e.value)
    out = capsys.readouterr().out.splitlines()
    assert [re.sub(' [0-9a-f]{8} ', ' ', o) for o in out] == ['2/4 square x=-1', '3/4 square x=3']  # 3. is the run of 3
    df = run_all(path, grid(x=[3, 2]), tmp_path/'runs')
    assert df['square'].tolist() == [9, 4] and df['x'].tolist() == [3, 2] and df['id'][1] == first.dir.name
    assert not capsys.readouterr().out and log.read_text().splitlines() == ['2.0', '-1.0', '3.0']
    with pytest.raises(UsageError, match="square has no parameter 'y'"):
        run_all(path, [{'x': 7}, {'y': 7}], tmp_path/'runs')
    assert log.read_text().splitlines() == ['2.0', '-1.0', '3.0']


def test_values_reach_a_run_as_they_are(tmp_path):
    params = "a = 1  # a\nb = .5  # b\nc = 'x'  # c\nd = [1.]  # d\ne = False  # e\nf = None  # f"
    path = notebook(tmp_path/'n.ipynb', START, "run.save_metrics({'seen': repr([a, b, c, d, e, f])})", params=params)
    values = dict(a=-3, b=1e-7, c='- y: "1e3" [ü]', d=[1, 2e-9], e=True, f='null')
    df = run_all(path, [values, {}], tmp_path/'runs')
    want = [-3, 1e-7, '- y: "1e3" [ü]', [1., 2e-9], True, 'null'], [1, .5, 'x', [1.], False, None]
    assert df['seen'].tolist() == list(map(repr, want))


def test_figures_share_runs(tmp_path):
    "Two figures, run by the runner, ask for overlapping runs; the runs go beside the figures' own."
    path = square(tmp_path)
    work = (f"df = run_all({str(path)!r}, needs['square'])\n"
            "run.save_metrics({'sum': int(df['square'].sum())})")
    for name, xs in (('one', [1, 2]), ('two', [2, 3])):
        notebook(tmp_path/f'{name}.ipynb', START+"\nfrom softnce.runs import grid, run_all", work,
                 params=f"xs = {xs}  # points", runs="needs = {'square': grid(x=xs)}")
    assert needs(tmp_path/'one.ipynb') == {'square': [{'x': 1}, {'x': 2}]}
    assert needs(tmp_path/'one.ipynb', {'xs': [5]}) == {'square': [{'x': 5}]} and needs(path) == {}
    found = [run_experiment(tmp_path/f'{n}.ipynb', {}, tmp_path/'runs').metrics() for n in ('one', 'two')]
    assert found == [[{'sum': 5}], [{'sum': 13}]]
    assert sorted((tmp_path/'log').read_text().split()) == ['1.0', '2.0', '3.0']
    assert len(list((tmp_path/'runs'/'square').iterdir())) == 3


@pytest.mark.parametrize('cell, message', [
    ("needs = {'a': grid(x=y)}", "may use its parameters and grid only; NameError: name 'y' is not defined"),
    ("need = {}", 'must set needs = .* got None'), ("needs = grid(x=x)", 'must set needs'),
    ("needs = {'a': grid(x=[])}", 'x is an empty list'), ("needs = {'a': {'x': 1}}", 'must set needs')])
def test_needs_refuses(tmp_path, cell, message):
    path = notebook(tmp_path/'f.ipynb', '1', params="x = 1  # x", runs=cell)
    with pytest.raises(UsageError, match=message): needs(path)


def test_a_stop_reaches_the_inner_run(tmp_path):
    "SIGTERM to the runner of a figure stops its inner run too; the same command then finishes both."
    work = ("import time\nready, told = run.checkpoint_dir/'ready', run.checkpoint_dir/'told'\n"
            "try:\n    if not ready.exists(): ready.touch(); time.sleep(300)\n"
            "except KeyboardInterrupt: told.touch(); raise")
    inner = notebook(tmp_path/'inner.ipynb', START, work, "run.save_metrics({'x': x})", params="x = 1  # x")
    drawing = START+"\nfrom softnce.runs import grid, run_all", f"df = run_all({str(inner)!r}, needs['i'])"
    figure = notebook(tmp_path/'figure.ipynb', *drawing, params="xs = [1]  # xs", runs="needs = {'i': grid(x=xs)}")
    command = [*COMMAND, 'run', str(figure), '--out', str(tmp_path/'runs')]
    ready = tmp_path/'runs'/'inner'/run_id('inner', {'x': 1})/'checkpoint'/'ready'
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: ready.exists() or process.poll() is not None)
        assert process.poll() is None
        process.terminate()
        assert process.wait() == 75
    assert ready.with_name('told').exists() and not list(tmp_path.glob('runs/*/*/metrics.json'))
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0
    assert len(list(tmp_path.glob('runs/*/*/metrics.json'))) == 2


# ---- plans and their state

def wildcards(key): return SimpleNamespace(experiment=key[0], id=key[1])


def test_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    square(tmp_path)
    asks = "needs = {'square.ipynb': grid(x=xs, log='')}"
    notebook(tmp_path/'fig.ipynb', START, params="xs = [1]  # points", runs=asks)
    figure = lambda xs: {'notebook': 'fig.ipynb', 'parameters': {'xs': xs}}
    targets = {'figure1': figure([1, 2]), 'figure2': figure([2, 3]), 'figure3': {'notebook': 'square.ipynb'},
               'figure4': figure([2, 3])}
    resources = {'default': {'runtime': 5}, 'square': {'gpu': 2}}
    plan = Plan({'targets': targets, 'resources': resources, 'out': 'out'})
    assert len(plan.runs) == 6 and plan.targets['figure2'] == plan.targets['figure4']
    assert plan.names(True) == 'fig' and plan.names(False) == 'square'
    id = run_id('square', {'x': 2., 'log': ''})
    behind = [f'out/square/{id}/metrics.json' in plan.inputs(*plan.targets[f'figure{i}'][0]) for i in (1, 2, 3)]
    assert behind == [True, True, False]
    default = run_id('square', {'x': 1., 'log': str(tmp_path/'log')})
    assert plan.files('figure3') == [f'out/square/{default}/metrics.json']
    want = "softnce run square.ipynb -p x=2.0 -p 'log=\"\"' --out out --wait --restart --requeue"
    assert plan.command('square', id) == want
    asked = ('gpu', 0), ('runtime', 60), ('mem_mb', 7)
    assert [plan.resource(*o)(wildcards(('square', id))) for o in asked] == [2, 5, 7]
    before = plan.code_hash('square', id)
    square(tmp_path, '1+1')
    assert plan.code_hash('square', id) != before


def with_preflight(path, cell):
    "The notebook with a cell tagged `preflight` after its parameters."
    import nbformat
    from nbformat.v4 import new_code_cell
    nb = nbformat.read(path, 4)
    nb.cells.insert(2, new_code_cell(cell, metadata={'tags': ['preflight']}))
    nbformat.write(nb, path)
    return path


def test_run_all_makes_all_checks_first(tmp_path):
    path = with_preflight(square(tmp_path), "if x > 5: raise ValueError(f'x must be at most 5, got {x}')")
    with pytest.raises(UsageError, match='square: x must be at most 5, got 6.0'):
        run_all(path, grid(x=[1, 6]), tmp_path/'runs')
    assert not (tmp_path/'runs').exists()


def test_a_figure_is_checked_with_what_it_needs(tmp_path):
    "Before its kernel starts, in one line; a finished figure needs nothing."
    path = with_preflight(square(tmp_path), "if x > 5: raise ValueError(f'x must be at most 5, got {x}')")
    notebook(tmp_path/'fig.ipynb', START, params="xs = [1]", runs=f"needs = {{{str(path)!r}: grid(x=xs)}}")
    done = cli('run', 'fig.ipynb', '-p', 'xs=[1, 6]', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == 'softnce: square: x must be at most 5, got 6.0\n'
    assert not (tmp_path/'runs').exists()
    folder = tmp_path/'runs'/'fig'/run_id('fig', {'xs': [1, 6]})
    folder.mkdir(parents=True)
    for name, text in (('metrics.json', '[]'), ('params.yaml', 'xs: [1, 6]')): (folder/name).write_text(text)
    assert cli('run', 'fig.ipynb', '-p', 'xs=[1, 6]', cwd=tmp_path).returncode == 0


def test_run_all_refuses_other_data_and_names_a_mix(tmp_path, capsys):
    data = tmp_path/'data.csv'
    data.write_text('1')
    cell = f"from softnce.runs import fingerprint\npreflight = dict(data=fingerprint({str(data)!r}))"
    path = with_preflight(square(tmp_path), cell)
    run_all(path, [{'x': 2}], tmp_path/'runs')
    with_preflight(path, '1+1')
    assert len(run_all(path, grid(x=[2, 3]), tmp_path/'runs')) == 2
    assert 'note: not all of these runs were made by the same: the notebook in 2 versions' in capsys.readouterr().out
    data.write_text('2')
    with pytest.raises(UsageError, match='has changed: .*data.csv: 1 bytes, .* --restart'):
        run_all(path, grid(x=[2, 3, 4]), tmp_path/'runs')
    assert len(list((tmp_path/'runs'/'square').iterdir())) == 2


def test_what_keeps_a_plan_from_starting(tmp_path, monkeypatch, capsys):
    "Only runs that are asked for and not finished count; a message is said once."
    monkeypatch.chdir(tmp_path)
    with_preflight(square(tmp_path), "from pathlib import Path\nif x > 1 and not Path('there').exists():\n"
                                     "    raise FileNotFoundError(2, 'there is no data', 'there')")
    notebook(tmp_path/'fig.ipynb', START, params="xs = [1]", runs="needs = {'square.ipynb': grid(x=xs)}")
    plan = Plan({'targets': {'bad': {'notebook': 'fig.ipynb', 'parameters': {'xs': [1, 2, 3]}},
                             'good': {'notebook': 'square.ipynb'}}})
    line, = plan.problems()
    assert line.startswith("2 runs cannot start: there is no data: 'there' (square ")
    assert plan.problems(['good']) == [] and plan.problems(['bad']) == plan.problems(['runs/x/metrics.json']) == [line]
    settings = lambda targets: SimpleNamespace(targets=targets)
    workflow = lambda main, *targets: SimpleNamespace(is_main_process=main, dag_settings=settings(targets))
    assert sweeps.say_problems(plan, workflow(True)) == [line] and capsys.readouterr().err == f'softnce: {line}\n'
    assert sweeps.say_problems(plan, workflow(False)) == sweeps.say_problems(plan, workflow(True, 'good')) == []
    assert not capsys.readouterr().err and not (tmp_path/'runs').exists()
    id = run_id('square', {'x': 2., 'log': str(tmp_path/'log')})
    (tmp_path/'runs'/'square'/id).mkdir(parents=True)
    (tmp_path/'runs'/'square'/id/'metrics.json').write_text('[]')
    assert plan.problems()[0].startswith('1 run cannot start: ')


def test_numbers_of_a_config(tmp_path):
    "Snakemake reads YAML 1.1, in which 1e-3 is text."
    path = str(notebook(tmp_path/'n.ipynb', START, params="lr = None\nname = 'a'"))
    plan = Plan({'targets': {'t': {'notebook': path, 'parameters': {'lr': '1e-3', 'name': '1e-3'}}}})
    assert plan.targets['t'] == [('n', run_id('n', {'lr': .001, 'name': '1e-3'}))]


@pytest.mark.parametrize('name, out', [
    ('a{b', 'runs'), ('n', 'a{b}'), ('n', '~/runs'), ("it's", 'runs'), ('n', 'a\\b')])
def test_names_that_snakemake_misreads(tmp_path, name, out):
    path = str(notebook(tmp_path/f'{name}.ipynb', START))
    with pytest.raises(UsageError, match='must not contain'): Plan({'targets': {'t': {'notebook': path}}, 'out': out})


def test_names_are_no_patterns(tmp_path):
    path = str(notebook(tmp_path/'a+b (1).ipynb', START))
    plan = Plan({'targets': {'t': {'notebook': path}}, 'out': 'my runs'})
    assert re.fullmatch(plan.names(False), 'a+b (1)') and not re.fullmatch(plan.names(False), 'aab 1')


@pytest.mark.parametrize('config, message', [
    ({'targets': {'f': {'notebook': 'nothing'}}}, "no experiment 'nothing'"),
    ({'targets': {}, 'seeds': 1}, "config has no key 'seeds'; it has targets, resources, out"),
    ({'targets': {'f': {'notebook': 'gmm', 'parameters': {'seed': 1}}}}, "gmm has no parameter 'seed'"),
    ({'targets': {'f': {'notebook': 'gmm', 'parameter': {}}}},
     "targets: f takes notebook, parameters and grid, got notebook, parameter"), ({}, 'config names no targets')])
def test_plan_refuses(config, message):
    with pytest.raises(UsageError, match=message): Plan(config)


def test_a_target_of_several_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    square(tmp_path)
    parts = [{'notebook': 'square.ipynb', 'parameters': {'log': 'a'}, 'grid': {'x': [1, 2]}},
             {'notebook': 'square.ipynb', 'parameters': {'x': 5}}]
    plan = Plan({'targets': {'t': parts}})
    want = [{'x': 1., 'log': 'a'}, {'x': 2., 'log': 'a'}, {'x': 5., 'log': str(tmp_path/'log')}]
    assert plan.files('t') == [f"runs/square/{run_id('square', o)}/metrics.json" for o in want] and len(plan.runs) == 3


@pytest.mark.parametrize('size', ['paper', 'small'])
def test_the_configs(size):
    "Every run of the committed configs: parameters that exist, one id a run, and all the paper's tables and figures."
    config = yaml.safe_load((REPO/'config'/f'{size}.yaml').read_text())
    plan = Plan(config)
    paper = {'table1', 'table2', 'figure1', 'figure3a', 'figure3b', 'figure4', 'figure5', 'figure6'}
    names = {k[0] for k in plan.runs}
    assert paper <= set(plan.targets)
    assert names >= {'gmm', 'images', 'graphs'} and not set(config['resources'])-names
    for key, run in plan.runs.items(): assert key[1] == run_id(run.experiment, resolve(run.experiment, run.parameters))


def test_processes_are_gpus(tmp_path):
    path = str(notebook(tmp_path/'n.ipynb', START, params="processes = 1  # one a GPU"))
    targets = {'a': {'notebook': path, 'parameters': {'processes': 8}}, 'b': {'notebook': path}}
    plan = Plan({'targets': targets, 'resources': {'n': {'gpu': 1}}})
    assert [plan.resource('gpu', 0)(wildcards(key)) for key, in plan.targets.values()] == [8, 1]


# ---- Slurm, as its programs answer

@pytest.fixture
def slurm(monkeypatch):
    "Says which of Slurm's programs there is, and what it answers."
    def set_up(program, answer):
        monkeypatch.setattr(sweeps.shutil, 'which', lambda name: name == program)
        monkeypatch.setattr(sweeps, 'command_output', lambda *words: answer())
    return set_up


def test_waiting_for_the_jobs_of_an_earlier_head(tmp_path, monkeypatch, capsys, slurm):
    monkeypatch.chdir(tmp_path)
    elsewhere, ours = '8|softnce_ab|/elsewhere', f'10|softnce_ab|{tmp_path}'
    answers = [f'7|softnce_ab|{tmp_path}\n{elsewhere}\n9|other|{tmp_path}\n{ours}', ours, elsewhere]
    slurm('squeue', lambda: answers.pop(0))
    sweeps.wait_for_queue(every=0)
    assert not answers and re.findall('scancel [0-9 ]+', capsys.readouterr().err) == ['scancel 7 10', 'scancel 10']
    slurm(None, lambda: pytest.fail('there is no Slurm to ask'))
    sweeps.wait_for_queue()


def test_a_partition_that_is_not_there(slurm):
    slurm('sinfo', lambda: 'spot\ngpu\ngpu')
    default = lambda name: SimpleNamespace(args=['mem_mb=5', f'slurm_partition={name}'])
    for settings in (default('gpu'), default("'gpu,spot'"), SimpleNamespace(args=['mem_mb=5']), None):
        sweeps.check_partition(settings)
    message = ("no partition 'gpus' on this cluster; it has: gpu, spot. "
               "Set slurm_partition in profiles/slurm/config.yaml")
    with pytest.raises(UsageError, match=message): sweeps.check_partition(default('gpus'))
    slurm('sinfo', lambda: None)
    sweeps.check_partition(default('gpus'))
