"softnce.runs.changes: what a run remembers, what has changed since, and runs that do not belong in one table."
import json

import pytest
from small_experiments import START, cli, notebook

import softnce.runs.changes as changes
from softnce.runs.changes import made_by, maker, mixed, package_code, with_earlier
from softnce.runs.execute import RunFailed, run_experiment
from softnce.runs.experiment import Experiment, find_experiment
from softnce.runs.run import Run
from softnce.runs.values import UsageError

WORK = [START, "from softnce.runs import fingerprint\npreflight = dict(data=fingerprint(data))",
        "if fails: raise ZeroDivisionError\nrun.save_metrics({'nll': len(open(data).read())})"]


def experiment(path, *more, begin=START):
    "An experiment that counts the letters of its data, which a cell tagged `preflight` names."
    import nbformat
    notebook(path, begin, *WORK[1:], *more, params="data = 'votes.csv'\nfails = False")
    nb = nbformat.read(path, 4)
    nb.cells[3].metadata['tags'] = ['preflight']
    nbformat.write(nb, path)
    return path


# ---- the code of the package

def modules(*cells): return set(changes._reached(m for c in cells for m in changes._cell_imports(c)))


def test_the_modules_behind_a_notebook():
    assert modules('from softnce.runs import this_run, grid', 'import torch, json') == set()
    assert modules('from softnce.runs import at_best_rate') == {'softnce.runs.ledgers'}
    assert modules('from softnce.targets import smooth') == {'softnce.targets', 'softnce.sparse'}
    by_name = modules('from softnce import smooth')
    assert {'softnce', 'softnce.targets'} <= by_name and 'softnce.losses' not in by_name
    training = modules('%matplotlib inline\nfrom softnce.training import TrainConfig\n!ls')
    assert 'softnce.training.config' in training and 'softnce.graphs.tissue' not in training
    whole = modules('import softnce.training as t')
    assert {'softnce.training.loop', 'softnce.losses', 'softnce.contrast.sums'} <= whole
    assert {'softnce.training.loop'} <= modules('def f():\n    from softnce.training.loop import fit')


def test_prose_does_not_count(tmp_path, monkeypatch):
    "Comments, docstrings and blank lines are not code; a constant is."
    path = tmp_path/'m.py'
    n = Experiment(notebook(tmp_path/'n.ipynb', 'import softnce.m'))
    monkeypatch.setattr(changes, '_modules', lambda: {'softnce.m': path})
    def code(text):
        for f in ('_tree', '_code_of', '_exported', '_hash_of'): getattr(changes, f).cache_clear()
        path.write_text(text)
        return package_code(n)
    try:
        first = code('"""Old."""\nx = 1\ndef f(a):\n    "What it was."\n    return a+x\n')
        assert first == code('# new\n__doc__ = """New."""\nx = 1  # one\n\ndef f(a):\n    return a + x\n')
        assert first != code('x = 2\ndef f(a):\n    return a+x\n')
    finally:
        monkeypatch.undo()
        for f in ('_tree', '_code_of', '_exported', '_hash_of'): getattr(changes, f).cache_clear()


# ---- what has changed

def test_other_data_is_refused_until_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = experiment(tmp_path/'n.ipynb')
    (tmp_path/'votes.csv').write_text('abc')
    first = run_experiment(path)
    assert made_by(first)[-1]['data'] == {str(tmp_path/'votes.csv'): '3 bytes, ba7816bf8f01'}  # SHA-256 of abc
    assert run_experiment(path).metrics() == [{'nll': 3}]
    (tmp_path/'votes.csv').write_text('abcd')
    done = cli('run', 'n.ipynb', cwd=tmp_path)
    message = ('softnce: the data of runs/n/{} has changed: {}: 3 bytes, ba7816bf8f01 -> 4 bytes, 88d4266fd4e6; '
               '--restart makes the run again, and keeps what it had in .changed/\n')
    assert done.returncode == 2 and done.stderr == message.format(first.dir.name, tmp_path/'votes.csv')
    (first.dir/'metrics.json').unlink()  # unfinished: it is not resumed on other data either
    with pytest.raises(UsageError, match='has changed: .* 3 bytes'): run_experiment(path)
    assert run_experiment(path, restart=True).metrics() == [{'nll': 4}]
    assert len(list((tmp_path/'runs'/'n'/'.changed').iterdir())) == 1
    assert 'changed: its data; ' in capsys.readouterr().out
    (tmp_path/'votes.csv').rename(tmp_path/'gone.csv')  # a finished run is shown without its data
    assert run_experiment(path).metrics() == [{'nll': 4}]
    assert 'note: its data cannot be compared any more: n: there is no file' in capsys.readouterr().out


