"What a wheel carries of the experiments: their modules, and every notebook that can be run."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path):
    "A copy of what a build reads; building leaves files beside its sources."
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in'):
        shutil.copy(ROOT/name, tmp_path/name)
    ignored = shutil.ignore_patterns('__pycache__', '.*')
    shutil.copytree(ROOT/'softnce', tmp_path/'softnce', ignore=ignored)
    shutil.copytree(ROOT/'nbs'/'experiments', tmp_path/'nbs'/'experiments', ignore=ignored)
    return tmp_path


def build(tree):
    "Files of the experiments in a build."
    cmd = [sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', 'out']
    done = subprocess.run(cmd, cwd=tree, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tree/'out'/'softnce'/'py.typed').exists() and (tree/'out'/'softnce'/'__init__.pyi').exists()
    return {p.name for p in (tree/'out'/'softnce'/'experiments').iterdir()}


def test_a_build_has_the_modules_and_the_experiments_of_now(tree):
    pytest.importorskip('setuptools')
    modules = {p.name for p in (tree/'softnce'/'experiments').glob('*.py*')}  # and the stub
    notebooks = {p.name for p in (tree/'nbs'/'experiments').glob('*.ipynb')}
    assert {'__init__.py', '__init__.pyi', 'gmm.py', 'bench.py'} <= modules
    assert {'gmm.ipynb', 'digits.ipynb'} <= notebooks
    assert build(tree) == modules | notebooks
    (tree/'nbs'/'experiments'/'digits.ipynb').rename(tree/'nbs'/'experiments'/'figures.ipynb')
    assert build(tree) == modules | notebooks - {'digits.ipynb'} | {'figures.ipynb'}


def test_the_notebooks_of_a_wheel_are_found(tree):
    "Without a checkout experiments are listed from the package, where modules stand beside them."
    notebooks = sorted(p.stem for p in (tree/'nbs'/'experiments').glob('*.ipynb'))
    build(tree)
    code = 'from softnce.runs import list_experiments; print(*(e.name for e in list_experiments()))'
    env = os.environ | dict(PYTHONPATH=str(tree/'out'))
    done = subprocess.run([sys.executable, '-c', code], cwd=tree/'out', env=env, text=True, capture_output=True)
    assert done.stdout.split() == notebooks, done.stderr
