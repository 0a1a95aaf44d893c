"softnce.runs.preflight: what is said before a run, in one line, without a folder left behind, within seconds."
import os, subprocess, sys, time
from collections import namedtuple
from pathlib import Path

import nbformat
import pytest
from small_experiments import START, cli, notebook

import softnce.runs.preflight as preflight
from softnce.runs.execute import run_experiment
from softnce.runs.experiment import list_experiments
from softnce.runs.preflight import check_run, fingerprint
from softnce.runs.run import Run
from softnce.runs.values import UsageError

PARAMS = "rows = 10  # [int >= 1]\nroot = '.'"


def experiment(folder, cell, params=PARAMS):
    path = notebook(folder/'n.ipynb', START, cell, "run.save_metrics({'a': 1})", params=params)
    nb = nbformat.read(path, 4)
    nb.cells[3].metadata['tags'] = ['preflight']
    nbformat.write(nb, path)
    return path


# ---- the data

def test_a_fingerprint_changes_with_the_data(tmp_path):
    (tmp_path/'a').mkdir()
    for i in range(3): (tmp_path/'a'/f'{i}.jpg').write_bytes(b'x'*i)
    (tmp_path/'labels.csv').write_text('0,1')
    see = lambda **kw: fingerprint(tmp_path, **kw)[str(tmp_path)]
    first = see()
    assert first.startswith('4 files, 6 bytes, ') and first == see()
    (tmp_path/'.DS_Store').write_text('hidden')
    (tmp_path/'.cache').mkdir()
    (tmp_path/'.cache'/'x').write_text('hidden')
    assert see() == first
    os.utime(tmp_path/'a'/'1.jpg', (0, 0))
    touched = see()
    (tmp_path/'a'/'1.jpg').rename(tmp_path/'a'/'7.jpg')
    renamed = see()
    (tmp_path/'a'/'7.jpg').write_bytes(b'xy')
    os.utime(tmp_path/'a'/'7.jpg', (0, 0))
    assert len({first, touched, renamed, see()}) == 4
    assert see(only='*.csv').startswith('1 file, 3 bytes')


def test_a_named_file_counts_by_its_content(tmp_path, monkeypatch):
    path = tmp_path/'labels.csv'
    path.write_text('0,1')
    first = fingerprint(path, None)
    os.utime(path, (0, 0))
    assert fingerprint(path) == first and list(first) == [str(path)]  # a copy is the same data
    path.write_text('1,0')
    os.utime(path, (0, 0))
    assert fingerprint(path) != first
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert fingerprint('~/labels.csv') == fingerprint('labels.csv') == fingerprint(path)
    with pytest.raises(UsageError, match="there is no file or folder 'nope'"): fingerprint('nope')


def test_a_million_files_are_not_all_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, '_MOST_FILES', 3)
    for i in range(5): (tmp_path/f'{i}').touch()
    first = fingerprint(tmp_path)[str(tmp_path)]
    assert first.startswith('3 files and more')
    (tmp_path/'4').unlink()
    assert fingerprint(tmp_path)[str(tmp_path)] == first
    (tmp_path/'0').unlink()
    assert fingerprint(tmp_path)[str(tmp_path)] != first


# ---- the cell

@pytest.mark.parametrize('cell, message', [
    ("if rows > 5: raise ValueError(f'rows must be at most 5, got {rows}')",
     'softnce: n: rows must be at most 5, got 10\n'),
    ("open(root+'/votes.csv')", "softnce: n: No such file or directory: './votes.csv'\n"),
    ("assert rows < 5, 'too many rows'", 'softnce: n: too many rows\n'),
    ("raise ValueError('one\\n\\ntwo\\nthree')", 'softnce: n: one\ntwo\n'),
    ("x = 1\nrows/(x-1)", "softnce: n: its cell tagged 'preflight' fails in line 2: ZeroDivisionError: division"),
    ("import sys\nsys.exit(3)", "softnce: n: its cell tagged 'preflight' fails in line 2: SystemExit: 3\n"),
    ("if rows:", "softnce: n: its cell tagged 'preflight' fails: IndentationError: expected an indented block"),
    ("preflight = 3", "softnce: n: its cell tagged 'preflight' must set preflight = dict(data=fingerprint(...), "),
    ("preflight = dict(spaces=3)", 'space=bytes) or nothing, got {'),
    ("preflight = dict(space=1e18)", "MiB of free space and the run needs 953,674,316,406: free some, or give"),
    ("from softnce.runs import fingerprint\npreflight = dict(data=fingerprint(root, 'nope'))",
     "softnce: n: there is no file or folder 'nope'\n")])
def test_what_the_cell_raises_is_the_message(tmp_path, cell, message):
    experiment(tmp_path, cell)
    for more in ([], ['--dry-run']):
        start = time.monotonic()
        done = cli('run', 'n.ipynb', *more, cwd=tmp_path)
        assert time.monotonic()-start < 30  # 1 s on a quiet machine: no kernel is started
        assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) <= 2 and not done.stdout
        assert sorted(p.name for p in tmp_path.iterdir()) == ['n.ipynb']


def test_what_the_cell_says_is_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = experiment(tmp_path, "print(f'{rows} rows: a batch of 5 fits')\npreflight = dict(space=0)")
    monkeypatch.setattr(preflight, 'SECONDS', -1.)
    assert run_experiment(path, {'rows': 7}, dry_run=True).dir.parent == tmp_path/'runs'/'n'
    out = capsys.readouterr().out
    assert out.startswith('note: 7 rows: a batch of 5 fits\nnote: the preflight of n took 0 s')
    assert not Path('runs').exists()
    assert 'would start, in runs/n/' in out and '    rows = 7  (default 10)\n' in out and "    root = '.'\n" in out


