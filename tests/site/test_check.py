"The checks of tools/check.py fail where they should, and README.md is made as it says."
import json, shutil, sys, zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/"tools"))
pytest.importorskip("nbdev"); pytest.importorskip("importlinter"); pytest.importorskip("ruff")
import check
import rules
from readme import readme

TITLE = "# Title\n\n> What it is about"
EXP = "#| default_exp a"


def doc(lines, directive="exporti"):
    text = "\n".join(["a line"]*lines)
    return f'#| {directive}\n#| hide\n__doc__ = """{text}"""'


def cell(source, kind="code", tags=(), outputs=()):
    c = {"cell_type": kind, "id": f"{zlib.crc32(source.encode()):08x}", "source": source.splitlines(True)}
    c["metadata"] = {"tags": list(tags)} if tags else {}
    return c if kind == "markdown" else {**c, "execution_count": None, "outputs": list(outputs)}


def write(path, *cells, title=TITLE):
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nb = {"cells": [cell(title, "markdown"), *cells], "metadata": meta, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(nb, indent=1, sort_keys=True)+"\n")
    return path


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def stream(text): return {"name": "stdout", "output_type": "stream", "text": [text]}


FAILED = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
FAULTS = {
    "one-line subtitle": dict(title="# Title"),
    "65 cells": dict(cells=[cell(f"x = {i}") for i in range(64)]),
    "outputs of": dict(cells=[cell("x", outputs=[stream("a"*1_000_001)])]),
    "error output": dict(cells=[cell("x", outputs=[FAILED])]),
    "local path: /mnt/disk": dict(cells=[cell("x", outputs=[stream("saved /mnt/disk/a.png")])]),
    "local path: /home/me": dict(cells=[cell("read('/home/me/data')")]),
    "leaves it so": dict(cells=[cell("torch.set_default_dtype(torch.float64)")]),
    "mixes imports": dict(cells=[cell(EXP), cell(doc(5)), cell("import math\nx = math.pi")]),
    "0 cells are tagged": dict(folder="experiments"),
    "2 cells are tagged": dict(folder="experiments", cells=[cell(f"{v} = 1", tags=["parameters"]) for v in "ab"]),
    "must set `__doc__`": dict(cells=[cell(EXP), cell("#| export\ndef f(): return 1"), cell(doc(5))]),
    "first exported cell": dict(cells=[cell(EXP), cell(doc(5, "hide"))]),
    "`__doc__` has 4 lines": dict(cells=[cell(EXP), cell(doc(4))]),
    "`__doc__` has 21 lines": dict(cells=[cell(EXP), cell(doc(21))]),
}

@pytest.mark.parametrize("said", FAULTS)
def test_a_fault_is_named(tmp_path, said):
    fault = FAULTS[said]
    folder = tmp_path/"nbs"/fault.get("folder", "theory")
    path = write(folder/"a.ipynb", *fault.get("cells", []), title=fault.get("title", TITLE))
    found = list(rules.faults(path))
    assert len(found) == 1 and said in found[0]
    assert list(rules.notebooks_keep_the_rules(tmp_path)) == [f"{path.relative_to(tmp_path)}: {found[0]}"]


@pytest.mark.parametrize("lines", [5, 20])
def test_a_good_notebook_has_no_fault(tmp_path, lines):
    picture = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "aa/tmp/aa"}}
    cells = [cell(EXP), cell(doc(lines)), cell("import math"), cell("#| export\ndef f(): import json; return 1"),
             cell("seed = 0", tags=["parameters"]), cell("x", outputs=[picture])]
    assert not list(rules.faults(write(tmp_path/"nbs/experiments/a.ipynb", *cells)))


# ---------------------------------------------------------------- imports

@pytest.fixture
def house(tmp_path):
    "The modules of the package with nothing in them, and the contracts: a tree that keeps every one."
    for name in rules.modules(ROOT): put(tmp_path/name, "")
    for name in ["pyproject.toml", "tools/contracts.py"]: put(tmp_path/name, (ROOT/name).read_text())
    return tmp_path


