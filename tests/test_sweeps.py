"softnce.sweeps: grids, the runs behind a figure, and many runs with failures, sharing and stop signals."
import json, os, re, signal, subprocess, sys, threading, time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import softnce.sweeps as sweeps
from softnce.runs import RunFailed, RunStopped, UsageError, run_experiment, run_id
from softnce.sweeps import grid, needs, run_all, run_dir, runs_root


def experiment(path, params, *cells, runs=None):
    "A small experiment; `runs` becomes its cell tagged so."
    made = [new_markdown_cell('# Test\n\n> A subtitle'), new_code_cell(params, metadata={'tags': ['parameters']})]
    made += [new_code_cell(c) for c in cells]
    if runs: made.insert(3, new_code_cell(runs, metadata={'tags': ['runs']}))  # after the imports
    nbformat.write(new_notebook(cells=made), path)
    return path


START = "from softnce.runs import this_run\nrun = this_run()"
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
    assert runs_root() == Path(__file__).parents[1]/'runs'  # a notebook by hand, in nbs/experiments
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
        experiment(tmp_path/f'{name}.ipynb', f"xs = {xs}  # points", START+"\nfrom softnce.sweeps import grid, run_all",
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
    figure = experiment(tmp_path/'figure.ipynb', "xs = [1]  # xs", START+"\nfrom softnce.sweeps import grid, run_all", f"df = run_all({str(inner)!r}, needs['i'])",
                        runs="needs = {'i': grid(x=xs)}")
    command = [sys.executable, '-c', 'from softnce.runs import main; main()', 'run', str(figure), '--out', str(tmp_path/'runs')]
    ready = tmp_path/'runs'/'inner'/run_id('inner', {'x': 1})/'checkpoint'/'ready'
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic()+240
        while not ready.exists(): assert time.monotonic() < end and process.poll() is None; time.sleep(.05)
        process.terminate()
        assert process.wait() == 75
    assert ready.with_name('told').exists() and not list(tmp_path.glob('runs/*/*/metrics.json'))
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0 and len(list(tmp_path.glob('runs/*/*/metrics.json'))) == 2
