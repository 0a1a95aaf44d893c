"""Types: every public signature has them, stubs say what lazy packages offer, checkers take a user's script."""
import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/"tools"))
import stubs

LATER = set()  # modules whose signatures are not typed yet: none
MODULES = [p for p in sorted((ROOT/"softnce").rglob("*.py")) if p.name != "_modidx.py"]


# ---------------------------------------------------------------- signatures
def public(tree):
    "Functions, methods and constructors that a module's `__all__` gives away, with their names."
    names = next((ast.literal_eval(o.value) for o in tree.body
                  if isinstance(o, ast.Assign) and getattr(o.targets[0], "id", "") == "__all__"), [])
    for o in tree.body:
        if getattr(o, "name", None) not in names: continue
        if isinstance(o, ast.FunctionDef): yield o.name, o, 0
        for m in o.body if isinstance(o, ast.ClassDef) else ():
            if isinstance(m, ast.FunctionDef) and (m.name == "__init__" or not m.name.startswith("_")):
                yield f"{o.name}.{m.name}", m, not any(getattr(d, "id", "") == "staticmethod" for d in m.decorator_list)


def untyped(function, skip):
    "Its parameters without a type, or with None as default and a type without it; and `->` where it says no result."
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    pairs = list(zip(plain, [*[None]*(len(plain) - len(a.defaults)), *a.defaults]))[skip:]
    pairs += [*zip(a.kwonlyargs, a.kw_defaults), *((o, None) for o in (a.vararg, a.kwarg) if o)]
    for o, default in pairs:
        said = "" if o.annotation is None else ast.unparse(o.annotation)
        optional = isinstance(default, ast.Constant) and default.value is None
        if not said or said == "None" or optional and said != "Any" and "None" not in said: yield o.arg
    if function.returns is None and function.name != "__init__": yield "->"


def faults(source):
    found = ((name, list(untyped(o, skip))) for name, o, skip in public(ast.parse(source)))
    return [f"{name}: {', '.join(bad)}" for name, bad in found if bad]


def name(path): return str(path.relative_to(ROOT/"softnce").with_suffix(""))