FRONT = 'from softnce import _lazy\n__getattr__, __dir__ = _lazy("softnce.{0}", "{1}")\n'
BROKEN = {
    "a higher layer": ({"noise.py": "from .losses import nll"}, "softnce.noise -> softnce.losses (l.1)"),
    "a higher layer in a function": ({"contrast/new.py": "def f():\n    from ..theory import new"},
                                     "softnce.contrast.new -> softnce.theory (l.2)"),
    "a neighbour": ({"vision/new.py": "import softnce.graphs"}, "softnce.vision.new -> softnce.graphs (l.1)"),
    "runs need something": ({"runs/new.py": "from softnce import targets"},
                            "softnce.runs.new -> softnce.targets (l.1)"),
    "runs need something deep": ({"runs/new.py": "from ..contrast import new", "contrast/new.py": ""},
                                 "softnce.runs.new -> softnce.contrast.new (l.1)"),
    "losses need runs": ({"losses.py": "from .runs import run_experiment"}, "softnce.losses -> softnce.runs (l.1)"),
    "a module without a layer": ({"new.py": ""}, "- softnce.new"),
    "a cycle in a folder": ({"runs/x.py": "from . import y", "runs/y.py": "def f(): from .x import g"},
                            "softnce.runs.x -> softnce.runs.y -> softnce.runs.x"),
    "a cycle of three": ({f"theory/{a}.py": f"from .{b} import f" for a, b in ["xy", "yz", "zx"]},
                         "softnce.theory.x -> softnce.theory.y -> softnce.theory.z -> softnce.theory.x"),
    "a cycle through a front": (
        {"theory/__init__.py": FRONT.format("theory", "x"), "theory/x.py": "from softnce.theory import y"},
        "softnce.theory -> softnce.theory.x -> softnce.theory"),
    "a higher layer through the front": (
        {"__init__.py": '__getattr__, __dir__ = _lazy(__name__, "losses")', "losses.py": "from .noise import f",
         "noise.py": "from softnce import nll"}, "softnce -> softnce.losses -> softnce.noise -> softnce"),
}

@pytest.mark.parametrize("what", BROKEN)
def test_a_forbidden_import_is_named(house, what):
    files, said = BROKEN[what]
    for name, text in files.items(): put(house/"softnce"/name, text+"\n")
    found, = rules.contracts(house)
    assert said in found.splitlines()[-1] or f"    {said}" in found.splitlines(), found
    assert "╔" not in found and "KEPT" not in found


def test_allowed_imports(house):
    put(house/"softnce/__init__.py", 'def _lazy(*args): pass\n_lazy(__name__, "losses")\n')
    put(house/"softnce/theory/__init__.py", FRONT.format("theory", "x"))
    put(house/"softnce/theory/x.py", "from . import y\nfrom ..losses import nll\nfrom softnce.theory.x import f\n")
    put(house/"softnce/theory/y.py", "")
    put(house/"softnce/contrast/__init__.py", FRONT.format("contrast", "x"))
    put(house/"softnce/contrast/x.py", "")
    put(house/"softnce/losses.py", "from .noise import Queue\nfrom .contrast import f\n")
    put(house/"softnce/experiments/x.py", "import softnce\nfrom softnce.runs import run_experiment\n")
    assert not list(rules.contracts(house))


def test_contracts_that_cannot_be_read_are_a_finding(house):
    put(house/"pyproject.toml", (house/"pyproject.toml").read_text().replace('"training",', '"elsewhere",'))
    found, = rules.contracts(house)
    assert "softnce.elsewhere does not exist" in found


# ---------------------------------------------------------------- lines, functions, files

CODE = ["tests/b/test_a.py", "tools/a.py", "setup.py", "nbs/b/a.ipynb"]  # not modules, which are generated

@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("line, rule", {
    "x = '" + "a"*115 + "'": "E501", "import math": "F401", "def f(): pass\ndef f(): pass": "F811",
    "x = '" + "a"*114 + "'": None, "import math\n\nmath.pi": None}.items())
def test_style(tmp_path, name, line, rule):
    put(tmp_path/"pyproject.toml", (ROOT/"pyproject.toml").read_text())
    if name.endswith("ipynb"): write(tmp_path/name, *map(cell, line.split("\n\n")))  # an import may serve a later cell
    else: put(tmp_path/name, line+"\n")
    put(tmp_path/"softnce"/"_modidx.py", "y = '" + "a"*200 + "'\n")
    found = list(rules.style(tmp_path))
    assert not found if rule is None else len(found) == 1 and found[0].startswith(name) and rule in found[0]


