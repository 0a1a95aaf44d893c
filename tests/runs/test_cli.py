"softnce.runs.cli and the package: the command as a user calls it, its exit codes, and imports that stay light."
import importlib, json, re, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
from small_experiments import cli, notebook

import softnce
import softnce.runs
import softnce.runs.cli as command
import softnce.runs.experiment as experiment
from softnce.runs.execute import RunFailed, RunStopped
from softnce.runs.experiment import UsageError, list_experiments
from softnce.runs.locks import RunLocked

MODULES = sorted(p.stem for p in Path(softnce.runs.__file__).parent.glob('[!_]*.py'))


# ---- the package

def test_the_front_has_every_name():
    "A name is that of one module, and never that of a module: importing the module would then replace it."
    names = [n for m in MODULES for n in importlib.import_module(f'softnce.runs.{m}').__all__]
    assert sorted(names) == softnce.runs.__all__ and len(set(names)) == len(names) and not set(names) & set(MODULES)
    from softnce.runs import collect, run_all, run_experiment, this_run
    assert [f.__module__.rpartition('.')[2] for f in (this_run, run_experiment, collect, run_all)] == [
        'run', 'execute', 'report', 'sweeps']


@pytest.mark.parametrize('module', MODULES)
def test_import_is_light(module):
    heavy = ['torch', 'papermill', 'pandas', 'typer', 'matplotlib', 'yaml', 'nbformat', 'IPython', 'scipy']
    code = f"import sys, softnce.runs.{module}; print(sorted({set(heavy)} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '[]'


# ---- exit codes

@pytest.mark.parametrize('error, code', [
    (UsageError('x'), 2), (RunFailed('x'), 1), (RunLocked('x'), 3), (KeyboardInterrupt(), 130), (RunStopped(), 75)])
def test_exit_codes(error, code, capsys):
    with pytest.raises(SystemExit) as e, command.exit_codes(): raise error
    said = str(error) or ('stopped' if code == 75 else 'interrupted')
    assert e.value.code == code and capsys.readouterr().err == f'softnce: {said}\n'


def test_other_errors_keep_their_traceback():
    for error in (OSError(2, 'No such file'), ZeroDivisionError()):
        with pytest.raises(type(error)), command.exit_codes(): raise error
    with command.exit_codes(): pass


def test_missing_extra():
    code = "import sys; sys.modules.update(typer=None, papermill=None); from softnce.runs.cli import main; main()"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'missing: typer, papermill' in done.stderr and "pip install 'softnce[nbs]'" in done.stderr


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


def test_requeue(monkeypatch):
    "In a Slurm job, a stopped run has its job put back; a failure does not, nor does anything outside Slurm."
    asked = []
    # None: scontrol refused, so there is nothing to wait for
    monkeypatch.setattr(command, 'command_output', lambda *words: asked.append(words))
    for job, error in (('12', RunStopped), ('12', RunFailed), (None, RunStopped)):
        monkeypatch.setenv('SLURM_JOB_ID', job) if job else monkeypatch.delenv('SLURM_JOB_ID')
        with pytest.raises(error), command._requeue_when_stopped(True): raise error()
    assert asked == [('scontrol', 'requeue', '12')]


# ---- list and collect

