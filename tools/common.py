"What the checks share: the notebooks of the repository."
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notebooks(root=ROOT):
    "The repository's notebooks, as nbdev sees them: no name on the way starts with a dot or an underscore."
    nbs = root/"nbs"
    return [p for p in sorted(nbs.rglob("*.ipynb")) if not any(o[0] in "._" for o in p.relative_to(nbs).parts)]


def read(path):
    "A notebook's JSON, with every cell's source as one string."
    nb = json.loads(path.read_text(encoding="utf-8"))
    for c in nb["cells"]: c["source"] = "".join(c["source"])
    return nb