def test_other_code_of_the_package_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = experiment(tmp_path/'n.ipynb')
    (tmp_path/'votes.csv').write_text('abc')
    run = run_experiment(path)
    for module, word in (({'package': 'old'}, 'the code of softnce has'), ({'code': 'old'}, 'n.ipynb has'),
                         ({'code': 'old', 'package': 'old'}, 'n.ipynb and the code of softnce have')):
        env = json.loads((run.dir/'env.json').read_text())
        (run.dir/'env.json').write_text(json.dumps(env | module))
        capsys.readouterr()
        assert run_experiment(path).metrics() == [{'nll': 3}]
        said = capsys.readouterr().out
        assert f'note: {word} changed since this run; remove runs/n/{run.dir.name} to run it from scratch, ' in said
        assert '--restart' in said
        (run.dir/'env.json').write_text(json.dumps(env))
    assert 'changed since' not in cli('run', 'n.ipynb', cwd=tmp_path).stdout


def test_a_run_of_before_remembers_less(tmp_path, monkeypatch, capsys):
    "An env.json without package and data, or none at all: nothing is said to have changed."
    monkeypatch.chdir(tmp_path)
    path = experiment(tmp_path/'n.ipynb')
    (tmp_path/'votes.csv').write_text('abc')
    run = run_experiment(path)
    env = json.loads((run.dir/'env.json').read_text())
    (run.dir/'env.json').write_text(json.dumps({k: v for k, v in env.items() if k not in ('package', 'data')}))
    run_experiment(path)
    (run.dir/'env.json').unlink()
    run_experiment(path)
    assert 'changed' not in capsys.readouterr().out


@pytest.mark.parametrize('name, content, message', [
    ('metrics.json', '[{"nll": 3', r'metrics.json is damaged \(not JSON: '),
    ('metrics.json', '7', 'not a dict or a list of dicts'), ('metrics.json', b'\xff\xfe', 'metrics.json is damaged'),
    ('params.yaml', '', r'params.yaml is damaged \(must hold a mapping'),
    ('params.yaml', 'data: [', r'params.yaml is damaged \(is not YAML'),
    ('report.json', '[]', 'report.json is damaged'),
    ('params.yaml', 'data: votes.csv\nfails: true\n', r'is not what this run was asked for \(fails: True -> False\)'),
    ('env.json', '{', 'env.json is damaged')])
def test_a_damaged_file_is_named(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    path = experiment(tmp_path/'n.ipynb')
    (tmp_path/'votes.csv').write_text('abc')
    run = run_experiment(path)
    (run.dir/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=f'(?s)runs/n/{run.dir.name}/{name}.*; --restart makes the run again') as e:
        run_experiment(path)
    with pytest.raises(UsageError, match=message): run_experiment(path)
    assert len(str(e.value).splitlines()) <= 2
    assert run_experiment(path, restart=True).metrics() == [{'nll': 3}]


def test_a_run_that_other_code_resumed(tmp_path):
    run = Run(tmp_path/'runs'/'n'/'a')
    run.dir.mkdir(parents=True)
    a, b = ({'code': c, 'package': 'p', 'data': None} for c in 'ab')
    (run.dir/'env.json').write_text(json.dumps(a))
    assert with_earlier(run, b) == b  # it had left nothing to go on from
    run.log_row(epoch=1)
    assert with_earlier(run, a) == a and with_earlier(run, b) == {**b, 'earlier': [a]}
    (run.dir/'env.json').write_text(json.dumps(with_earlier(run, b)))
    assert made_by(run) == [a, b] and with_earlier(run, a)['earlier'] == [b]
    assert mixed([run]) == {'n': 'the notebook in 2 versions (a: 1 run, b: a)'}


def test_it_is_kept_by_the_runner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'votes.csv').write_text('abc')
    path = experiment(tmp_path/'n.ipynb', 'raise KeyError', begin=START+"\nrun.log_row(epoch=1)")
    with pytest.raises(RunFailed): run_experiment(path)
    run = run_experiment(experiment(tmp_path/'n.ipynb'))
    assert len(made_by(run)) == 2 and made_by(run)[1]['code'] == find_experiment(str(path)).code_hash


# ---- a table

def test_what_is_mixed(tmp_path):
    def run(name, id, **env):
        folder = tmp_path/name/id
        folder.mkdir(parents=True)
        (folder/'env.json').write_text(json.dumps(env))
        return Run(folder)
    a = run('n', 'a', code='1', package='p', data={'/x': '3 bytes'})
    b = run('n', 'b', code='1', package='p', data={'/y': '4 bytes'})  # of another root: other data is no wonder
    c = run('n', 'c', code='1')                                       # of before
    d = run('m', 'd', code='2', package='q')                          # of another experiment
    assert mixed([a, b, c, d]) == {} and maker(a) != maker(b) and maker(a) == maker(run('n', 'a2', **json.loads(
        (a.dir/'env.json').read_text())))
    e, f, g = run('n', 'e', code='2'), run('n', 'f', package='q'), run('n', 'g', data={'/x': '5 bytes'})
    for other, word in ((e, 'the notebook in 2'), (f, 'the code of softnce in 2'), (g, 'the data in /x in 2')):
        assert mixed([a, b, other])['n'].startswith(word)
