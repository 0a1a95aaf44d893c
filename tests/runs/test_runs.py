"softnce.runs.runs: the checks before a run, the run directory, and the console script as a user calls it."
import ast, csv, json, os, re, signal, subprocess, sys, time
from io import StringIO
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import softnce.runs.runs as runs
from softnce.runs.runs import (Experiment, Run, RunFailed, RunLocked, UsageError, check_value, collect, find_experiment, list_experiments, lock,
                          parse_overrides, read_parameters, resolve, run_experiment, run_id, this_run)

SCRIPT = Path(sys.executable).with_name('softnce')
REPO = Path(__file__).parents[2]
PARAMS = "alignment = 40    # in percent\nlr = .5  # step size\nloss = 'nll'\nseeds = [0, 1]\nrates = [.1, 1]\ndebug = False\npath = None"


def notebook(path, *cells, params=PARAMS, tags=('parameters',)):
    "A small experiment: a title, a cell of parameters per tag, then the cells (text after '#md ' is Markdown)."
    made = [new_markdown_cell('# Test\n\n> A subtitle')]
    made += [new_code_cell(params, metadata={'tags': [t] if t else []}) for t in tags]
    made += [new_markdown_cell(c[4:]) if c.startswith('#md ') else new_code_cell(c) for c in cells]
    nbformat.write(new_notebook(cells=made), path)
    return path


def cli(*args, cwd, **env):
    return subprocess.run([SCRIPT, *map(str, args)], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})


def wait_for(condition, seconds=240):
    "Wait until the condition holds: for a process to get somewhere, never to measure it."
    end = time.monotonic()+seconds
    while not condition():
        assert time.monotonic() < end, 'the run never got there'
        time.sleep(.02)


# ---- before anything runs

@pytest.mark.parametrize('value, default, want', [
    (3, 1, 3), (3, 1., 3.), ('1e-3', 1., .001), ('-2E+4', 1., -2e4), (True, False, True), ('a', 'b', 'a'), ([3], [0, 1], [3]), ([], [0], []),
    ([2, .5], [.1, 1], [2., .5]), ((3, 4), [0], [3, 4]), (np.int64(3), 1, 3), (np.float32(.5), 1., .5), (torch.tensor(3), 1, 3),
    (np.arange(2), [5], [0, 1]), ('x', None, 'x'), ([1, 'a', None], None, [1, 'a', None]), (None, None, None), ([1, 'a'], [], [1, 'a']),
    ([[1, 2], [3]], [[0]], [[1, 2], [3]]), ([None, 2], [None, .5], [None, 2])])
def test_check_value_accepts(value, default, want):
    got = check_value('x', value, default)
    assert got == want and type(got) is type(want)
    if isinstance(want, list): assert list(map(type, got)) == list(map(type, want))


@pytest.mark.parametrize('value, default, message', [
    (True, 1, r'x must be int, like its default 1; got True \(bool\)'), (1, False, 'x must be bool'), (1., 1, 'x must be int'),
    ('1e3', 1, 'x must be int'), (True, 1., 'x must be float'), ('fast', 1., r"x must be float, like its default 1.0; got 'fast' \(str\)"),
    (3, 'nll', 'x must be str'), (None, 1, r'x must be int, like its default 1; got None \(NoneType\)'), (3, [0], 'x must be list'),
    ('0,1', [0], 'x must be list'), ([0, 'one'], [0], r"x\[1\] must be int"), ([[1, .5]], [[0]], r'x\[0\]\[1\] must be int'),
    ([True], [.1], r'x\[0\] must be float'), ({'a': 1}, None, 'x must be an int, float, str, bool, list or None')])
def test_check_value_refuses(value, default, message):
    with pytest.raises(UsageError, match=message): check_value('x', value, default)


def test_parse_overrides():
    got = parse_overrides(['a=1', 'b = [1, x]', 'c=null', "d='3'", 'e=x=y', 'f=1e-3'])
    assert got == {'a': 1, 'b': [1, 'x'], 'c': None, 'd': '3', 'e': 'x=y', 'f': '1e-3'}


@pytest.mark.parametrize('pairs, message', [
    (['steps'], "-p takes key=value, got 'steps'"), (['=3'], '-p takes key=value'), (['a b=3'], '-p takes key=value'),
    (['a=[1,'], r'the value is not YAML; quote it'), (['a=1', 'a=2'], '-p a was given twice')])
def test_parse_overrides_refuses(pairs, message):
    with pytest.raises(UsageError, match=message): parse_overrides(pairs)


