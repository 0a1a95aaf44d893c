"What the site does to a notebook beyond nbdev: used by docs.py and nbfilter.py."
import ast, re
from functools import cache

from execnb.nbio import mk_cell
from common import notebooks, read
from nbdev import processors
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, add_show_docs

LONG = 30  # lines of source; more are folded
DEFS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef


def body(src, node):
    "The source of a function without signature and docstring, which its entry shows; of a class without docstring."
    lines = src.splitlines()
    doc = node.body[0] if ast.get_docstring(node) is not None else None
    stmts = node.body[1:] if doc else node.body
    if not stmts: return ""
    if isinstance(node, ast.ClassDef):
        start = min(o.lineno for o in [node, *node.decorator_list])
        skip = range(doc.lineno, doc.end_lineno+1) if doc else ()
        return "\n".join(l for n, l in enumerate(lines, 1) if start <= n <= node.end_lineno and n not in skip)
    first = stmts[0]
    if lines[first.lineno-1][:first.col_offset].strip():  # on the line of the signature
        return "    " + ast.get_source_segment(src, first)
    return "\n".join(lines[doc.end_lineno if doc else first.lineno-1:node.end_lineno])


class add_bodies(Processor):
    "Put the body of every exported function below its `show_doc`."
    def begin(self):
        cells = self.nb.cells
        code = {o.name: body(c.source, o) for c in cells if c.cell_type == "code" and "export" in c.directives_
                for o in c.parsed_() or [] if isinstance(o, DEFS)}
        for i, c in reversed(list(enumerate(cells))):
            m = c.cell_type == "code" and re.match(r"show_doc\((\w+)", c.source)
            if not m or not code.get(m[1]): continue
            txt = f"```python\n{code[m[1]]}\n```"
            if txt.count("\n") > LONG: txt = f"<details><summary>Source of {m[1]}</summary>\n\n{txt}\n\n</details>"
            cells.insert(i+1, mk_cell(txt, "markdown"))


@cache
def entries():
    "Anchors of the names that have an entry on the site: functions and classes of cells marked `export`."
    cells = [c["source"] for path in notebooks() for c in read(path)["cells"] if c["cell_type"] == "code"]
    public = "\n".join(c for c in cells if re.search(r"^#\|\s*export\b", c, re.M))
    return {name.lower() for name in re.findall(r"^(?:def|class) (\w+)", public, re.M)}


def linked(text):
    "nbdev's links to what stands in backticks, where that has an entry: helpers and methods have none."
    def keep(m): return m[0] if m[2].lower() in entries() else m[1]
    return re.sub(r"\[(`[^`\]]+`)\]\([^)\s]*\.html#([\w.]+)\)", keep, NbdevLookup().linkify(text))


def add_links(cell):
    "nbdev's links to the entries of what stands in backticks, but none inside the code of a signature."
    if cell.cell_type == "markdown": cell.source = linked(cell.source)
    for o in cell.get("outputs", []):
        if "text/markdown" in o.get("data", {}):
            o.data["text/markdown"] = linked("".join(o.data["text/markdown"])).splitlines(True)


def page_after_file(cell):
    "Name the page after its notebook, in both renderers."
    if cell.cell_type == "raw": cell.source = re.sub(r"^output-file:.*\n", "", cell.source, flags=re.M)


class Procs(FilterDefaults):
    "nbdev's processors, with the three above."
    def base_procs(self):
        procs = [add_links if o is processors.add_links else o for o in super().base_procs()]
        procs.insert(procs.index(add_show_docs)+1, add_bodies)
        return procs + [page_after_file]
