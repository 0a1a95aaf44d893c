"The checks of tools/check.py fail where they should, and README.md is made as it says."
import json, shutil, sys, zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/"tools"))
pytest.importorskip("nbdev")
import check
from readme import readme

TITLE = "# Title\n\n> What it is about"


def cell(source, kind="code", tags=(), outputs=()):
    c = {"cell_type": kind, "id": f"{zlib.crc32(source.encode()):08x}", "metadata": {"tags": list(tags)} if tags else {}, "source": source.splitlines(True)}
    return c if kind == "markdown" else {**c, "execution_count": None, "outputs": list(outputs)}


def write(path, *cells, title=TITLE):
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nb = {"cells": [cell(title, "markdown"), *cells], "metadata": meta, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(nb, indent=1, sort_keys=True)+"\n")
    return path


def stream(text): return {"name": "stdout", "output_type": "stream", "text": [text]}


FAULTS = {
    "one-line subtitle": dict(title="# Title"),
    "65 cells": dict(cells=[cell(f"x = {i}") for i in range(64)]),
    "outputs of": dict(cells=[cell("x", outputs=[stream("a"*1_000_001)])]),
    "error output": dict(cells=[cell("x", outputs=[{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}])]),
    "local path: /mnt/disk": dict(cells=[cell("x", outputs=[stream("saved /mnt/disk/a.png")])]),
    "local path: /home/me": dict(cells=[cell("read('/home/me/data')")]),
    "mixes imports": dict(cells=[cell("#| default_exp a"), cell("import math\nx = math.pi")]),
    "0 cells are tagged": dict(folder="experiments"),
    "2 cells are tagged": dict(folder="experiments", cells=[cell(f"{v} = 1", tags=["parameters"]) for v in "ab"]),
}

@pytest.mark.parametrize("said", FAULTS)
def test_a_fault_is_named(tmp_path, said):
    fault = FAULTS[said]
    path = write(tmp_path/"nbs"/fault.get("folder", "theory")/"a.ipynb", *fault.get("cells", []), title=fault.get("title", TITLE))
    found = list(check.faults(path))
    assert len(found) == 1 and said in found[0]


def test_a_good_notebook_has_no_fault(tmp_path):
    cells = [cell("#| default_exp a"), cell("import math"), cell("#| export\ndef f(): import json; return 1"), cell("seed = 0", tags=["parameters"]),
             cell("x", outputs=[{"output_type": "display_data", "metadata": {}, "data": {"image/png": "aa/tmp/aa"}}])]
    assert not list(check.faults(write(tmp_path/"nbs/experiments/a.ipynb", *cells)))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A small project that is up to date."
    root = tmp_path_factory.mktemp("made")/"project"
    write(root/"nbs"/"index.ipynb", cell("[Losses](theory/a.ipynb), ![figure](images/f.png), [site](https://example.org), [licence](../LICENSE)", "markdown"),
          cell("#| hide\nsecret = 1"), cell("#| eval: false\nprint(2)", outputs=[stream("two\n")]))
    write(root/"nbs"/"theory"/"a.ipynb", cell("#| default_exp a"), cell("#| export\ndef f(): return 1"))
    shutil.copy(ROOT/"settings.ini", root)
    (root/"softnce").mkdir()
    (root/"softnce"/"__init__.py").write_text('__version__ = "0.1.0"\n')
    (root/"pyproject.toml").write_text((ROOT/"pyproject.toml").read_text())
    for name, text in check.remade_files(root).items(): (root/name).write_text(text)
    return root


@pytest.fixture
def tree(project, tmp_path): return Path(shutil.copytree(project, tmp_path/"project"))


def test_stale_files_are_named(tree):
    assert not list(check.stale(tree))
    (tree/"softnce"/"a.py").write_text((tree/"softnce"/"a.py").read_text().replace("return 1", "return 2"))
    (tree/"softnce"/"left_over.py").write_text("x = 1\n")
    (tree/"README.md").unlink()
    before = {p: p.read_bytes() for p in tree.rglob("*") if p.is_file()}
    said = "\n".join(check.stale(tree))
    assert "softnce/a.py: not what the notebooks give\n    -def f(): return 2\n    +def f(): return 1" in said
    assert "left_over.py: no notebook makes this file" in said and "README.md: missing" in said and "index.ipynb" not in said
    assert before == {p: p.read_bytes() for p in tree.rglob("*") if p.is_file()}, "the check changed the tree"


def test_readme(tree):
    text = readme(tree)
    assert "[Losses](nbs/theory/a.ipynb), ![figure](nbs/images/f.png), [site](https://example.org), [licence](LICENSE)" in text
    assert "```python\nprint(2)\n```" in text and "two" in text and "secret" not in text and "#|" not in text
    assert text.count("# Title") == 1 and readme(tree) == text


def test_a_picture_in_an_output_of_the_home_page_is_refused(tree):
    write(tree/"nbs"/"index.ipynb", cell("x", outputs=[{"output_type": "display_data", "metadata": {}, "data": {"image/png": "aaaa"}}]))
    with pytest.raises(SystemExit, match="an output holds a picture"): readme(tree)
