"The API: every parameter is described, every name has an entry, every example runs, and the checks can fail."
import doctest, importlib.util, inspect, re, sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/"tools"))
import api
import signatures

ENTRIES = list(api.entries())


# ---------------------------------------------------------------- what is read from a source
SOURCE = '''
__all__ = ["f", "f_reference", "Base", "Derived", "Made", "Module"]
def f(a:int, # how many
      b:str="x", c:float|None=None, # b: which; c: a share; None: all
      *, d:int=1, # `(N,)` of rows,
                  # as long as wanted
     )->int:   # their sum
    "What it does. Raises ValueError for a negative number."
    if a < 0: raise ValueError(a)
    return a
def f_reference(a, b, c): "As formulas."
class Base:
    "A base."
    def __init__(self, x:int=0): # x: the start
        self.x = x
    def probs(self, logits:int, # `(N, K)`
             )->int: return logits # as they are
class Derived(Base):
    "More."
    def probs(self, logits:int)->int: return logits
    def other(self, logits:int)->int: return logits # as `probs`
    def _hidden(self, z): return z
class Made(NamedTuple):
    "Fields."
    one:int     # the first
    two:int = 2 # the second
class Module(Base):
    "Module of `f`."
    loss = staticmethod(f)
    def forward(self, a:int)->int: return self.loss(a)
'''


def package(tmp_path, source=SOURCE, front=""):
    (tmp_path/"softnce").mkdir()
    (tmp_path/"softnce"/"__init__.py").write_text(front)
    (tmp_path/"softnce"/"m.py").write_text(source)
    return signatures.Package(tmp_path)


def texts(f): return {p.name: p.text for p in f.parameters}


def test_a_function_is_read(tmp_path):
    f = package(tmp_path).whole("softnce.m", "f")
    assert texts(f) == {"a": "how many", "b": "which", "c": "a share; None: all",
                        "d": "`(N,)` of rows, as long as wanted"}
    assert [(p.type, p.default) for p in f.parameters] == [("int", None), ("str", "'x'"), ("float | None", "None"),
                                                           ("int", "1")]
    assert (f.result.type, f.result.text, f.raises, f.keyword_from) == ("int", "their sum", {"ValueError"}, 3)


def test_descriptions_are_found_where_they_stand(tmp_path):
    "In the base class, in a method that a comment points to, in the function that a module calls."
    have = package(tmp_path)
    derived = have.whole("softnce.m", "Derived")
    assert texts(derived.constructor) == {"x": "the start"}
    assert {m.name: (texts(m)["logits"], m.result.text) for m in derived.methods} == {
        "probs": ("`(N, K)`", "as they are"), "other": ("`(N, K)`", "as they are")}
    assert texts(have.whole("softnce.m", "f_reference"))["a"] == "how many"
    assert texts(have.whole("softnce.m", "Module").methods[0]) == {"a": "how many"}
    made = have.whole("softnce.m", "Made").constructor
    assert [(p.name, p.default, p.text) for p in made.parameters] == [("one", None, "the first"),
                                                                      ("two", "2", "the second")]


@pytest.mark.parametrize("module, name", [("softnce.losses", "soft_target_info_nce"), ("softnce.noise", "Queue"),
                                          ("softnce.calibration", "brier_score"), ("softnce.training.loop", "fit")])
def test_names_and_defaults_are_those_of_the_running_code(module, name):
    "Source and running code agree, as `inspect` sees it."
    pytest.importorskip("torchmetrics")
    f = signatures.Package().whole(module, name)
    f = f.constructor if isinstance(f, signatures.Class) else f
    real = inspect.signature(getattr(import_module(module), name)).parameters
    assert [p.name for p in f.parameters] == list(real)
    assert [p.default is None for p in f.parameters] == [p.default is p.empty for p in real.values()]


# ---------------------------------------------------------------- the checks, on what is there and on faults
@pytest.mark.parametrize("check", [api.described, api.known, api.listed], ids=lambda f: f.__name__)
def test_nothing_is_missing(check): assert list(check(ROOT)) == []


UNDESCRIBED = {
    "def f(a:int)->int: return a": "f does not say what this parameter is: a",
    "def f(a)->int: return a # a: it": "f has a parameter without type: a",
    "def f(a:None=None)->int: return a # a: it": "f has a parameter without type: a",
    "def f(a:int, b:int)->int: return a # a: it": "f does not say what this parameter is: b",
    "class f:\n    'A.'\n    def __init__(self, a:int): pass": "f.__init__ does not say what this parameter is: a",
    "class f(NamedTuple):\n    'A.'\n    a:int": "f.__init__ does not say what this parameter is: a",
    "class f:\n    'A.'\n    def m(self, a:int)->None: pass": "f.m does not say what this parameter is: a",
    "def f(a:int)->int: return a # as `g`": "f does not say what this parameter is: a",
}