def test_list(tmp_path):
    done = cli('list', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for e in list_experiments():
        assert f'{e.name}  {e.subtitle}\n' in done.stdout
        for name, p in e.parameters.items():
            comment = f' .*# {re.escape(p.comment)}' if p.comment else ' *'
            line = rf'^ +{name} = {re.escape(repr(p.default))}{comment}$'
            assert re.search(line, done.stdout, re.M), f'{e.name}: {name}'


def test_list_shows_a_broken_experiment_and_the_others(tmp_path, monkeypatch, capsys):
    notebook(tmp_path/'a.ipynb', tags=()), notebook(tmp_path/'b.ipynb')
    monkeypatch.setattr(experiment, 'experiments_dir', lambda: tmp_path)
    command._list()
    out = capsys.readouterr().out
    assert 'a\n    cannot be run: a.ipynb needs exactly one cell' in out
    assert re.search(r"b  A subtitle\n    alignment = 40 +# in percent\n", out)


def test_collect_writes_to_a_file_and_shows_the_rest(tmp_path, capsys):
    folder = tmp_path/'runs'/'n'/'a'
    folder.mkdir(parents=True)
    (folder/'params.yaml').write_text('lr: 0.5\n')
    (folder/'metrics.json').write_text(json.dumps([{'value': i} for i in range(22)]))
    command._collect(tmp_path/'runs', tmp_path/'all.csv')
    said = capsys.readouterr()
    assert said.out.endswith('... 2 more rows\n') and not said.err
    assert pd.read_csv(tmp_path/'all.csv')['value'].tolist() == list(range(22))
    command._collect(tmp_path/'runs', None)
    said = capsys.readouterr()
    assert said.out == (tmp_path/'all.csv').read_text() and said.err.endswith('... 2 more rows\n')


def test_mistakes_in_a_file_name(tmp_path):
    "One line, exit code 2, no traceback."
    (tmp_path/'bad.yaml').write_text('targets: [1]')
    (tmp_path/'half.yaml').write_text('targets: {a: [')
    run = tmp_path/'runs'/'n'/'a'
    run.mkdir(parents=True)
    (run/'params.yaml').write_text('x: 1\n')
    for args, message in ((('status', '--config', 'none.yaml'), 'none.yaml: No such file or directory'),
                          (('status', '--config', 'bad.yaml'), 'config: targets must be a mapping of names'),
                          (('status', '--config', 'half.yaml'), 'half.yaml is not YAML: while parsing'),
                          (('collect', 'runs', '--csv', 'no/where.csv'), 'cannot write no/where.csv: No such file'),
                          (('compare', 'runs'), "no run in 'runs' is finished; softnce status runs says how far"),
                          (('list', 'zzz'), "there is no experiment 'zzz'"), (('collect', 'none'), 'there is no run'),
                          (('run', 'none.ipynb'), "there is no notebook 'none.ipynb'")):
        done = cli(*args, cwd=tmp_path)
        said = [o for o in done.stderr.splitlines() if not o.startswith('unfinished: ')]
        assert done.returncode == 2 and len(said) == 1 and message in said[0], done.stderr


def test_a_file_of_parameters_and_its_run_again(tmp_path):
    notebook(tmp_path/'n.ipynb', "from softnce.runs import this_run\nthis_run().save_metrics({'lr': lr, 'loss': loss})")
    (tmp_path/'base.yaml').write_text('lr: 1e-3\nloss: 010\n')
    done = cli('run', 'n.ipynb', '-p', '@base.yaml', '-p', 'seeds=[7]', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path/'runs'/'n').iterdir()
    assert json.loads((folder/'metrics.json').read_text()) == {'lr': .001, 'loss': '010'}
    again = cli('run', 'n.ipynb', '-p', f'@{folder}/params.yaml', cwd=tmp_path)
    assert again.returncode == 0 and 'already finished, skipped' in again.stdout


def test_compare(tmp_path):
    for id, lr, nll in (('a', .1, .7), ('b', .2, .5), ('c', .3, .6)):
        folder = tmp_path/'runs'/'n'/id
        folder.mkdir(parents=True)
        (folder/'params.yaml').write_text(f'lr: {lr}\nepochs: 5\n')
        valid, test = dict(split='valid', nll=nll, top1=nll), dict(split='test', nll=1-nll, top1=0)
        (folder/'metrics.json').write_text(json.dumps([valid, test]))
    def ids(*args):
        done = cli('compare', *args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        return lines[0], lines[1].split(), [o.split()[0] for o in lines[2:5]]
    how = 'n: best first by nll (less is better), split valid'
    assert ids() == (how, ['id', 'lr', 'nll', 'top1'], ['b', 'c', 'a'])
    for more in (('runs', '--by', 'top1'), ('runs/n', '--split', 'test')): assert ids(*more)[2] == ['a', 'c', 'b']


def test_help_names_the_next_command(tmp_path):
    def text(*args): return ' '.join(cli(*args, cwd=tmp_path).stdout.split())
    words = {(): ['--version', 'softnce list', '--dry-run'],
             ('run',): ['--wait', '--restart', '@FILE', 'softnce status'],
             ('status',): ['--watch', '--errors', 'softnce clean --failed'],
             ('collect',): ['--mixed', 'softnce compare'], ('compare',): ['--by', 'softnce collect'],
             ('clean',): ['--failed', '--dry-run'], ('list',): ['[name]']}
    for command, expected in words.items():
        said = text(*command, '--help')
        assert not [w for w in expected if w not in said], said
    assert text('--version') == f'softnce {softnce.__version__}'
    assert 'softnce run gmm -p KEY=VALUE --dry-run checks a run' in text('list', 'gmm')
