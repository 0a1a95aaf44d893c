"The package's own papers: versions, licence, links, requirements and workflows say what settings.ini says."
import configparser
import email
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import softnce

ROOT = Path(__file__).resolve().parents[2]
INI = configparser.ConfigParser(delimiters=['='])
INI.read(ROOT/'settings.ini')
INI = INI['DEFAULT']


def text(name): return (ROOT/name).read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "A copy of what a build reads; building leaves files beside its sources."
    tmp = tmp_path_factory.mktemp('package')
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', *re.findall(r'\S+\.md|LICENSE|\S+\.cff',
                                                                                    text('MANIFEST.in'))):
        shutil.copy(ROOT/name, tmp/name)
    ignored = shutil.ignore_patterns('__pycache__', '.*')
    for name in ('softnce', 'nbs/experiments'): shutil.copytree(ROOT/name, tmp/name, ignore=ignored)
    return tmp


@pytest.fixture(scope='module')
def built(tree):
    "The folder with the sdist and the wheel."
    pytest.importorskip('setuptools', minversion='77')
    for kind in ('sdist', 'wheel'):
        code = f"from setuptools.build_meta import build_{kind} as b; b('dist')"
        done = subprocess.run([sys.executable, '-c', code], cwd=tree, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return tree/'dist'


@pytest.fixture(scope='module')
def wheel(built, tmp_path_factory):
    "The wheel, unpacked."
    folder, (packed,) = tmp_path_factory.mktemp('wheel'), built.glob('*.whl')
    shutil.unpack_archive(packed, folder, 'zip')
    return folder


@pytest.fixture(scope='module')
def metadata(wheel): return email.message_from_string(next(wheel.glob('*.dist-info/METADATA')).read_text())


# ---------------------------------------------------------------- what is built

def test_the_index_takes_it(built):
    pytest.importorskip('twine')
    done = subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', *built.iterdir()],
                          text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.count('PASSED') == 2, done.stdout + done.stderr


def test_licence_and_classifiers(metadata):
    assert metadata['License-Expression'] == 'Apache-2.0' and metadata['License'] is None
    assert metadata.get_all('License-File') == ['LICENSE']
    found = metadata.get_all('Classifier')
    assert not [c for c in found if c.startswith('License')]  # PEP 639: the expression stands alone
    assert {f'Programming Language :: Python :: 3.{minor}' for minor in (11, 12, 13)} <= set(found)
    assert {'Intended Audience :: Science/Research', 'Development Status :: 3 - Alpha'} <= set(found)
    known = getattr(pytest.importorskip('trove_classifiers'), 'classifiers')
    assert set(found) <= set(known)


def test_links_of_the_index_page_lead_somewhere(metadata):
    page, site = metadata.get_payload(), INI['git_url']
    links = re.findall(r'\]\(([^)\s]+)', page)
    assert len(links) > 20 and all(re.match(r'https?://', link) or link[0] == '#' for link in links)
    paths = [re.fullmatch(rf'{site}/(blob|raw)/main/([^#]+)(#.*)?', link) for link in links]
    inside = [m[2] for m in paths if m]
    assert len(inside) > 15 and all((ROOT/path).exists() for path in inside)
    assert re.search(rf'!\[[^\]]*\]\({site}/raw/main/\S+\.png\)', page)
    assert ('](nbs/' in text('README.md')) and '](nbs/' not in page


def test_notebooks_travel_without_outputs(built, wheel):
    from softnce.runs.experiment import Experiment
    size = {p.suffix: p.stat().st_size for p in built.iterdir()}
    assert max(size.values()) < 700_000  # 1.7 MB each with outputs
    packed = sorted((wheel/'softnce'/'experiments').glob('*.ipynb'))
    assert {p.name for p in packed} == {p.name for p in (ROOT/'nbs'/'experiments').glob('*.ipynb')}
    for p in packed:
        cells = json.loads(p.read_text())['cells']
        assert not any(c.get('outputs') or c.get('execution_count') for c in cells)
        whole = ROOT/'nbs'/'experiments'/p.name
        assert [c['source'] for c in cells] == [c['source'] for c in json.loads(whole.read_text())['cells']]
        assert Experiment(p).code_hash == Experiment(whole).code_hash


def test_building_leaves_the_notebooks_as_they_are(built, tree):
    for p in (ROOT/'nbs'/'experiments').glob('*.ipynb'):
        assert (tree/'nbs'/'experiments'/p.name).read_bytes() == p.read_bytes()


def test_the_command_says_its_version_without_an_extra(wheel):
    block = "import sys; sys.modules.update(dict.fromkeys(['typer', 'papermill', 'pandas', 'torch']))"
    code = f"{block}; sys.path.insert(0, {str(wheel)!r}); sys.argv = ['softnce', '--version']; " \
           "import softnce.runs.cli as c; assert 'wheel' in c.__file__; c.main()"
    done = subprocess.run([sys.executable, '-c', code], cwd=wheel, text=True, capture_output=True)
    assert done.stdout.split() == ['softnce', INI['version']] and not done.stderr


# ---------------------------------------------------------------- what is written

def test_every_page_has_the_version_of_settings():
    version = INI['version']
    assert softnce.__version__ == version
    yaml = pytest.importorskip('yaml')
    cff = yaml.safe_load(text('CITATION.cff'))
    assert cff['version'] == version and cff['license'] == 'Apache-2.0'
    assert cff['repository-code'] == INI['git_url']
    assert re.search(r'^## \[(.+?)\]', text('CHANGELOG.md'), re.M)[1] in (version, 'Unreleased')


def test_the_conda_recipe_is_current():
    yaml = pytest.importorskip('yaml')
    recipe = yaml.safe_load(text('recipe/recipe.yaml'))
    assert recipe['context'] == dict(version=INI['version'], python_min=INI['min_python'])
    needed = [r.replace('torch>', 'pytorch>').replace('>=', ' >=') for r in INI['requirements'].split()]
    assert recipe['requirements']['run'] == ['python >=${{ python_min }}', *needed]
    assert recipe['build']['python']['entry_points'] == [INI['console_scripts'].replace('=', ' = ')]
    about = recipe['about']
    assert about['license'] == 'Apache-2.0' and (ROOT/about['license_file']).exists()
    assert about['summary'] == INI['description'] and about['repository'] == INI['git_url']


def test_workflows():
    yaml = pytest.importorskip('yaml')
    tests, release = (yaml.safe_load(text(f'.github/workflows/{n}.yml')) for n in ('tests', 'release'))
    versions = INI['python_versions'].split()
    assert tests['jobs']['test']['strategy']['matrix']['python-version'] == versions
    assert INI['min_python'] == versions[0]
    assert release[True] == dict(push=dict(tags=['v*']))  # `on`, as YAML 1.1 reads it
    publish = release['jobs']['publish']
    assert publish['permissions'] == {'id-token': 'write'} and publish['needs'] == 'build'
    assert 'secrets.' not in text('.github/workflows/release.yml')
    assert release['permissions'] == dict(contents='read')


def test_extras_are_quoted():
    "Brackets without quotes are a pattern to zsh, which finds no file of that name."
    extras = '|'.join(k.removesuffix('_requirements') for k in INI if k.endswith('_requirements'))
    bare = re.compile(rf'install (?:-\S+ )*(?:softnce|\.)\[(?:all|{extras})\b')
    folders = (p for f in ('nbs', 'softnce', 'tools', 'tests', '.github') for p in sorted((ROOT/f).rglob('*')))
    files = [p for p in folders if p.suffix in ('.ipynb', '.py', '.yml')] + [*ROOT.glob('*.md'), ROOT/'Makefile']
    assert len(files) > 150 and bare.search('pip install -e .[nbs]')
    assert not [str(p.relative_to(ROOT)) for p in files if bare.search(p.read_text()) and p.name != Path(__file__).name]
