"softnce.runs.pages and the report of a run: what is tagged is shown, without code, and a failure undoes nothing."
import time

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from small_experiments import PARAMS

from softnce.runs import pages
from softnce.runs.execute import run_experiment

PICTURE = ("import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(1, 1)); ax.plot([0, 1])\n"
           "import sys; print('to be seen'); print('a warning', file=sys.stderr)")


def experiment(path, tags=('report',)):
    "A notebook whose last two cells are its report."
    tagged = dict(metadata=dict(tags=list(tags)))
    cells = [new_markdown_cell('# Test\n\n> A subtitle'), new_code_cell(PARAMS, metadata=dict(tags=['parameters'])),
             new_code_cell("print('not to be seen')"), new_markdown_cell('## What & why: $x_1$', **tagged),
             new_code_cell(PICTURE, **tagged)]
    nbformat.write(new_notebook(cells=cells), path)
    return str(path)


def test_a_run_leaves_its_report(tmp_path):
    run = run_experiment(experiment(tmp_path/'n.ipynb'), out_dir=tmp_path/'runs')
    text = (run.dir/'report.html').read_text()
    for seen in (f'<h1>n {run.dir.name}</h1>', 'What &amp; why', 'to be seen', 'src="data:image/png;base64,'):
        assert seen in text, seen
    for hidden in ('not to be seen', 'plt.subplots', 'a warning', 'http://', 'https://'):
        assert hidden not in text, hidden
    start = time.monotonic()
    pages.write_page(run)
    assert time.monotonic()-start < 3


def test_no_tags_no_report(tmp_path):
    run = run_experiment(experiment(tmp_path/'n.ipynb', tags=()), out_dir=tmp_path/'runs')
    assert run.finished and not (run.dir/'report.html').exists()


def test_a_report_that_fails_undoes_nothing(tmp_path, monkeypatch, capsys):
    def broken(*args): raise ImportError('no nbconvert')
    monkeypatch.setattr(pages, 'page', broken)
    run = run_experiment(experiment(tmp_path/'n.ipynb'), out_dir=tmp_path/'runs')
    assert run.finished and 'no report.html: ImportError: no nbconvert' in capsys.readouterr().out
    assert 'no report.html' in (run.dir/'log.txt').read_text() and not list(run.dir.glob('*report.html*'))