def test_read_parameters():
    got = read_parameters("# the size\nn = -3  # points\nxs = [1,\n      2]  # two lines\ns = 'a # b'\n")
    assert {k: tuple(p) for k, p in got.items()} == {'n': (-3, 'points'), 'xs': ([1, 2], 'two lines'), 's': ('a # b', '')}


@pytest.mark.parametrize('source', ['n = 2*3', 'import os', 'n: int = 3', 'a = b = 1', 'a, b = 1, 2', 'print(1)', 'x = (1, 2)', 'x = {}',
                                    "'text'", 'n += 1', 'x.y = 1', 'f = lambda: 1'])
def test_read_parameters_refuses(source):
    with pytest.raises(UsageError, match=r"must hold lines like `name = literal`.* got: " + re.escape(ast.unparse(ast.parse(source).body[0]))):
        read_parameters(source)


def test_parameters_cell_that_is_not_python():
    with pytest.raises(UsageError, match='not plain Python'): read_parameters('%matplotlib inline')


@pytest.mark.parametrize('tags, message', [
    (('',), "n.ipynb needs exactly one cell tagged 'parameters', it has 0"), (('parameters',)*2, 'it has 2'),
    (('parameters', 'injected-parameters'), 'n.ipynb is an executed notebook')])
def test_tag_missing_or_twice(tmp_path, tags, message):
    path = notebook(tmp_path/'n.ipynb', tags=tags)
    with pytest.raises(UsageError, match=message): run_experiment(path, {}, tmp_path/'runs')
    assert not (tmp_path/'runs').exists()


def test_not_a_notebook(tmp_path):
    (tmp_path/'n.ipynb').write_text('{"cells"')
    with pytest.raises(UsageError, match='n.ipynb is not a notebook'): run_experiment(tmp_path/'n.ipynb')
    with pytest.raises(UsageError, match='there is no notebook'): find_experiment(tmp_path/'m.ipynb')


def test_names(tmp_path, monkeypatch):
    for name in ('gmm', 'images', 'noise_samples'): notebook(tmp_path/f'{name}.ipynb')
    monkeypatch.setattr(runs, 'experiments_dir', lambda: tmp_path)
    assert [e.name for e in list_experiments()] == ['gmm', 'images', 'noise_samples']
    assert find_experiment('gmm') == Experiment(tmp_path/'gmm.ipynb')
    assert find_experiment('gmm').subtitle == 'A subtitle'
    with pytest.raises(UsageError, match="no experiment 'image'; did you mean 'images'\\? there are: gmm, images, noise_samples"): find_experiment('image')
    with pytest.raises(UsageError, match="no experiment 'qqq'; there are: gmm"): find_experiment('qqq')


def test_where_experiments_are(monkeypatch):
    assert runs.experiments_dir() == REPO/'nbs'/'experiments'
    monkeypatch.setattr(runs, '_checkout', lambda: None)  # a wheel
    assert runs.experiments_dir() == Path(runs.__file__).parent/'experiments'


def test_resolve(tmp_path):
    experiment = Experiment(notebook(tmp_path/'n.ipynb'))
    got = resolve(experiment, {'lr': 1, 'seeds': [7]})
    assert got == {'alignment': 40, 'lr': 1., 'loss': 'nll', 'seeds': [7], 'rates': [.1, 1], 'debug': False, 'path': None}
    assert type(got['lr']) is float
    with pytest.raises(UsageError, match="n has no parameter 'alignmet'; did you mean 'alignment'\\? it has: alignment=40, lr=0.5, loss='nll'"):
        resolve(experiment, {'alignmet': 40})


def test_id():
    a = run_id('gmm', {'lr': .1, 'seeds': [0]})
    assert re.fullmatch('[0-9a-f]{8}', a) and a == run_id('gmm', {'seeds': [0], 'lr': .1})
    others = [run_id('images', {'lr': .1, 'seeds': [0]}), run_id('gmm', {'lr': .2, 'seeds': [0]}), run_id('gmm', {'lr': .1, 'seeds': [1]}),
              run_id('gmm', {'lr': .1, 'seeds': '[0]'}), run_id('gmm', {'lr': .1})]
    assert len({a, *others}) == 6


# ---- the run directory

