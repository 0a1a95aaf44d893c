"""Names that users hold on to stay importable, and importing the losses loads torch and numpy, nothing heavier."""
import importlib
import json
import subprocess
import sys

import pytest

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