def test_a_caption_may_be_long(tmp_path):
    put(tmp_path/"pyproject.toml", (ROOT/"pyproject.toml").read_text())
    write(tmp_path/"nbs/b/a.ipynb", cell("x = 1"), cell('#| echo: false\n#| fig-cap: "' + "a"*130 + '"\nx = 2'))
    assert not list(rules.style(tmp_path))
    write(tmp_path/"nbs/b/a.ipynb", cell("x = 1"), cell('#| fig-cap: "' + "a"*130 + '"\ny = "' + "a"*130 + '"'))
    found, = rules.style(tmp_path)
    assert ":2:" in found and "E501" in found


def test_long_lines_of_the_site_are_named(tmp_path):
    for name in ["tools/a.js", "nbs/scripts/b.js", "nbs/c.css"]: put(tmp_path/name, "x\n" + "a"*121 + "\n" + "b"*120)
    put(tmp_path/"nbs/scripts/moving_data.js", "a"*500)
    wanted = {f"{name}:2: 121 columns, at most 120" for name in ["tools/a.js", "nbs/scripts/b.js", "nbs/c.css"]}
    assert set(rules.scripts(tmp_path)) == wanted


def long(lines, name="f"): return f"def {name}(\n    x,\n):\n" + '    "What it is."\n' + "    x = 1\n"*(lines-4)


def indented(text): return "".join("    "+o for o in text.splitlines(True))


LONG = {
    "f": long(31), "_f": long(31, "_f"),
    "A.f": "class A:\n" + indented(long(31)), "A.B.f": "class A:\n    class B:\n" + indented(indented(long(31))),
    "g": "def g():\n" + indented(long(30)), "h": "if True:\n    pass\nelse:\n" + indented(long(31, "h")),
}

@pytest.mark.parametrize("name", LONG)
def test_a_long_function_is_named(tmp_path, name):
    put(tmp_path/"softnce"/"a"/"b.py", "x = 1\n" + LONG[name])
    found, = rules.short_functions(tmp_path)
    assert found.startswith("softnce/a/b.py:") and f": {name} has 31 lines" in found
    assert not list(rules.short_functions(tmp_path, excepted={f"softnce/a/b.py: {name}"}))


def test_short_functions(tmp_path):
    put(tmp_path/"softnce"/"a.py", "@f\n@g\n" + long(30) + "class A:\n" + indented(long(30))*3)
    put(tmp_path/"softnce"/"_modidx.py", long(50))
    assert not list(rules.short_functions(tmp_path))


def test_a_long_module_is_named(tmp_path):
    put(tmp_path/"softnce"/"a"/"long.py", "x = 1\n"*451)
    put(tmp_path/"softnce"/"b.py", "x = 1\n"*450)
    put(tmp_path/"softnce"/"_modidx.py", "x = 1\n"*900)
    assert list(rules.short_modules(tmp_path)) == ["softnce/a/long.py: 451 lines, at most 450 are allowed"]


def test_a_crowded_top_is_named(tmp_path):
    for i in range(14): put(tmp_path/"softnce"/f"m{i}.py", "")
    for i in range(9): put(tmp_path/"softnce"/f"folder{i}"/"a.py", "")
    assert not list(rules.few_at_the_top(tmp_path))
    put(tmp_path/"softnce"/"one_more.py", "")
    assert list(rules.few_at_the_top(tmp_path)) == ["softnce: 15 modules at the top, at most 14 are allowed"]


def test_a_long_section_is_named(tmp_path):
    def section(name, n):
        return f"      - section: {name}\n        contents:\n" + "".join(f"          - {i}.ipynb\n" for i in range(n))
    text = "website:\n  sidebar:\n    contents:\n      - text: Home\n        href: index.ipynb\n"
    inner = "".join("    "+o for o in section("Inner", 13).splitlines(True))
    put(tmp_path/"nbs"/"sidebar.yml", text + section("Twelve", 12) + section("Long", 13) + section("Outer", 11) + inner)
    said = "nbs/sidebar.yml: section {} has 13 pages, at most 12 are allowed".format
    assert list(rules.short_sections(tmp_path)) == [said("Long"), said("Inner")]


# ---------------------------------------------------------------- exported names

