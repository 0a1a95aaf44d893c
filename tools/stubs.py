"""Write the stubs of the packages whose names are imported on first use: `__init__.pyi`, which type checkers read.

A stub names what `_lazy` finds, module by module; `tools/check.py` fails where one is not current.
"""
import ast

from common import ROOT

HEAD = '"""What {name} offers, for type checkers. Made by tools/stubs.py from the modules; do not edit."""\n'
TOP = "from typing import Any\n\n__version__: str\ndef _lazy(package: str, *modules: str) -> Any: ...\n"


def lazy_modules(front):
    "The modules of a package that `_lazy` is given, in order; None where it is not called."
    for o in ast.walk(ast.parse(front.read_text(encoding="utf-8"))):
        if isinstance(o, ast.Call) and getattr(o.func, "id", "") == "_lazy":
            return [a.value for a in o.args[1:]]


def public_names(module):
    "A module's `__all__`, without importing it."
    for o in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(o, ast.Assign) and getattr(o.targets[0], "id", "") == "__all__": return ast.literal_eval(o.value)
    return []


def stub(front):
    "The text of a package's stub: its modules, and each name from the first module that has it."
    modules = lazy_modules(front)
    offered = {module: public_names(front.parent/f"{module}.py") for module in modules}
    lines, seen = [], {m for m in modules if m not in offered[m]}  # of a module and its name called alike, the name
    for module in modules:
        if module in seen: lines.append(f"from . import {module} as {module}")
        names = [n for n in offered[module] if n not in seen]
        lines += [f"from .{module} import {n} as {n}" for n in sorted(names)]
        seen.update(names)
    top = front.parent.name == "softnce"
    return HEAD.format(name=front.parent.name) + TOP*top + "\n".join(lines) + "\n"


def stubs(root=ROOT):
    "The stubs of a tree: their paths, with their text."
    fronts = [p for p in sorted((root/"softnce").rglob("__init__.py")) if lazy_modules(p)]
    return {p.with_suffix(".pyi"): stub(p) for p in fronts}


def main(root=ROOT):
    made = stubs(root)
    for path in sorted((root/"softnce").rglob("*.pyi")):
        if path not in made: path.unlink()
    for path, text in made.items(): path.write_text(text, encoding="utf-8")


if __name__ == "__main__": main()
