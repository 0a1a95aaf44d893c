"Every module says what it is for, and what it says is true: its docstring's demo runs. `import softnce` costs nothing."
import configparser, doctest, importlib, importlib.util, inspect, re, subprocess, sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/"tools"))
from rules import DOC_LINES, modules

NAMES = {n.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): p for n, p in modules(ROOT).items()}
NAMED = {"pillow": "PIL", "scikit_learn": "sklearn", "pyyaml": "yaml"}  # distributions that are imported otherwise


def optional():
    "The modules that come with the extras, and Triton, which comes with some builds of torch."
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini")
    extras = " ".join(v for k, v in ini["DEFAULT"].items() if k.endswith("_requirements")).split()
    names = [re.match(r"[\w-]+", o)[0].lower().replace("-", "_") for o in extras]
    return {NAMED.get(o, o) for o in names} | {"triton"}


def load(name):
    "The module; the test is skipped where an extra that it needs is not installed, and for no other error."
    try: return importlib.import_module(name)
    except ImportError as e:
        missing = (e.name or "").split(".")[0]
        if missing not in optional() or importlib.util.find_spec(missing): raise
        pytest.skip(f"{name} needs {missing}")


@pytest.mark.parametrize("name", NAMES)
def test_a_module_says_what_it_is_for(name):
    text = inspect.cleandoc(load(name).__doc__ or "")
    assert len(text.splitlines()) in DOC_LINES, f"from {DOC_LINES[0]} to {DOC_LINES[-1]} lines:\n{text}"
    demo = doctest.DocTestParser().get_examples(text)
    assert demo or NAMES[name].name == "__init__.py", "no demo; one that needs a download has # doctest: +SKIP"


@pytest.mark.parametrize("name", NAMES)
def test_the_demo_runs(name, monkeypatch, tmp_path):
    "In an empty folder, and whatever the random state: a demo seeds itself."
    module = load(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(271828)
    assert doctest.testmod(module).failed == 0, "see what it printed"


def test_only_a_missing_extra_is_an_excuse(monkeypatch):
    assert {"timm", "torch_geometric", "sklearn", "PIL", "yaml", "snakemake"} <= optional()
    assert not {"torch", "numpy"} & optional()
    def failing(missing):
        def load(name): raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return load
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("timm", "numpy") else real(name))
    monkeypatch.setattr(importlib, "import_module", failing("timm.data"))
    with pytest.raises(pytest.skip.Exception, match="needs timm"): load("softnce.vision.models")
    for name in ["numpy", "softnce.gone", "pytest"]:  # always there, ours, and an extra that is installed
        monkeypatch.setattr(importlib, "import_module", failing(name))
        with pytest.raises(ModuleNotFoundError): load("softnce.vision.models")


COST = """
import sys, time
before = set(sys.modules)
start = time.perf_counter()
import softnce
took = time.perf_counter()-start
print(took, *{o.split('.')[0] for o in set(sys.modules)-before}-set(sys.stdlib_module_names))
"""

def test_import_of_the_package_costs_nothing():
    said = [subprocess.check_output([sys.executable, "-c", COST], text=True).split() for _ in range(3)]
    assert all(modules == ["softnce"] for _, *modules in said)
    assert min(float(seconds) for seconds, *_ in said) < .2
