"""Build the sdist and from it the wheel, check both, and use the wheel outside the tree with torch and numpy only.

The environment for that, .venv-light, is made once. `--keep DIR` keeps what was built.
"""
import os, shutil, subprocess, sys, tempfile, venv
from pathlib import Path

from common import ROOT

LIGHT = ROOT/".venv-light"
TORCH = "torch==2.13.0"  # a CPU build where there is one; any version that settings.ini allows will do
PYTHON = LIGHT/"bin"/"python"
LARGEST = 700_000  # bytes: twice what a wheel had when the outputs of the notebooks left it
PIP = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]

USE = """
import importlib.resources, sys, torch, softnce
from pathlib import Path
assert "site-packages" in Path(softnce.__file__).parts, f"softnce came from the tree: {softnce.__file__}"
for name in "targets noise losses calibration".split(): importlib.import_module(f"softnce.{name}")
from softnce import SoftTargetInfoNCE, SparseTargets
logits = torch.zeros(4, 3, requires_grad=True)
loss = SoftTargetInfoNCE()(logits, torch.eye(3)[[0, 1, 2, 0]])
torch.testing.assert_close(loss, torch.tensor(4.).log())  # equal scores: one of four candidates
loss.backward()
heavy = "timm torchvision torch_geometric sklearn matplotlib pandas papermill typer IPython".split()
found = [o for o in heavy if o in sys.modules]
assert not found, f"import softnce pulls in {found}"
files = importlib.resources.files("softnce")/"experiments"
print("softnce", softnce.__version__, "from a wheel: loss", round(loss.item(), 4), "= log 4,",
      len([o for o in files.iterdir() if o.name.endswith(".ipynb")]), "experiments inside")
"""
# all names: they are lazy
TIME = "import time, torch; t = time.perf_counter(); from softnce import *; print(time.perf_counter()-t)"


def run(*cmd, cwd, **kw):
    "Run a command; where it fails, show what it said and stop."
    res = subprocess.run(list(map(str, cmd)), cwd=cwd, text=True, capture_output=True, **kw)
    if res.returncode: sys.exit(f"{' '.join(map(str, cmd[:4]))} ... failed:\n{res.stdout}{res.stderr}")
    return res.stdout


def light():
    "The environment with torch and numpy, and nothing of ours."
    ready = LIGHT/".ready"
    if ready.exists() and ready.read_text() == TORCH: return
    print(f"== setting up {LIGHT.name}: {TORCH} and numpy (a minute, once)", flush=True)
    venv.create(LIGHT, with_pip=True, clear=True)
    run(*PIP, TORCH, "numpy", cwd=ROOT)
    ready.write_text(TORCH)


def check_packages(folder):
    "The sdist and the wheel of a folder are what the package index takes, and small. Returns the wheel."
    packages = sorted(Path(folder).glob("softnce-*"))  # a "-py3" sorts before a ".tar"
    print(run(sys.executable, "-m", "twine", "check", "--strict", *packages, cwd=folder).strip())
    for p in packages:
        print(f"{p.name}: {p.stat().st_size/1e6:.2f} MB")
        if p.stat().st_size > LARGEST: sys.exit(f"{p.name} has more than {LARGEST/1e6} MB: what is it that grew?")
    return packages[0]


def main(keep=None):
    light()
    with tempfile.TemporaryDirectory() as tmp:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        run(sys.executable, "-m", "build", "--outdir", tmp, ROOT, cwd=tmp)  # an sdist, and from it the wheel
        wheel = check_packages(tmp)
        run(*PIP, "--no-deps", "--force-reinstall", wheel, cwd=tmp)
        print(run(PYTHON, "-c", USE, cwd=tmp, env=env).strip())
        times = sorted(float(run(PYTHON, "-c", TIME, cwd=tmp, env=env)) for _ in range(5))
        print(f"from softnce import * takes {times[2]:.3f} s on top of import torch (median of five)")
        cli = subprocess.run([LIGHT/"bin"/"softnce", "list"], cwd=tmp, env=env, text=True, capture_output=True)
        said = cli.stdout + cli.stderr
        if cli.returncode == 0 or "Traceback" in said or "'softnce[nbs]'" not in said:
            sys.exit("without its extra, `softnce list` should name it ('softnce[nbs]'); "
                     f"it said (exit {cli.returncode}):\n{said}")
        print("the softnce command says which extra to install:", said.strip().splitlines()[-1])
        print(run(LIGHT/"bin"/"softnce", "--version", cwd=tmp, env=env).strip())
        if keep:
            Path(keep).mkdir(parents=True, exist_ok=True)
            for p in Path(tmp).glob("softnce-*"): shutil.copy(p, keep)


if __name__ == "__main__": main(sys.argv[2] if sys.argv[1:2] == ["--keep"] else None)
