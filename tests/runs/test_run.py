"softnce.runs.run: the run directory, and files that survive a kill."
import csv, json, os

import numpy as np
import pandas as pd
import pytest
import torch

from softnce.runs.run import Run, begin_attempt, finish, this_run, write_atomically


def test_history(tmp_path):
    run, path = Run(tmp_path), tmp_path/'history.csv'
    assert run.history().empty
    run.log_row(seed=0, loss=torch.tensor(.5, requires_grad=True), name='a, "b"')
    run.log_row(loss=np.float64(.1), seed=np.int64(1))
    with path.open() as f: rows = list(csv.DictReader(f))
    assert rows == [{'seed': '0', 'loss': '0.5', 'name': 'a, "b"'}, {'seed': '1', 'loss': '0.1', 'name': ''}]
    message = "new column 'los': the first row of history.csv fixed the columns to seed, loss, name"
    with pytest.raises(ValueError, match=message): run.log_row(seed=1, los=.1)
    with pytest.raises(ValueError, match=r'loss must be a scalar, got \[1.0, 2.0\]'):
        run.log_row(loss=np.array([1., 2.]))
    with path.open('a') as f: f.write('2,0.')
    assert run.history()['seed'].tolist() == [0, 1] and path.read_text().endswith('2,0.')  # a reader changes nothing
    Run(tmp_path).log_row(seed=3, loss=1., name='c')
    assert run.history()['seed'].tolist() == [0, 1, 3]
    path.write_text('see')  # not even the header was whole
    run.log_row(a=1)
    assert path.read_text() == 'a\n1\n'


def test_metrics(tmp_path):
    run = Run(tmp_path)
    nan, inf = float('nan'), float('inf')
    b, c = torch.tensor([1., nan]), [{'d': np.int64(2)}, inf]
    run.save_metrics({'a': np.float32(.5), 'b': b, 'c': c, 'e': None, 'f': True})
    assert not run.finished
    no_json = lambda c: pytest.fail(f'{c} is not JSON')
    strict = json.loads((tmp_path/'.metrics.json').read_text(), parse_constant=no_json)
    assert strict == {'a': .5, 'b': [1., None], 'c': [{'d': 2}, None], 'e': None, 'f': True}
    run.save_metrics(pd.DataFrame({'x': [1, 2]}))
    os.replace(tmp_path/'.metrics.json', tmp_path/'metrics.json')
    assert run.finished and run.metrics() == [{'x': 1}, {'x': 2}]
    message = 'metrics must be a dict, a list of dicts or a DataFrame'
    for bad in (3, [1], 'x'):
        with pytest.raises(ValueError, match=message): run.save_metrics(bad)
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
    assert json.loads((tmp_path/'report.json').read_text()) == {'tables': ['plain', 'grouped'], 'figures': ['fig.1']}
    for bad in ('a/b', '.x', 'history', ''):
        with pytest.raises(ValueError, match='name must be letters'): run.save_table(df, bad)
    assert not list(tmp_path.glob('.*.tmp'))


def test_attempts(tmp_path):
    "The next attempt keeps what the notebook resumes from; a finished notebook without a result has no rows."
    run = Run(tmp_path)
    begin_attempt(run)  # the first one finds nothing
    run.save_metrics({'a': 1})
    run.save_table([{'a': 1}], 'old')
    (tmp_path/'history.csv').write_text('a\n1\n2')
    (run.checkpoint_dir/'state').touch()
    begin_attempt(run)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint', 'history.csv', 'old.csv']
    assert (tmp_path/'history.csv').read_text() == 'a\n1\n' and (run.checkpoint_dir/'state').exists()
    finish(run)
    assert (tmp_path/'metrics.json').read_text() == '[]\n' and not (tmp_path/'.metrics.json').exists()


def test_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path/'a.txt'
    write_atomically(path, 'old')
    monkeypatch.setattr(os, 'replace', lambda *a: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'): write_atomically(path, 'new')
    assert path.read_text() == 'old'


def test_this_run_by_hand_is_fresh(monkeypatch, tmp_path):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    monkeypatch.delenv('SOFTNCE_RUN_DIR', raising=False)
    a, b = this_run(), this_run()
    assert a.dir != b.dir and a.dir.parent == tmp_path and a.checkpoint_dir.is_dir()
    monkeypatch.setenv('SOFTNCE_RUN_DIR', str(a.dir))
    assert this_run() == a