def test_history(tmp_path):
    run, path = Run(tmp_path), tmp_path/'history.csv'
    assert run.history().empty
    run.log_row(seed=0, loss=torch.tensor(.5, requires_grad=True), name='a, "b"')
    run.log_row(loss=np.float64(.1), seed=np.int64(1))
    with path.open() as f: rows = list(csv.DictReader(f))
    assert rows == [{'seed': '0', 'loss': '0.5', 'name': 'a, "b"'}, {'seed': '1', 'loss': '0.1', 'name': ''}]
    with pytest.raises(ValueError, match="new column 'los': the first row of history.csv fixed the columns to seed, loss, name"): run.log_row(seed=1, los=.1)
    with pytest.raises(ValueError, match=r'loss must be a scalar, got \[1.0, 2.0\]'): run.log_row(loss=np.array([1., 2.]))
    with path.open('a') as f: f.write('2,0.')
    assert run.history()['seed'].tolist() == [0, 1] and path.read_text().endswith('2,0.')  # a reader changes nothing
    Run(tmp_path).log_row(seed=3, loss=1., name='c')
    assert run.history()['seed'].tolist() == [0, 1, 3]
    path.write_text('see')  # not even the header was whole
    run.log_row(a=1)
    assert path.read_text() == 'a\n1\n'


def test_metrics(tmp_path):
    run = Run(tmp_path)
    run.save_metrics({'a': np.float32(.5), 'b': torch.tensor([1., float('nan')]), 'c': [{'d': np.int64(2)}, float('inf')], 'e': None, 'f': True})
    assert not run.finished
    strict = json.loads((tmp_path/'.metrics.json').read_text(), parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))
    assert strict == {'a': .5, 'b': [1., None], 'c': [{'d': 2}, None], 'e': None, 'f': True}
    run.save_metrics(pd.DataFrame({'x': [1, 2]}))
    os.replace(tmp_path/'.metrics.json', tmp_path/'metrics.json')
    assert run.finished and run.metrics() == [{'x': 1}, {'x': 2}]
    for bad in (3, [1], 'x'):
        with pytest.raises(ValueError, match='metrics must be a dict, a list of dicts or a DataFrame'): run.save_metrics(bad)
    with pytest.raises(ValueError, match='f must be a number, text.*got PosixPath'): run.save_metrics({'f': tmp_path})


def test_tables_and_figures(tmp_path):
    from matplotlib.figure import Figure
    run = Run(tmp_path)
    df = pd.DataFrame({'loss': ['a', 'a', 'b'], 'acc': [1., 2., 4.]})
    run.save_table(df, 'plain')
    run.save_table(df.groupby('loss').agg({'acc': ['mean', 'count']}), 'grouped')
    run.save_figure(Figure(), 'fig.1')
    assert (tmp_path/'plain.csv').read_text() == 'loss,acc\na,1.0\na,2.0\nb,4.0\n'
    assert (tmp_path/'grouped.csv').read_text() == 'loss,acc mean,acc count\na,1.5,2\nb,4.0,1\n'
    assert (tmp_path/'fig.1.png').read_bytes().startswith(b'\x89PNG')
    text = runs.report(run)
    assert text.index('plain') < text.index('grouped') < text.index('fig.1.png')
    for bad in ('a/b', '.x', 'history', ''):
        with pytest.raises(ValueError, match='name must be letters'): run.save_table(df, bad)
    assert not list(tmp_path.glob('.*.tmp'))


def test_report_is_wide_and_falls_back_to_metrics(tmp_path):
    run = Run(tmp_path)
    row = {f'column_{i}': i/7 for i in range(40)}
    (tmp_path/'metrics.json').write_text(json.dumps([row]))
    text = runs.report(run)
    assert text.startswith('metrics\n') and len(text.splitlines()[1].split()) == 40 and '5.5714' in text
    run.save_table([{'text': 'x'*300}], 'long')
    assert 'metrics' not in runs.report(run) and 'x'*300 in runs.report(run)


