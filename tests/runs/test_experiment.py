"softnce.runs.experiment: parameters, their types, names, ids, and the experiments of this checkout."
import ast, re
from pathlib import Path

import pytest
from small_experiments import REPO, notebook

import softnce.runs.experiment as experiment
from softnce.runs.execute import run_experiment
from softnce.runs.experiment import Experiment, find_experiment, list_experiments, read_parameters, resolve, run_id
from softnce.runs.values import UsageError, parse_overrides


def test_read_parameters():
    got = read_parameters("# the size\nn = -3  # points\nxs = [1,\n      2]  # two lines\ns = 'a # b'\n")
    want = {'n': (-3, 'points'), 'xs': ([1, 2], 'two lines'), 's': ('a # b', '')}
    assert {k: tuple(p) for k, p in got.items()} == want


@pytest.mark.parametrize('source', [
    'n = 2*3', 'import os', 'n: int = 3', 'a = b = 1', 'a, b = 1, 2', 'print(1)', 'x = (1, 2)', 'x = {}', "'text'",
    'n += 1', 'x.y = 1', 'f = lambda: 1'])
def test_read_parameters_refuses(source):
    line = re.escape(ast.unparse(ast.parse(source).body[0]))
    with pytest.raises(UsageError, match=r"must hold lines like `name = literal`.* got: "+line): read_parameters(source)


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
    monkeypatch.setattr(experiment, 'experiments_dir', lambda: tmp_path)
    assert [e.name for e in list_experiments()] == ['gmm', 'images', 'noise_samples']
    assert find_experiment('gmm') == Experiment(tmp_path/'gmm.ipynb')
    assert find_experiment('gmm').subtitle == 'A subtitle'
    message = "no experiment 'image'; did you mean 'images'\\? there are: gmm, images, noise_samples"
    with pytest.raises(UsageError, match=message): find_experiment('image')
    with pytest.raises(UsageError, match="no experiment 'qqq'; there are: gmm"): find_experiment('qqq')


def test_where_experiments_are(monkeypatch):
    assert experiment.experiments_dir() == REPO/'nbs'/'experiments'
    monkeypatch.setattr(experiment, 'checkout', lambda: None)  # a wheel
    assert experiment.experiments_dir() == Path(experiment.__file__).parents[1]/'experiments'


def test_resolve(tmp_path):
    n = Experiment(notebook(tmp_path/'n.ipynb'))
    got = resolve(n, {'lr': 1, 'seeds': [7]})
    want = {'alignment': 40, 'lr': 1., 'loss': 'nll', 'seeds': [7], 'rates': [.1, 1], 'debug': False, 'path': None}
    assert got == want and type(got['lr']) is float
    message = "n has no parameter 'alignmet'; did you mean 'alignment'\\? it has: alignment=40, lr=0.5, loss='nll'"
    with pytest.raises(UsageError, match=message): resolve(n, {'alignmet': 40})


def test_id():
    a = run_id('gmm', {'lr': .1, 'seeds': [0]})
    assert re.fullmatch('[0-9a-f]{8}', a) and a == run_id('gmm', {'seeds': [0], 'lr': .1})
    asked = {'lr': .2, 'seeds': [0]}, {'lr': .1, 'seeds': [1]}, {'lr': .1, 'seeds': '[0]'}, {'lr': .1}
    assert len({a, run_id('images', {'lr': .1, 'seeds': [0]}), *(run_id('gmm', o) for o in asked)}) == 6


def test_one_value_is_one_run(tmp_path):
    "However it is written; and a default that is given by name."
    params = "a = .5\nb = None\nc = [.1, 1]\nd = 'no'\ne = ['8', 'x']\nf = True"
    n = Experiment(notebook(tmp_path/'n.ipynb', params=params))
    def id(*pairs): return run_id('n', resolve(n, parse_overrides(list(pairs), n.parameters)))
    assert id() == id('a=.5', 'b=null', 'c=[.1, 1]', 'd=no', 'e=[8, x]', 'f=true')
    assert id() == id('a=5e-1', 'c=[0.10, 1.0]', 'f=yes')
    for name in 'ab': assert id(f'{name}=1e-3') == id(f'{name}=0.001') == id(f'{name}=.001') != id()
    assert id('c=[1e-3, 1]') == id('c=[0.001, 1.0]') != id()


def test_ranges_stand_in_the_comments(tmp_path):
    n = Experiment(notebook(tmp_path/'n.ipynb', params="lr = .5  # [float > 0] step\nk = None  # [int >= 1, <= 9]"))
    assert resolve(n, {'k': 9}) == {'lr': .5, 'k': 9} and n.parameters['lr'].comment == '[float > 0] step'
    k = 'k must be int >= 1, <= 9; got '
    wrong = ({'lr': 0}, r'^lr must be float > 0; got 0\.0$'), ({'k': 10}, k+'10'), ({'k': 'x'}, k+"'x'")
    for given, message in wrong:
        with pytest.raises(UsageError, match=message): resolve(n, given)


def test_an_id_is_what_it_was():
    "Runs of years ago are found by it: the first eight digits of the SHA-256 of the JSON text."
    assert run_id('coin', {'steps': 6, 'lr': .5}) == '4c871d8e'
    assert run_id('gmm', {'seeds': [0, 1], 'name': None, 'full': True}) == 'ff14b75e'


def test_a_parameter_added_later_leaves_ids_as_they_were(tmp_path):
    "Its default is no part of the id, any other value is; one without the mark always is."
    n = Experiment(tmp_path/'coin.ipynb')
    def id(source, **asked):
        notebook(n.path, params=source)
        return run_id(n, resolve(n, asked))
    before = 'steps = 6\nlr = .5\n'
    assert id(before) == id(before+'k = None # why; added later') == '4c871d8e'
    assert len({'4c871d8e', id(before+'k = None # why'), id(before+'k = None # added later', k=2)}) == 3


def test_experiment_parameters():
    "Every experiment: one cell tagged `parameters`, plain literals, one assignment a line; many with a comment."
    assert list_experiments()
    for e in list_experiments():
        found = e.parameters
        assert found and e.subtitle, e.name
        source, = e.tagged('parameters')
        lines = [node.lineno for node in ast.parse(source).body]
        assert len(set(lines)) == len(lines) == len(found), e.name
        commented = [name for name, p in found.items() if p.comment]
        assert len(commented) >= len(found)/3, f'{e.name}: of {len(found)} parameters only {commented} have a comment'
        assert resolve(e, {}) == {k: p.default for k, p in found.items()}