@pytest.mark.parametrize("path", [p for p in MODULES if name(p) not in LATER], ids=name)
def test_every_public_signature_is_typed(path): assert not faults(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", sorted(LATER))
def test_what_is_not_typed_yet_is_known(module):
    "A module that is typed leaves the list."
    assert faults((ROOT/"softnce"/f"{module}.py").read_text(encoding="utf-8"))


def test_a_signature_without_types_is_found():
    source = """
__all__ = ['f', 'C']
def f(a, b:int, c:str=None, *args, d:'int|None'=None, e=1, g:Any=None, **kw)->int: pass
class C:
    def __init__(self, x): pass
    def m(self, y:None): pass
    def _private(self, z): pass
    @staticmethod
    def s(w)->int: pass
def unlisted(v): pass
"""
    assert faults(source) == ["f: a, c, e, args, kw", "C.__init__: x", "C.m: y, ->", "C.s: w"]


# ---------------------------------------------------------------- stubs
def test_stubs_are_what_the_modules_give():
    made = stubs.stubs(ROOT)
    assert sorted(made) == sorted((ROOT/"softnce").rglob("*.pyi")) and ROOT/"softnce"/"__init__.pyi" in made
    for path, text in made.items(): assert path.read_text(encoding="utf-8") == text, "python tools/stubs.py"


@pytest.mark.parametrize("package", ["softnce", "softnce.training", "softnce.theory", "softnce.runs"])
def test_stubs_name_what_there_is(package):
    "What `dir` of the running package says, name by name."
    tree = ast.parse((ROOT/Path(*package.split("."))/"__init__.pyi").read_text(encoding="utf-8"))
    named = {a.asname for o in tree.body if isinstance(o, ast.ImportFrom) and o.level for a in o.names}
    here = set(dir(importlib.import_module(package)))
    assert named == here - {"__version__"} and ("__version__" in here) == (package == "softnce")


def test_the_package_says_that_it_has_types(): assert (ROOT/"softnce"/"py.typed").read_bytes() == b""


# ---------------------------------------------------------------- checkers
SCRIPT = """
import torch
from torch import Tensor, nn

import softnce
from softnce import (ClosedForm, ExpectedInfoNCE, Fresh, InfoNCE, Queue, SoftTargetCrossEntropy, SoftTargetInfoNCE,
                     SparseTargets, collate, empirical_noise, expected_info_nce, info_nce, linear_soft_target_info_nce,
                     mix, nll, one_hot, smooth, soft_target_cross_entropy, soft_target_info_nce)
from softnce.distributed import micro_batch_noise
from softnce.training import TrainConfig

K = 10
labels = torch.arange(8)
logits = torch.zeros(8, K, requires_grad=True)
eta: Tensor = empirical_noise(labels, K, floor=.01)
dense = smooth(one_hot(labels, K), epsilon=.1)
sparse: SparseTargets = SparseTargets.from_labels(labels, K)
rows: list[SparseTargets] = [row for row in sparse]
same: SparseTargets = SparseTargets.cat(rows)[:].to("cpu").pin_memory()
batch = collate([(0, rows[0]), (1, rows[1])])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, K)
        self.loss = SoftTargetInfoNCE(noise_probs=eta, temperature=torch.tensor(1.), noise_samples=Queue(16))

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.head(x), targets)
        return loss

    def predict(self, x: Tensor) -> Tensor:
        return self.loss.probs(self.head(x), epsilon=.1, targets="labels")


for criterion in (SoftTargetCrossEntropy(), InfoNCE(eta, reduction="sum"), ExpectedInfoNCE(None, 2., ClosedForm())):
    value: Tensor = criterion(logits, labels)
total: Tensor = (soft_target_info_nce(logits, mix(dense, .7), noise_probs=eta, noise_samples=Fresh(8))
                 + soft_target_cross_entropy(logits, same) + info_nce(logits, labels, temperature=2.)
                 + expected_info_nce(logits, dense, generator=torch.Generator()) + nll(logits, labels)
                 + linear_soft_target_info_nce(torch.zeros(8, 3), torch.zeros(K, 3), sparse, bias=None))
for source in micro_batch_noise([labels[:4], labels[4:]]):
    part: Tensor = soft_target_info_nce(logits[:4], labels[:4], noise_samples=source)
config = TrainConfig(epochs=2)
lr: float = config.lr
version: str = softnce.__version__
print(value, total, lr, version, batch, config, softnce.losses.nll)
"""
WRONG = """
import torch
from softnce import SparseTargets, SoftTargetInfoNCE, soft_target_info_nce

soft_target_info_nce(torch.zeros(2, 3), "labels")
number: int = soft_target_info_nce(torch.zeros(2, 3), torch.tensor([0, 1]))
SoftTargetInfoNCE(temprature=2.)
SparseTargets.from_labels([0, 1], 3)
"""


def user(tmp_path, text):
    "A user's script in a folder of its own, with its lines that are wrong by a checker's output."
    (tmp_path/"user.py").write_text(text)
    return tmp_path/"user.py"


def mypy(script, cache):
    cmd = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", cache,
           "--no-error-summary", "--no-color-output", script.name]
    env = dict(PATH="/usr/bin:/bin", MYPYPATH=str(ROOT))
    done = subprocess.run(cmd, cwd=script.parent, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def pyright(script):
    settings = dict(include=[script.name], typeCheckingMode="strict", extraPaths=[str(ROOT)])
    (script.parent/"pyrightconfig.json").write_text(json.dumps(settings))
    cmd = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(cmd, cwd=script.parent, capture_output=True, text=True)
    said = json.loads(done.stdout)
    assert said["summary"]["filesAnalyzed"] == 1
    return [f"{o['range']['start']['line']+1}: {o['message']}" for o in said["generalDiagnostics"]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory): return tmp_path_factory.mktemp("mypy")


typed = pytest.mark.xfail(bool(LATER & {"losses", "distributed"}), reason="signatures of the losses", strict=True)


@typed
def test_mypy_takes_a_users_script(tmp_path, cache): assert mypy(user(tmp_path, SCRIPT), cache) == []


def test_mypy_finds_what_is_wrong(tmp_path, cache):
    assert sorted({int(line.split(":")[1]) for line in mypy(user(tmp_path, WRONG), cache)}) == [5, 6, 7, 8]


@typed
def test_pyright_takes_a_users_script(tmp_path): assert pyright(user(tmp_path, SCRIPT)) == []


def test_pyright_finds_what_is_wrong(tmp_path):
    assert sorted({int(line.split(":")[0]) for line in pyright(user(tmp_path, WRONG))}) == [5, 6, 7, 8]


def test_the_users_script_runs(tmp_path, monkeypatch):
    import torch
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # a machine without a card has no pinned memory
    exec(compile(SCRIPT, "user.py", "exec"), {"__name__": "user"})