def test_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path/'a.txt'
    runs._write(path, 'old')
    monkeypatch.setattr(os, 'replace', lambda *a: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'): runs._write(path, 'new')
    assert path.read_text() == 'old'


def test_this_run_by_hand_is_fresh(monkeypatch, tmp_path):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    monkeypatch.delenv('SOFTNCE_RUN_DIR', raising=False)
    a, b = this_run(), this_run()
    assert a.dir != b.dir and a.dir.parent == tmp_path and a.checkpoint_dir.is_dir()
    monkeypatch.setenv('SOFTNCE_RUN_DIR', str(a.dir))
    assert this_run() == a


def finished(folder, params, metrics):
    folder.mkdir(parents=True)
    (folder/'params.yaml').write_text(yaml.safe_dump(params))
    if metrics is not None: (folder/'metrics.json').write_text(json.dumps(metrics))


def test_collect(tmp_path, capsys):
    finished(tmp_path/'gmm'/'a', {'lr': .1, 'seed': 5}, [{'seed': 0, 'loss': 1.}, {'seed': 1, 'loss': None}])
    finished(tmp_path/'gmm'/'b', {'lr': .2, 'seed': 6}, {'seed': 0, 'loss': 3., 'id': 'x'})
    finished(tmp_path/'gmm'/'c', {'lr': .3, 'seed': 7}, None)
    finished(tmp_path/'gmm'/'d', {'lr': .4, 'seed': 7}, None)
    finished(tmp_path/'images'/'e', {'net': 'cnn', 'seed': 8}, [])
    Run(tmp_path/'gmm'/'c').log_row(seed=0, epoch=3)
    Run(tmp_path/'gmm'/'c').log_row(seed=0, epoch=4)
    df = collect(tmp_path)
    err = capsys.readouterr().err
    assert re.search(r'unfinished: .*gmm/c, last row: seed=0 epoch=4\n', err) and re.search(r'unfinished: .*gmm/d, last row: none\n', err)
    assert list(zip(df['experiment'], df['id'])) == [('gmm', 'a'), ('gmm', 'a'), ('gmm', 'b'), ('images', 'e')]
    assert df['param_seed'].tolist() == [5, 5, 6, 8] and df['seed'].tolist()[:3] == [0, 1, 0] and df['lr'].tolist()[:3] == [.1, .1, .2]
    assert df['metric_id'][2] == 'x' and df['net'][3] == 'cnn' and np.isnan(df['loss'][1])
    assert len(collect(tmp_path/'gmm')) == 3 and collect(tmp_path/'gmm'/'b')['loss'].tolist() == [3.]
    assert collect(tmp_path/'gmm'/'c').empty
    with pytest.raises(UsageError, match="there is no run in 'nowhere'"): collect('nowhere')


# ---- as a user calls it

def test_import_is_light():
    code = "import sys, softnce.runs.runs; print(sorted({'papermill', 'pandas', 'typer', 'matplotlib', 'yaml', 'nbformat', 'IPython'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '[]'


@pytest.mark.parametrize('error, code', [(UsageError('x'), 2), (RunFailed('x'), 1), (RunLocked('x'), 3), (KeyboardInterrupt(), 130), (runs.RunStopped(), 75)])
def test_exit_codes(error, code, capsys):
    with pytest.raises(SystemExit) as e, runs._exit_codes(): raise error
    assert e.value.code == code and capsys.readouterr().err == f"softnce: {str(error) or ('stopped' if code == 75 else 'interrupted')}\n"


def test_missing_extra():
    code = "import sys; sys.modules.update(typer=None, papermill=None); from softnce.runs.runs import main; main()"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 1 and 'missing: typer, papermill' in done.stderr and 'pip install softnce[nbs]' in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('args, message', [
    (['n.ipynb', '-p', 'alignmet=40'], "n has no parameter 'alignmet'; did you mean 'alignment'? it has: alignment=40"),
    (['n.ipynb', '-p', 'alignment=high'], "alignment must be int, like its default 40; got 'high' (str)"),
    (['n.ipynb', '-p', 'alignment'], "-p takes key=value, got 'alignment'"),
    (['zzz'], "there is no experiment 'zzz'; there are: ")])
def test_usage_errors(tmp_path, args, message):
    notebook(tmp_path/'n.ipynb')
    done = cli('run', *args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path/'runs').exists()


def test_list(tmp_path):
    done = cli('list', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for e in list_experiments():
        assert f'{e.name}  {e.subtitle}\n' in done.stdout
        for name, p in e.parameters.items():
            comment = f' .*# {re.escape(p.comment)}' if p.comment else ' *'
            assert re.search(rf'^ +{name} = {re.escape(repr(p.default))}{comment}$', done.stdout, re.M), f'{e.name}: {name}'


def test_list_shows_a_broken_experiment_and_the_others(tmp_path, monkeypatch, capsys):
    notebook(tmp_path/'a.ipynb', tags=()), notebook(tmp_path/'b.ipynb')
    monkeypatch.setattr(runs, 'experiments_dir', lambda: tmp_path)
    runs._list()
    out = capsys.readouterr().out
    assert 'a\n    cannot be run: a.ipynb needs exactly one cell' in out and re.search(r"b  A subtitle\n    alignment = 40 +# in percent\n", out)


WORK = ["import os, sys\nimport pandas as pd\nfrom matplotlib.figure import Figure\nfrom softnce.runs.runs import this_run\nrun = this_run()", '#md ## Training',
        "print('python', sys.executable, flush=True)\nprint('in', os.getcwd())\nprint('\\x1b[31mred\\x1b[0m')\nprint('1%\\r2%\\r3%')\nprint('half', end='')",
        '#md ## Results',
        "run.log_row(seed=0, epoch=0, split='valid', loss=lr)\nrun.save_table(pd.DataFrame({'loss': [loss], 'value': [alignment*lr]}), 'table1')\n"
        "run.save_figure(Figure(), 'figure1')\nrun.save_metrics([{'seed': s, 'split': 'valid', 'value': s+lr} for s in seeds])"]


def test_a_run_and_its_skip(tmp_path, monkeypatch, capsys):
    "Everything a finished run leaves, with a kernelspec and a path that lead elsewhere, in a folder with braces in its name."
    cwd = tmp_path/'some {0} folder'
    spec = tmp_path/'jupyter'/'kernels'/'python3'
    for d in (cwd, spec): d.mkdir(parents=True)
    (spec/'kernel.json').write_text(json.dumps({'argv': ['/bin/false', '{connection_file}'], 'display_name': 'x', 'language': 'python'}))
    notebook(cwd/'n.ipynb', *WORK)
    args = ('run', 'n.ipynb', '-p', 'lr=1e-1', '-p', 'seeds=[3, 4]')
    done = cli(*args, cwd=cwd, JUPYTER_PATH=str(tmp_path/'jupyter'), PATH='/usr/bin:/bin')
    assert done.returncode == 0, done.stdout+done.stderr
    resolved = {'alignment': 40, 'lr': .1, 'loss': 'nll', 'seeds': [3, 4], 'rates': [.1, 1], 'debug': False, 'path': None}
    folder = cwd/'runs'/'n'/run_id('n', resolved)
    label = f'run n {folder.name}'
    order = [f'{label}: 4 cells, in runs/n/{folder.name}\n', '[cell 3/4] Training\n', f'python {Path(sys.executable).parent}', f'in {cwd}\n', 'half\n[cell 4/4] Results\n',
             f'{label}: finished\n', 'table1\nloss  value\n nll      4\n', f'figure runs/n/{folder.name}/figure1.png\n', f'run    runs/n/{folder.name}\n']
    at = [done.stdout.find(o) for o in order]
    assert -1 not in at and at == sorted(at), (at, done.stdout)
    assert '\x1b' not in done.stdout and not done.stderr
    log = (folder/'log.txt').read_text()
    assert '\nred\n3%\nhalf\n' in log and '\x1b' not in log and re.search(r'\[\d{4}-\d\d-\d\d [\d:]{8}\] ' + label + ': finished', log)
    assert yaml.safe_load((folder/'params.yaml').read_text()) == resolved
    assert json.loads((folder/'metrics.json').read_text()) == [{'seed': s, 'split': 'valid', 'value': s+.1} for s in (3, 4)]
    env = json.loads((folder/'env.json').read_text())
    assert env['versions']['numpy'] == np.__version__ and env['versions']['softnce'] and {'commit', 'device', 'python', 'code'} <= set(env)
    cells = nbformat.read(folder/'notebook.ipynb', 4).cells
    assert all(c.execution_count for c in cells if c.cell_type == 'code')
    assert {p.name for p in folder.iterdir()} == {'params.yaml', 'env.json', 'log.txt', 'notebook.ipynb', 'metrics.json', 'history.csv', 'report.json',
                                                  'table1.csv', 'figure1.png', '.lock'}
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    again = cli(*args, cwd=cwd)  # skipped: nothing is written, the report is printed again
    assert again.returncode == 0 and f'{label}: already finished, skipped' in again.stdout and 'Training' not in again.stdout
    assert again.stdout.endswith(done.stdout[at[6]:]) and 'has changed' not in again.stdout
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    notebook(cwd/'n.ipynb', *WORK, '1+1')
    monkeypatch.chdir(cwd)
    run_experiment('n.ipynb', {'lr': .1, 'seeds': [3, 4]})  # from Python it is the same run
    assert f'note: n.ipynb has changed since this run; remove runs/n/{folder.name}' in capsys.readouterr().out
    table = cli('collect', 'runs', cwd=cwd)
    assert table.returncode == 0 and pd.read_csv(StringIO(table.stdout))['value'].tolist() == [3.1, 4.1] and 'value' in table.stderr
    runs._collect(folder, 'all.csv')
    assert pd.read_csv(cwd/'all.csv')['seed'].tolist() == [3, 4] and 'value' in capsys.readouterr().out


def test_a_failing_notebook(tmp_path):
    cells = ["from softnce.runs.runs import this_run\nrun = this_run()\nrun.save_metrics({'a': 1})", "x = 'before'\nprint(x)\nraise KeyError('boom')", "print('after')"]
    notebook(tmp_path/'n.ipynb', *cells)
    done = cli('run', 'n.ipynb', '--out', 'elsewhere', cwd=tmp_path)
    folder, = (tmp_path/'elsewhere'/'n').iterdir()
    assert done.returncode == 1 and not (folder/'metrics.json').exists()
    assert done.stdout.endswith('before\n'+f'run n {folder.name}: failed, no metrics.json; the same command resumes it\n')
    message = "n.ipynb, cell 3 of 4: KeyError: 'boom'\n\n    x = 'before'\n    print(x)\n    raise KeyError('boom')\n\n"
    assert done.stderr.startswith(f'softnce: {message}') and 'Traceback' in done.stderr and done.stderr.endswith("KeyError: 'boom'\n")
    log = (folder/'log.txt').read_text()
    assert 'before\n' in log and message in log and log.endswith("KeyError: 'boom'\n") and '\x1b' not in done.stderr+log
    partial = [c.execution_count for c in nbformat.read(folder/'notebook.ipynb', 4).cells if c.cell_type == 'code']
    assert partial == [1, 2, 3, None]


@pytest.mark.parametrize('cell, message', [("import sys\nsys.exit(0)", 'the notebook left early'), ("import os\nos.kill(os.getpid(), 9)", 'the kernel died')])
def test_a_notebook_that_ends_without_an_error(tmp_path, capsys, cell, message):
    notebook(tmp_path/'n.ipynb', cell, "print('after')")
    with pytest.raises(RunFailed, match=f'n.ipynb, cell 2 of 3: {message}\n\n    import'): run_experiment(tmp_path/'n.ipynb', {}, tmp_path/'runs')
    assert 'after' not in capsys.readouterr().out and not list(tmp_path.glob('runs/n/*/metrics.json'))


STEPS = ["import os, time\nfrom softnce.runs.runs import this_run\nrun = this_run()\n(run.checkpoint_dir/'kernel').write_text(str(os.getpid()))",
         "done = run.checkpoint_dir/'done'\nstart = int(done.read_text()) if done.exists() else 0\nprint('start', start, flush=True)\n"
         "for step in range(start, steps):\n    run.log_row(seed=0, epoch=step, split='train')\n    done.write_text(str(step+1))\n"
         "    try:\n        while step == 4 and not os.path.exists(gate): time.sleep(.02)\n"
         "    except KeyboardInterrupt: done.with_name('interrupted').touch(); raise",
         "run.save_metrics({'seed': 0, 'epoch': steps, 'split': 'train', 'start': start})"]


def test_kill_lock_interrupt_and_resume(tmp_path):
    "SIGKILL to runner and kernel; a second writer; SIGTERM; then the run is finished, in one directory and with one history."
    notebook(tmp_path/'n.ipynb', *STEPS, params="steps = 10  # a\ngate = ''  # b")
    gate = tmp_path/'open'
    args = ['run', 'n.ipynb', '-p', f'gate={gate}']
    folder = tmp_path/'runs'/'n'/run_id('n', {'steps': 10, 'gate': str(gate)})
    start = lambda: subprocess.Popen([SCRIPT, *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    epochs = lambda: Run(folder).history()['epoch'].tolist() if (folder/'history.csv').exists() else []
    at_gate = lambda: epochs() == [0, 1, 2, 3, 4] and (folder/'checkpoint'/'done').read_text() == '5'

    first = start()  # waits at step 4
    wait_for(at_gate)
    second = cli(*args, cwd=tmp_path)
    assert second.returncode == 3 and f'already being written by process {first.pid}' in second.stderr and 'Traceback' not in second.stderr
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate()
    assert first.returncode == 75 and 'stopped and unfinished; the same command resumes it' in out and err == 'softnce: stopped\n'
    assert not (folder/'metrics.json').exists()
    assert (folder/'checkpoint'/'interrupted').exists()  # the cell was told, and could save
    with lock(folder): pass  # the kernel is gone too

    (folder/'checkpoint'/'done').write_text('4')  # back to before the gate, as if the last checkpoint had been missed
    (folder/'history.csv').write_text('seed,epoch,split\n'+''.join(f'0,{e},train\n' for e in range(4)))
    third = start()
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
    assert epochs() == list(range(10)) and Run(folder).metrics() == [{'seed': 0, 'epoch': 10, 'split': 'train', 'start': 5}]
    assert [p.name for p in (tmp_path/'runs'/'n').iterdir()] == [folder.name]


STOP = ["import os, signal, time\nfrom softnce.runs.runs import this_run\nrun = this_run()\nrun.save_metrics({'a': 1})",
        "class StopRequested(Exception): pass\nfirst = not (run.checkpoint_dir/'seen').exists()\n(run.checkpoint_dir/'seen').write_text(str(os.getpid()))",
        "if first and how == 'fit': raise StopRequested('step 5')\n"
        "if first and how == 'kernel': os.kill(os.getpid(), signal.SIGTERM)\n"
        "if first and how == 'dies':\n    signal.signal(signal.SIGTERM, signal.SIG_DFL)\n    (run.checkpoint_dir/'ready').touch()\n    time.sleep(300)"]


def test_a_kernel_that_does_not_close(tmp_path):
    "After the last cell the result counts; a kernel that hangs on its way out is ended, without a traceback."
    notebook(tmp_path/'n.ipynb', "import time\nfrom ipykernel.kernelapp import IPKernelApp\nIPKernelApp.instance().iopub_thread.thread.join = lambda timeout: time.sleep(600)",
             "from softnce.runs.runs import this_run\nthis_run().save_metrics({'value': 1})")
    done = cli('run', 'n.ipynb', cwd=tmp_path)
    assert done.returncode == 0 and ': finished' in done.stdout and not done.stderr, done.stdout+done.stderr


@pytest.mark.parametrize('how', ['fit', 'kernel'])
def test_a_stopped_cell_is_no_failure(tmp_path, capsys, how):
    notebook(tmp_path/'n.ipynb', *STOP, params="how = 'fit'  # how it stops")
    with pytest.raises(runs.RunStopped): run_experiment(tmp_path/'n.ipynb', {'how': how}, tmp_path/'runs')
    folder, = (tmp_path/'runs'/'n').iterdir()
    assert not (folder/'metrics.json').exists() and 'stopped and unfinished; the same command resumes it' in capsys.readouterr().out
    assert run_experiment(tmp_path/'n.ipynb', {'how': how}, tmp_path/'runs').metrics() == [{'a': 1}]


def test_a_kernel_that_dies_of_the_stop_signal(tmp_path):
    notebook(tmp_path/'n.ipynb', *STOP, params="how = 'fit'  # how it stops")
    args, ready = ['run', 'n.ipynb', '-p', 'how=dies'], tmp_path/'runs'/'n'/run_id('n', {'how': 'dies'})/'checkpoint'/'ready'
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


FULL = ["from softnce.runs.runs import this_run\nrun = this_run()\nrun.log_row(seed=0)", "if not (run.dir/'room').exists(): open('/dev/full', 'w').write('x'*100000)",
        "run.save_metrics({'a': 1})"]


def test_a_full_disk_under_the_notebook(tmp_path):
    "/dev/full fails every write as a full disk does: the message says what to do, and with room again the run goes on."
    notebook(tmp_path/'n.ipynb', *FULL)
    with pytest.raises(RunFailed, match=r'n.ipynb, cell 3 of 4: OSError: \[Errno 28\] No space left on device\n\nNo space is left for .*: free some, or give another folder with --out'):
        run_experiment(tmp_path/'n.ipynb', {}, tmp_path/'runs')
    folder, = (tmp_path/'runs'/'n').iterdir()
    assert not (folder/'metrics.json').exists()
    (folder/'room').touch()
    assert run_experiment(tmp_path/'n.ipynb', {}, tmp_path/'runs').metrics() == [{'a': 1}]


@pytest.mark.parametrize('name', ['params.yaml', 'env.json', 'metrics.json', 'notebook.ipynb'])
def test_a_full_disk_under_the_runner(tmp_path, monkeypatch, capsys, name):
    "Whichever file the disk is full at: exit code 1, one message, nothing half-written, and then the run is finished."
    notebook(tmp_path/'n.ipynb', "from softnce.runs.runs import this_run\nrun = this_run()", "run.save_metrics({'a': 1})")
    real, failed = os.replace, []
    def full(src, dst):
        if Path(dst).name == name and not failed: failed.append(dst); raise OSError(28, 'No space left on device', str(dst))
        return real(src, dst)
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(SystemExit) as e, runs._exit_codes(): run_experiment(tmp_path/'n.ipynb', {}, tmp_path/'runs')
    assert e.value.code == 1 and failed and not list(tmp_path.glob('runs/*/*/metrics.json'))
    assert re.fullmatch(f'softnce: No space is left for .*{name}: free some, .* The same command then resumes the run.\n', capsys.readouterr().err)
    assert run_experiment(tmp_path/'n.ipynb', {}, tmp_path/'runs').metrics() == [{'a': 1}]


def test_restart_after_a_change_of_code(tmp_path, capsys):
    "Text and outputs do not count; code does, and only when asked the run is set aside, finished or not."
    cells = ["from softnce.runs.runs import this_run\nrun = this_run()", "(run.checkpoint_dir/'seen').touch()\nrun.save_metrics({'a': 1})"]
    path = notebook(tmp_path/'n.ipynb', *cells)
    first = run_experiment(path, {}, tmp_path/'runs')
    notebook(path, '#md A new text', *cells)
    assert run_experiment(path, {}, tmp_path/'runs', restart=True).metrics() == [{'a': 1}] and not (tmp_path/'runs'/'n'/'.changed').exists()
    notebook(path, cells[0], "assert not (run.checkpoint_dir/'seen').exists(), 'an old checkpoint'\nrun.save_metrics({'a': 2})")
    assert run_experiment(path, {}, tmp_path/'runs').metrics() == [{'a': 1}] and 'n.ipynb has changed since this run' in capsys.readouterr().out
    (first.dir/'metrics.json').unlink()  # unfinished, and of other code
    with pytest.raises(RunFailed, match='an old checkpoint'): run_experiment(path, {}, tmp_path/'runs')
    assert 'n.ipynb has changed since this run' not in capsys.readouterr().out.splitlines()[-1]
    (first.dir/'env.json').write_text(json.dumps({'code': 'old'}))
    assert run_experiment(path, {}, tmp_path/'runs', restart=True).metrics() == [{'a': 2}]
    aside, = (tmp_path/'runs'/'n'/'.changed').iterdir()
    assert (aside/'checkpoint'/'seen').exists() and aside.name.startswith(first.dir.name) and len(collect(tmp_path/'runs')) == len(collect(tmp_path/'runs'/'n')) == 1


def test_waiting_for_another_writer(tmp_path):
    "A second process waits, and finds the run finished: it ran once."
    notebook(tmp_path/'n.ipynb', "import time\nfrom softnce.runs.runs import this_run\nrun = this_run()\nrun.log_row(seed=0)\n(run.checkpoint_dir/'ready').touch()",
             "while not gate or not __import__('os').path.exists(gate): time.sleep(.05)\nrun.save_metrics({'a': 1})", params="gate = ''  # a file")
    gate = tmp_path/'open'
    args, folder = ['run', 'n.ipynb', '-p', f'gate={gate}'], tmp_path/'runs'/'n'/run_id('n', {'gate': str(gate)})
    start = lambda *more: subprocess.Popen([SCRIPT, *args, *more], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    first = start()
    wait_for((folder/'checkpoint'/'ready').exists)
    second = start('--wait')
    assert second.stdout.readline() == f'waiting: runs/n/{folder.name} is already being written by process {first.pid} on {runs.socket.gethostname()}\n'
    gate.touch()
    assert first.wait() == 0 and second.communicate()[0].count('[cell') == 0 and second.returncode == 0
    assert len(Run(folder).history()) == 1 and (folder/'log.txt').read_text().count(': finished') == 1


def test_requeue(tmp_path, monkeypatch):
    "In a Slurm job, a stopped run asks for its job to be put back; a failure does not, nor does anything outside Slurm."
    asked = []
    monkeypatch.setattr(runs, '_output', lambda *cmd: asked.append(cmd))  # None: scontrol refused, so there is nothing to wait for
    for job, error in (('12', runs.RunStopped), ('12', RunFailed), (None, runs.RunStopped)):
        monkeypatch.setenv('SLURM_JOB_ID', job) if job else monkeypatch.delenv('SLURM_JOB_ID')
        with pytest.raises(error), runs._requeued(True): raise error()
    assert asked == [('scontrol', 'requeue', '12')]


# ---- the experiments of this checkout

def test_experiment_parameters():
    "Every experiment: one cell tagged `parameters`, plain literals, one assignment a line; most of them with a comment."
    assert list_experiments()
    for experiment in list_experiments():
        found = experiment.parameters
        assert found and experiment.subtitle, experiment.name
        source, = experiment.tagged('parameters')
        lines = [node.lineno for node in ast.parse(source).body]
        assert len(set(lines)) == len(lines) == len(found), experiment.name
        commented = [bool(p.comment) for p in found.values()]
        assert sum(commented) >= len(commented)/3, f'{experiment.name}: {sum(commented)} of {len(commented)} parameters have a comment'
        assert resolve(experiment, {}) == {k: p.default for k, p in found.items()}
