"""Check the working tree as it is, and say what mends it.

Package and README are what the notebooks give, and the house rules (tools/rules.py) are kept.
Nothing in the tree is changed: cleaning and exporting happen in a temporary copy, which is then compared.
`--all` shows every finding, where there are many.
"""
import difflib, shutil, subprocess, sys, tempfile
from pathlib import Path

import api
import rules
import stubs
from common import ROOT, notebooks
from readme import readme

REMAKE = "import nbdev.clean as c, nbdev.doclinks as d; c.nbdev_clean.__wrapped__(); d.nbdev_export.__wrapped__()"
SHOWN = 12  # findings of one rule that are shown


def made_files(root):
    "The files that `make export` writes, by name, with their text."
    made = [p for end in ("*.py", "*.pyi") for p in sorted((root/"softnce").rglob(end))]
    paths = [*notebooks(root), *made, root/"pyproject.toml", root/"README.md"]
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
        stubs.main(tmp)
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
            diff = difflib.unified_diff(a.splitlines(), b.splitlines(), lineterm="", n=0)
            changed = [f"    {o[:150]}" for o in diff if o[:2] not in ("--", "++", "@@")]
            yield "\n".join([f"{name}: not what the notebooks give", *changed[:6]])


RULES = {  # the checks, and what mends what they find
    stale: "make export",
    rules.notebooks_keep_the_rules: "edit these notebooks",
    rules.contracts: "move code to the layer that it belongs to; what two neighbours share stands below both",
    rules.style: "edit the notebooks, then make export; `ruff check` lists all",
    rules.scripts: "break these lines",
    rules.short_functions: "make two functions where one does two things",
    rules.short_modules: "make two notebooks where one has two subjects",
    rules.few_at_the_top: "put the module into a folder",
    rules.short_sections: "make two sections",
    rules.needed_names: "use #| exporti, or say on the folder's first page what the name is for",
    api.described: "say in the comment at the parameter's line what it is, its shape and range; then make export",
    api.known: "say it in the definition's comments and docstring, or mend the page in nbs/api/",
    api.listed: "add it to a page in nbs/api/, or to HELPERS in tools/api.py",
}


def main(root=ROOT, every=False):
    "Run every check; exit with 1 where one finds something."
    failed = False
    for check, remedy in RULES.items():
        found = list(check(root))
        for o in found if every else found[:SHOWN]: print(o)
        if len(found) > SHOWN and not every: print(f"... and {len(found)-SHOWN:,} more: python tools/check.py --all")
        if found: print(f"=> {remedy}\n", flush=True)
        failed = failed or bool(found)
    if failed: sys.exit(1)
    print(f"{len(notebooks(root))} notebooks are clean and exported, {len(rules.modules(root))} modules "
          "keep the house rules, and README.md is current")


if __name__ == "__main__": main(every="--all" in sys.argv[1:])
