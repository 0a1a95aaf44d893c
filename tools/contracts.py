"A contract for import-linter (pyproject.toml names it): no module imports itself, by whatever way round."
import ast
from pathlib import Path

from importlinter import Contract, ContractCheck, output

LAZY = "_lazy"  # softnce's helper with which a folder's front offers its modules' names, each imported on first use


def offered(front):
    "The modules whose names a front, `__init__.py`, offers lazily: those that its call of `_lazy` names."
    path = Path(*front.split("."), "__init__.py")
    if not path.exists(): return []
    calls = [o for o in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(o, ast.Call)]
    return [f"{front}.{a.value}" for c in calls if getattr(c.func, "id", "") == LAZY
            for a in c.args[1:] if isinstance(a, ast.Constant)]


def only_lazy(graph, importer, imported):
    "Whether a module imports nothing but the helper `_lazy`, which needs none of the modules that a front offers."
    lines = [o["line_contents"] for o in graph.get_import_details(importer=importer, imported=imported)]
    return bool(lines) and all(o.startswith("from ") and o.split("import")[-1].strip() == LAZY for o in lines)


def complete(graph):
    "The graph with what Python does and grimp does not see: a front imports what it offers."
    for front in list(graph.modules):
        for module in offered(front):
            if module in graph.modules: graph.add_import(importer=front, imported=module)
    for importer in list(graph.modules):
        for imported in graph.find_modules_directly_imported_by(importer):
            if only_lazy(graph, importer, imported): graph.remove_import(importer=importer, imported=imported)
    return graph


def cycles(graph):
    "For every import that stands on a cycle the shortest one, each once; a cycle ends with the module it starts with."
    found = {}
    for importer in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(importer) - {importer}):
            chain = graph.find_shortest_chain(importer=imported, imported=importer)
            if chain: found.setdefault(frozenset(chain), [importer, *chain])
    return list(found.values())


class NoCycle(Contract):
    "Modules form no cycle: also within a folder, through a folder's front, or by an import inside a function."
    type_name = "no_cycle"

    def check(self, graph, verbose):
        found = cycles(complete(graph))
        return ContractCheck(kept=not found, metadata={"cycles": found})

    def render_broken_contract(self, check):
        for cycle in check.metadata["cycles"]: output.print_error(" -> ".join(cycle))
