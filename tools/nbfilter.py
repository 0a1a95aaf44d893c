"Quarto ipynb filter: what tools/docs.py does to a notebook, for a plain `quarto render` at the top of the repository."
import os, sys
from contextlib import redirect_stdout
from json import loads
from pathlib import Path

from execnb.nbio import dict2nb, nb2str
from nbproc import Procs

txt = sys.stdin.read()
# Quarto sends the text but not the name: it runs the filter in the notebook's folder.
src = next((p for p in Path().glob("*.ipynb") if p.read_text(encoding="utf-8") == txt), None)
os.environ["IN_TEST"] = "1"
nb = dict2nb(loads(txt))
nb.path_ = src.absolute() if src else Path("unknown.ipynb")
with open(os.devnull, "w") as dn, redirect_stdout(dn): Procs()(nb)
print(nb2str(nb), flush=True)