@pytest.mark.parametrize("source", UNDESCRIBED)
def test_a_parameter_that_is_not_described_is_found(tmp_path, source):
    package(tmp_path, f"__all__ = ['f']\n{source}\n")
    said, = api.described(tmp_path)
    assert said == f"softnce.m: {UNDESCRIBED[source]}"


PAGE = "---\ntitle: T\n---\n## S\n### softnce.m.{}\n>>> 1\n1\n"
UNKNOWN = {  # a page's line, a module: what must be said
    ("gone", "def f()->int: return 1"): "softnce.m.gone is no public name",
    ("f", "def f()->int: return 1"): "softnce.m.f has no docstring",
    ("f", "def f()->Tensor: 'It.'"): "softnce.m.f does not say what f returns",
    ("f", "def f()->int:\n    'It.'\n    raise KeyError(1)"): "softnce.m.f does not say that f raises KeyError",
    ("f: g", "class f:\n    'It.'"): "softnce.m.f has no method g",
}

@pytest.mark.parametrize("line, source", UNKNOWN)
def test_an_entry_that_says_too_little_is_found(tmp_path, line, source):
    package(tmp_path, f"__all__ = ['f']\n{source}\n")
    (tmp_path/"nbs"/"api").mkdir(parents=True)
    (tmp_path/"nbs"/"api"/"p.md").write_text(PAGE.format(line))
    said, = api.known(tmp_path)
    assert said == f"nbs/api/p.md: {UNKNOWN[line, source]}"
    assert bool(list(api.listed(tmp_path))) == (line == "gone")


# ---------------------------------------------------------------- examples
SLOW = {"softnce.graphs": "torch_geometric", "softnce.training": "torchmetrics", "softnce.text": "sklearn",
        "softnce.vision": "timm", "softnce.runs": "papermill"}

@pytest.mark.parametrize("entry", [e for e in ENTRIES if ">>> " in e.said], ids=lambda e: f"{e.package}.{e.name}")
def test_the_example_runs(entry, monkeypatch, tmp_path):
    "In an empty folder, alone, and whatever the random state."
    needs = next((v for k, v in SLOW.items() if entry.package.startswith(k)), "torch")
    if not importlib.util.find_spec(needs): pytest.skip(f"needs {needs}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(271828)
    text = api.words(entry)[1]
    test = doctest.DocTestParser().get_doctest(text+"\n", {}, entry.name, None, 0)
    assert test.examples
    said = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)


def test_every_name_but_a_made_one_has_an_example():
    without = [e.name for e in ENTRIES if ">>> " not in e.said]
    assert sorted(without) == ["ImageModel", "RowOptions", "RunFailed", "RunLocked", "RunStopped", "Targets", "Words",
                               "save_model"]


# ---------------------------------------------------------------- what is written
@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    api.write(folder)
    return {p.stem: p.read_text() for p in folder.glob("*.md")}


def test_every_name_is_written_once_with_what_it_takes(written):
    for e in ENTRIES:
        assert written[e.page].count(f"### {e.name} {{#{e.name}}}") == 1
        entry = written[e.page].split(f"### {e.name} {{#{e.name}}}\n")[1].split("\n### ")[0]
        real = getattr(import_module(e.package), e.name) if e.package in ("softnce", "softnce.peers") else None
        if inspect.isclass(real): assert f"class {e.package}.{e.name}(" in entry
        names = [n for n in inspect.signature(real).parameters] if inspect.isfunction(real) else []
        for n in names: assert re.search(rf"\*\*[^*]*`{n}`", entry), f"{e.name}: {n}"
        for m in e.methods: assert f"{{#{e.name}.{m}}}" in entry
        assert f"({e.page}.html#{e.name})" in written["index"]
    assert not re.search("NoneType|Call self as|<function", "".join(written.values()))


def test_an_equation_stands_with_the_loss_that_it_is(written):
    entry = written["losses"].split("{#soft_target_info_nce}")[1].split("\n### ")[0]
    assert r"\alpha" in entry and entry.count("$$") == 2 and r"\tag" not in entry
    assert "(../losses/losses.html#soft_target_info_nce)" in entry and "**Raises** ValueError" in entry


def test_words_are_linked_and_strings_are_code(tmp_path):
    package(tmp_path)
    made = api.Api(tmp_path)
    made.pages = {"f": "p"}
    said = made.link("`f` of 'one' | 'two', `g('x')`, rows' own")
    assert said == "[`f`](p.html#f) of `'one'` | `'two'`, `g('x')`, rows' own"