def test_dry_run_says_what_would_be_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = experiment(tmp_path, "if __name__ == '__main__' and not run.history().size: run.log_row(a=1); 1/0")
    def say(**kw):
        run_experiment(path, {'rows': 7}, dry_run=True, **kw)
        return capsys.readouterr().out.splitlines()[-3]
    assert 'would start' in say()
    with pytest.raises(RuntimeError): run_experiment(path, {'rows': 7})
    capsys.readouterr()
    assert 'would resume' in say()
    run = run_experiment(path, {'rows': 7})
    capsys.readouterr()
    before = {p.name: p.stat().st_mtime_ns for p in run.dir.iterdir()}
    assert 'is finished and would be skipped' in say() == say(restart=True)
    notebook(tmp_path/'n.ipynb', START, "run.save_metrics({'a': 2})", params=PARAMS)
    assert 'is finished and would be skipped' in say() and 'would be set aside and made again' in say(restart=True)
    assert {p.name: p.stat().st_mtime_ns for p in run.dir.iterdir()} == before


# ---- the folder

def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    notebook(tmp_path/'n.ipynb', START)
    (tmp_path/'file').touch()
    monkeypatch.chdir(tmp_path)
    for out in ('file', 'file/below'):
        with pytest.raises(UsageError, match='^file is no folder: give another folder with --out'):
            check_run('n.ipynb', {}, out)
    def refuse(dir): raise PermissionError(13, 'Permission denied', dir)
    monkeypatch.setattr(preflight.tempfile, 'TemporaryFile', refuse)
    with pytest.raises(UsageError, match=r'cannot write to . \(Permission denied\): give another'): check_run('n.ipynb')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'n.ipynb']


def test_a_disk_without_room(tmp_path, monkeypatch):
    path = notebook(tmp_path/'n.ipynb', START)
    free = namedtuple('usage', 'total used free')(1, 1, 20*2**20)
    monkeypatch.setattr(preflight.shutil, 'disk_usage', lambda p: free)
    with pytest.raises(UsageError, match='has 20 MiB of free space and the run needs 50: free some, or give another'):
        check_run(path, {}, tmp_path/'runs')
    assert not (tmp_path/'runs').exists()


def test_a_finished_run_needs_nothing(tmp_path, monkeypatch):
    path = notebook(tmp_path/'n.ipynb', START, "run.save_metrics({'a': 1})", params=PARAMS)
    run = run_experiment(path, {}, tmp_path/'runs')
    monkeypatch.setattr(preflight, 'check_folder', lambda *a: pytest.fail('looked for room'))
    assert run_experiment(path, {}, tmp_path/'runs') == run == Run(run.dir) and run.metrics() == [{'a': 1}]


# ---- those of this checkout

@pytest.mark.parametrize('name', [e.name for e in list_experiments()])
def test_every_experiment_starts_at_its_defaults(name, tmp_path):
    "In a process of its own, which tells what it imported: what is wrong must be said within 3 s."
    code = (f"import sys; from softnce.runs import check_run; check_run({name!r}, {{}}, {str(tmp_path/'runs')!r}); "
            "print([m for m in ('papermill', 'torch', 'timm') if m in sys.modules])")
    assert subprocess.check_output([sys.executable, '-c', code], text=True).split() == ['[]']
    assert not (tmp_path/'runs').exists()


# ---- many runs of the same data, and the caller's directory

def test_inside_one_look_data_is_looked_at_once(tmp_path, monkeypatch):
    (tmp_path/'a.csv').write_text('1')
    seen = []
    original = preflight._of_file
    monkeypatch.setattr(preflight, '_of_file', lambda path: seen.append(path) or original(path))
    with preflight.one_look():
        first = fingerprint(tmp_path/'a.csv')
        (tmp_path/'a.csv').write_text('22')
        with preflight.one_look(): assert fingerprint(tmp_path/'a.csv') == first
        for _ in range(2):
            with pytest.raises(UsageError, match='there is no file or folder'): fingerprint(tmp_path/'b.csv')
    assert len(seen) == 1 and fingerprint(tmp_path/'a.csv') != first and len(seen) == 2


def test_a_relative_path_is_below_the_directory_of_the_caller(tmp_path, monkeypatch):
    "The cell before the run, the notebook, and what it remembers: one directory, wherever the notebook is."
    cell = "from softnce.runs import fingerprint\npreflight = dict(data=fingerprint(root))"
    (tmp_path/'book').mkdir()
    path = experiment(tmp_path/'book', cell, PARAMS.replace("'.'", "'data'"))
    nb = nbformat.read(path, 4)
    nb.cells[-1].source = "from pathlib import Path\nrun.save_metrics({'text': (Path(root)/'x.txt').read_text()})"
    nbformat.write(nb, path)
    for name in ('one', 'two'):
        (tmp_path/name/'data').mkdir(parents=True)
        (tmp_path/name/'data'/'x.txt').write_text(name*3)
    os.utime(tmp_path/'one'/'data'/'x.txt', (1e9, 1e9)) # of the same size, and else of the same second
    monkeypatch.chdir(tmp_path/'one')
    run = run_experiment(path, {}, tmp_path/'runs')
    assert run.metrics() == [{'text': 'oneoneone'}]
    monkeypatch.chdir(tmp_path/'two')  # the same name, and so the same run, but other data
    with pytest.raises(UsageError, match=r'^the data of .* has changed: .*one/data: .*two/data: .*--restart'):
        run_experiment(path, {}, tmp_path/'runs')
    assert run_experiment(path, {}, tmp_path/'runs', restart=True).metrics() == [{'text': 'twotwotwo'}]