@pytest.fixture
def names(tmp_path):
    "A folder that exports two names; its own modules, page and code use both."
    put(tmp_path/"softnce"/"theory"/"a.py", "__all__ = ['lonely', 'wanted']\nlonely, wanted = 1, 2\n")
    put(tmp_path/"softnce"/"theory"/"b.py", "from .a import lonely, wanted\n")
    write(tmp_path/"nbs"/"theory"/"a.ipynb", cell("from .a import lonely, wanted"), cell("see `lonely`", "markdown"))
    write(tmp_path/"nbs"/"theory"/"index.ipynb", cell("lonely, and nothing in backticks", "markdown"))
    write(tmp_path/"nbs"/"guides"/"a.ipynb", cell("from softnce.theory import wanted"), cell("`lonely`", "markdown"))
    return tmp_path


def test_a_name_that_nobody_needs(names):
    assert list(rules.needed_names(names)) == ["softnce/theory/a.py: nobody outside its folder uses lonely"]


USES = {
    "softnce/training/c.py": "from ..theory import a\na.lonely()\n",
    "softnce/c.py": "from .theory.a import lonely as own\n",
    "tests/theory/test_a.py": "from softnce.theory.a import lonely\n",
    "tools/c.py": "print('softnce.theory.a:lonely')\n",
    "Snakefile": "rule all:\n    input: lonely()\n",
    "nbs/guides/b.ipynb": cell("lonely()"), "nbs/experiments/b.ipynb": cell("%%bash\nsoftnce lonely"),
    "nbs/theory/index.ipynb": cell("`lonely()` is one", "markdown"),
}

@pytest.mark.parametrize("name", USES)
def test_what_counts_as_use(names, name):
    use = USES[name]
    if name.endswith("ipynb"): write(names/name, use)
    else: put(names/name, use)
    assert not list(rules.needed_names(names))


def test_the_code_of_an_experiment_is_a_folder_apart_from_its_page(tmp_path):
    put(tmp_path/"softnce"/"experiments"/"gmm.py", "__all__ = ['f']\n")
    write(tmp_path/"nbs"/"experiments"/"code"/"gmm.ipynb", cell("f()"))
    assert list(rules.needed_names(tmp_path))
    write(tmp_path/"nbs"/"experiments"/"gmm.ipynb", cell("f()"))
    assert not list(rules.needed_names(tmp_path))


# ---------------------------------------------------------------- the whole

def test_every_finding_has_its_remedy(monkeypatch, capsys, tmp_path):
    def broken(root): yield from [f"place {i}" for i in range(20)]
    monkeypatch.setattr(check, "RULES", {broken: "mend it", lambda root: []: "never said"})
    with pytest.raises(SystemExit) as e: check.main(tmp_path)
    said = capsys.readouterr().out
    assert e.value.code == 1 and "place 11\n... and 8 more" in said and "place 12" not in said and "=> mend it" in said
    assert "never" not in said
    with pytest.raises(SystemExit): check.main(tmp_path, every=True)
    assert "place 19\n=> mend it" in capsys.readouterr().out


def test_nothing_found(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check, "RULES", {lambda root: []: "never said"})
    check.main(tmp_path)
    assert "0 notebooks are clean" in capsys.readouterr().out


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A small project that is up to date."
    root = tmp_path_factory.mktemp("made")/"project"
    links = "[Losses](theory/a.ipynb), ![figure](images/f.png), [site](https://example.org), [licence](../LICENSE)"
    write(root/"nbs"/"index.ipynb", cell(links, "markdown"), cell("#| hide\nsecret = 1"),
          cell("#| eval: false\nprint(2)", outputs=[stream("two\n")]))
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
    assert "left_over.py: no notebook makes this file" in said and "README.md: missing" in said
    assert "index.ipynb" not in said
    assert before == {p: p.read_bytes() for p in tree.rglob("*") if p.is_file()}, "the check changed the tree"


def test_readme(tree):
    text = readme(tree)
    assert "[Losses](nbs/theory/a.ipynb), ![figure](nbs/images/f.png)" in text
    assert "[site](https://example.org), [licence](LICENSE)" in text
    assert "```python\nprint(2)\n```" in text and "two" in text and "secret" not in text and "#|" not in text
    assert text.count("# Title") == 1 and readme(tree) == text


def test_a_picture_in_an_output_of_the_home_page_is_refused(tree):
    picture = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "aaaa"}}
    write(tree/"nbs"/"index.ipynb", cell("x", outputs=[picture]))
    with pytest.raises(SystemExit, match="an output holds a picture"): readme(tree)
