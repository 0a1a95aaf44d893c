"The Snakefile without a cluster: what it lists, and what it does on two cores. On Slurm: tests/cluster."
import json, re, shutil, subprocess, sys
from pathlib import Path

import nbformat
import pytest
import yaml
from small_experiments import REPO, notebook

from softnce.runs.sweeps import Plan

pytest.importorskip('snakemake', reason='snakemake comes with softnce[cluster]')
SNAKEMAKE = Path(sys.executable).with_name('snakemake')


def snakemake(*args, cwd):
    done = subprocess.run(list(map(str, [SNAKEMAKE, *args])), cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout+done.stderr


def copy(folder, *names):
    "Files and folders of the repository, as a folder of its own."
    for name in names: (shutil.copytree if (REPO/name).is_dir() else shutil.copy)(REPO/name, folder/name)


@pytest.mark.slow
@pytest.mark.parametrize('size', ['paper', 'small'])
def test_every_run_is_listed_with_its_reason(tmp_path, size):
    copy(tmp_path, 'Snakefile', 'profiles', 'config')
    asked = ['--configfile', f'config/{size}.yaml'] if size != 'paper' else []  # which is the default
    code, out = snakemake('-n', *asked, cwd=tmp_path)
    plan = Plan(yaml.safe_load((REPO/'config'/f'{size}.yaml').read_text()))
    assert code == 0, out
    listed = re.findall(r'^Job \d+: (softnce run .*)\nReason: Missing output files: (\S+)/metrics.json', out, re.M)
    assert sorted(f for _, f in listed) == sorted(f'runs/{e}/{i}' for e, i in plan.runs)
    assert {c for c, _ in listed} == {plan.command(*k) for k in plan.runs}
    assert not (tmp_path/'runs').exists()
    missing = re.findall(r'^softnce: (\d+) runs? cannot start: (.*)$', out, re.M)
    if size == 'small': assert not missing  # everything comes with it, or is made
    else:  # what is not there, once each, where it was looked for: the folder in which Snakemake was started
        found = {name: int(n) for n, text in missing for name in ('imagenet', 'tiny-imagenet-200', 'cifar-100-python',
                 'celltype') if f'data/{name} ' in text or f'data/{name}:' in text}
        assert len(found) == len(missing) == 4 and sum(found.values()) > 270, missing
        assert all(str(tmp_path/'data') in text or 'data/celltype' in text for _, text in missing)


@pytest.mark.slow
def test_on_two_cores(tmp_path):
    "A failing run leaves the others; finished runs are skipped; code counts, text does not; the figure is drawn again."
    copy(tmp_path, 'Snakefile', 'profiles')
    for name in ('walk', 'walks'): shutil.copy(REPO/'tests'/'cluster'/f'{name}.ipynb', tmp_path)
    def make(*args, **parameters):
        target = {'notebook': 'walks.ipynb', 'parameters': {'seeds': [0, 1], 'pause': 0., **parameters}}
        (tmp_path/'walks.yaml').write_text(yaml.safe_dump({'targets': {'table1': target}}))
        return snakemake('--profile', 'profiles/local', '--configfile', 'walks.yaml', *args, cwd=tmp_path)
    done = lambda name: sorted(tmp_path.glob(f'runs/{name}/*/metrics.json'))
    code, out = make(fail_at=[-1, 2])
    assert code == 1 and len(done('walk')) == 2 and not done('walks')
    assert out.count('RuntimeError: the step 2 that fails') >= 2
    code, out = make()  # the two are there already
    assert code == 0 and len(done('walks')) == 1 and not re.findall('^run walk .* finished', out, re.M), out
    code, out = make()
    assert code == 0 and 'Nothing to be done' in out
    def edit(kind, text):
        nb = nbformat.read(tmp_path/'walk.ipynb', 4)
        next(c for c in reversed(nb.cells) if c.cell_type == kind).source += text
        nbformat.write(nb, tmp_path/'walk.ipynb')
    edit('markdown', '\nmore text')
    code, out = make()
    assert code == 0 and 'Nothing to be done' in out
    mean = json.loads(done('walks')[0].read_text())['mean']
    edit('code', "\nrun.save_metrics(dict(seed=seed, split='train', x=state['x']+1))")
    assert 'Params have changed' in make('-n')[1]
    code, out = make()
    assert code == 0 and json.loads(done('walks')[0].read_text())['mean'] == pytest.approx(mean+1, abs=1e-12)
    assert len(list(tmp_path.glob('runs/walk/.changed/*/metrics.json'))) == 2


@pytest.mark.slow
def test_names_with_spaces_and_signs_and_data_that_is_missing(tmp_path):
    "A notebook, or the folder of runs, with a space or a sign; -n says what is missing, and a real start stops there."
    copy(tmp_path, 'Snakefile')
    work = "from softnce.runs import this_run\nthis_run().save_metrics(dict(v=x))"
    for name in ('my a+b', 'walk'): notebook(tmp_path/f'{name}.ipynb', work, params='x = 1.0')
    parts = [{'notebook': f'{n}.ipynb', 'grid': {'x': [1, 2]}} for n in ('my a+b', 'walk')]
    (tmp_path/'c.yaml').write_text(yaml.safe_dump({'targets': {'t': parts}, 'out': 'my runs'}))
    code, out = snakemake('--cores', 1, '--configfile', 'c.yaml', cwd=tmp_path)
    assert code == 0 and len(list(tmp_path.glob('my runs/*/*/metrics.json'))) == 4, out
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ['.snakemake', 'my runs']
    nb = nbformat.read(tmp_path/'walk.ipynb', 4)
    cell = "if x > 2: raise FileNotFoundError(2, 'No such folder', 'images')"
    nb.cells.append(nbformat.v4.new_code_cell(cell, metadata={'tags': ['preflight']}))
    nbformat.write(nb, tmp_path/'walk.ipynb')
    parts[1]['grid']['x'] = [3]
    (tmp_path/'c.yaml').write_text(yaml.safe_dump({'targets': {'t': parts[1]}, 'out': 'my runs'}))
    message = "1 run cannot start: No such folder: 'images'"
    code, out = snakemake('-n', '--configfile', 'c.yaml', cwd=tmp_path)
    assert code == 0 and message in out
    code, out = snakemake('--cores', 1, '--configfile', 'c.yaml', cwd=tmp_path)
    assert code == 1 and f'nothing was started: {message}' in out and len(list(tmp_path.glob('my runs/walk/*'))) == 2


def test_the_guides_table_is_that_of_the_plan():
    "Targets, experiments and runs in the committed output, counted again."
    guide = nbformat.read(REPO/'nbs/guides/clusters.ipynb', as_version=4)
    told = [o.text for c in guide.cells if c.cell_type == 'code' for o in c.outputs if o.output_type == 'stream']
    plan = Plan(yaml.safe_load((REPO/'config/paper.yaml').read_text()))
    head, *lines = told[0].splitlines()
    assert head.split() == list(plan.targets)
    counts = {line.split()[0]: [int(n) for n in line.split()[1:]] for line in lines}
    assert set(counts) == {experiment for experiment, _ in plan.runs}
    def behind(key): return {key}.union(*(behind(k) for k in plan.runs[key].needs))
    for column, keys in enumerate(plan.targets.values()):
        every = set().union(*map(behind, keys))
        for experiment, row in counts.items(): assert row[column] == sum(e == experiment for e, _ in every), experiment
    assert told[1].startswith(f'{len(plan.runs)} runs in all')
