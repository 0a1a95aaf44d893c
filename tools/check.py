"""Check the working tree as it is, and say what mends it: notebooks clean, package and README current, house rules kept.

Nothing in the tree is changed: cleaning and exporting happen in a temporary copy, which is then compared.
"""
import ast, difflib, json, re, shutil, subprocess, sys, tempfile
from pathlib import Path

from common import ROOT, notebooks, read
from readme import readme

REMAKE = "import nbdev.clean as c, nbdev.doclinks as d; c.nbdev_clean.__wrapped__(); d.nbdev_export.__wrapped__()"
MAX_CELLS, MAX_OUTPUT = 60, 1_000_000  # cells; characters of outputs in a notebook
LOCAL = re.compile(r"(?<![\w.:/-])/(?:work|tmp|root|home|Users|private|mnt)/[\w.-]+|\b[A-Z]:\\Users")


def made_files(root):
    "The files that `make export` writes, by name, with their text."
    paths = [*notebooks(root), *sorted((root/"softnce").rglob("*.py")), root/"pyproject.toml", root/"README.md"]
    return {str(p.relative_to(root)): p.read_text(encoding="utf-8") for p in paths if p.exists()}


def remade_files(root):
    "The same after cleaning, exporting and writing the README, in a copy that starts without the modules."
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)/"copy"
        (tmp/"softnce").mkdir(parents=True)
        for name in ["settings.ini", "pyproject.toml", "softnce/__init__.py"]: shutil.copy(root/name, tmp/name)
        for p in notebooks(root):
            (tmp/p.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, tmp/p.relative_to(root))
        res = subprocess.run([sys.executable, "-c", REMAKE], cwd=tmp, capture_output=True, text=True)
        if res.returncode: sys.exit(f"the notebooks cannot be exported:\n{res.stderr.strip()}")
        (tmp/"README.md").write_text(readme(tmp), encoding="utf-8")
        return made_files(tmp)


def stale(root=ROOT):
    "What `make export` would change."
    old, new = made_files(root), remade_files(root)
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if a == b: continue
        if a is None: yield f"{name}: missing"
        elif b is None: yield f"{name}: no notebook makes this file; delete it"
        else:
            diff = [o for o in difflib.unified_diff(a.splitlines(), b.splitlines(), lineterm="", n=0) if o[:2] not in ("--", "++", "@@")]
            yield "\n".join([f"{name}: not what the notebooks give"] + [f"    {o[:150]}" for o in diff[:6]])


def mixed_import(cell):
    "Whether a cell that is not exported holds imports and other code: nbdev would run it when the site is built."
    if re.search(r"^#\|\s*(export|eval:\s*false)", cell["source"], re.M): return False
    try: stmts = ast.parse(cell["source"]).body
    except SyntaxError: return False  # a magic or a shell line
    has_import = any(isinstance(o, (ast.Import, ast.ImportFrom)) for s in stmts for o in ast.walk(s))
    return has_import and not all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in stmts)


def texts(cell):
    "What a reader of a cell sees as text: its source and its outputs, pictures left out."
    yield cell["source"]
    for o in cell.get("outputs", []):
        data = {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")}
        yield json.dumps([o.get("text", ""), data, o.get("traceback", "")])


def faults(path):
    "The house rules that a notebook breaks."
    nb = read(path)
    cells, first = nb["cells"], nb["cells"][0]
    code = [c for c in cells if c["cell_type"] == "code"]
    if first["cell_type"] != "markdown" or not re.fullmatch(r"# .+\n\n> .+(\n\n(- .+: .+\n?)+)?", first["source"].strip()):
        yield "the first cell must hold `# Title`, a blank line and `> one-line subtitle`, and nothing else"
    if len(cells) > MAX_CELLS: yield f"{len(cells)} cells, at most {MAX_CELLS} are allowed"
    size = sum(len(json.dumps(c["outputs"])) for c in code)
    if size > MAX_OUTPUT: yield f"outputs of {size:,} characters, at most {MAX_OUTPUT:,} are allowed"
    tagged = sum("parameters" in c["metadata"].get("tags", []) for c in code)
    if path.parent.name == "experiments" and tagged != 1: yield f"{tagged} cells are tagged `parameters`, an experiment needs exactly one"
    text = "\n".join(c["source"] for c in code)
    if text.rfind("set_default_dtype(torch.float64)") > text.rfind("set_default_dtype(torch.float32)"):
        yield "sets the default dtype and leaves it so for the next notebook of nbdev_test: end with torch.set_default_dtype(torch.float32)"
    exports = any("#| default_exp" in c["source"] for c in code)
    for n, c in enumerate(cells):
        if any(o["output_type"] == "error" for o in c.get("outputs", [])): yield f"cell {n} holds an error output"
        for m in {m[0] for t in texts(c) for m in LOCAL.finditer(t)}: yield f"cell {n} holds a local path: {m}"
        if exports and c["cell_type"] == "code" and mixed_import(c): yield f"cell {n} mixes imports with other code: give the imports a cell of their own"


def main():
    problems = [f"{p.relative_to(ROOT)}: {o}" for p in notebooks() for o in faults(p)]
    old = list(stale())
    for o in problems + old: print(o)
    if old: print("=> make export")
    if problems: print("=> edit these notebooks")
    if problems or old: sys.exit(1)
    print(f"{len(notebooks())} notebooks are clean and exported, and README.md is current")


if __name__ == "__main__": main()
