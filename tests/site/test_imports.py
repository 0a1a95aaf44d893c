"""Names that users hold on to stay importable, and importing the losses loads torch and numpy, nothing heavier."""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "softnce": ["SoftTargetInfoNCE", "soft_target_info_nce", "SparseTargets", "one_hot", "smooth", "mix",
                "empirical_noise", "Queue", "Fresh", "ClosedForm", "linear_soft_target_info_nce"],
    "softnce.losses": ["NLL", "SoftTargetCrossEntropy", "InfoNCE", "SoftDistributionInfoNCE", "SoftTargetInfoNCE"],
    "softnce.targets": ["SparseTargets", "one_hot", "smooth", "mix"],
    "softnce.noise": ["uniform_noise", "empirical_noise", "ContinuousCategorical", "Queue", "Fresh", "ClosedForm"],
    "softnce.calibration": ["expected_calibration_error", "reliability", "brier_score", "fit_temperature",
                            "kl_divergence", "total_variation", "vote_floor"],
    "softnce.annotators": ["Votes", "vote_targets", "dawid_skene"],
    "softnce.peers": ["Distillation", "BinaryCrossEntropy", "LogitAdjustedCrossEntropy", "SoftInfoNCE"],
    "softnce.information": ["mutual_information", "optimal_info_nce", "info_nce_bound"],
    "softnce.graphs": ["read_specimen"],
}
HEAVY = {"torchvision", "timm", "torch_geometric", "pandas", "matplotlib", "scipy", "sklearn", "papermill", "nbformat",
         "IPython", "safetensors"}


@pytest.mark.parametrize("module", NAMES)
def test_names_stay_where_they_were(module):
    for name in NAMES[module]: assert hasattr(importlib.import_module(module), name), name


FRONTS = sorted(".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT/"softnce").rglob("__init__.py"))
BOTH = {"softnce.graphs": {"augment"}, "softnce.contrast": {"expected_sums", "linear_sums"}}  # modules and names
OFFERED = """
import importlib, json, pkgutil, sys
from types import ModuleType
front, order = sys.argv[1:]
package = importlib.import_module(front)
inside = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith('_')]
if order == 'modules first':
    for m in inside: importlib.import_module(f'{front}.{m}')
wrong = []
for name in package.__all__:
    found, scope = getattr(package, name), {}
    exec(f'from {front} import {name}', scope)
    if isinstance(found, ModuleType) or scope[name] is not found: wrong.append(name)
both = [n for n in package.__all__ if n in inside]
modules = [m for m in inside if not hasattr(package, m)]  # a module of another name is there, too
print(json.dumps([wrong, both, modules]))
"""


@pytest.mark.parametrize("order", ["names first", "modules first"])
@pytest.mark.parametrize("front", [pytest.param(f, marks=[] if f in BOTH else pytest.mark.slow) for f in FRONTS])
def test_a_folder_offers_its_names_and_no_module_in_their_place(front, order):
    "Whether or not the module of the same name was imported before; here, each in a fresh interpreter."
    done = subprocess.run([sys.executable, "-c", OFFERED, front, order], capture_output=True, text=True)
    if "No module named 'triton'" in done.stderr: pytest.skip("Triton is not installed")
    wrong, both, without = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else (done.stderr, [], [])
    assert not wrong
    assert set(both) == BOTH.get(front, set())
    if order == "modules first": assert not without


def test_a_name_that_is_a_module_too_can_be_replaced_and_its_module_imported(monkeypatch):
    pytest.importorskip("torch_geometric")
    import softnce.graphs
    from softnce.graphs.augment import DropEdges, augment
    module = importlib.import_module("softnce.graphs.augment")
    assert softnce.graphs.augment is augment is module.augment and module.DropEdges is DropEdges
    monkeypatch.setattr(softnce.graphs, "augment", len)
    assert softnce.graphs.augment is len


def test_information_is_the_module_of_the_theory():
    old, new = (importlib.import_module(name) for name in ("softnce.information", "softnce.theory.information"))
    assert old.__all__ == new.__all__ and all(getattr(old, name) is getattr(new, name) for name in new.__all__)


def loaded(code):
    "The top-level modules that a fresh interpreter holds after some code."
    show = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def of_torch(): return loaded("import torch, numpy")


@pytest.mark.parametrize("code", ["import softnce", "import softnce; softnce.SoftTargetInfoNCE, dir(softnce)",
                                  "import softnce.losses, softnce.noise, softnce.calibration, softnce.annotators",
                                  "import softnce.peers, softnce.information, softnce.theory.gradients"])
def test_the_losses_need_torch_and_numpy_only(of_torch, code):
    new = loaded(code) - of_torch
    assert {name for name in new if name not in sys.stdlib_module_names} <= {"softnce"}


def test_a_heavy_import_would_be_seen(of_torch):
    assert not of_torch & HEAVY
    assert "pandas" in loaded("import softnce, pandas") - of_torch
