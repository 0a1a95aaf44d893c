"What the site does to a notebook beyond nbdev: used by docs.py and nbfilter.py."
import ast, re
from functools import cache
from pathlib import Path

from execnb.nbio import mk_cell
from nbdev import processors
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import FilterDefaults

import api

LONG = 30  # lines of source; more are folded
DEFS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef


def narrow(lines, node):
    "The lines of a definition with the parameters of each function below its name, not behind it."
    for f in [o for o in ast.walk(node) if isinstance(o, DEFS[:2])]:
        first, last = f.lineno-1, f.body[0].lineno-2  # the lines of the signature
        if last <= first: continue
        head, *rest = lines[first:last+1]
        name, start = head[:f.col_offset], head[f.col_offset:].index("(")+1+f.col_offset
        rows = [o.strip() for o in [head[start:], *rest]]
        ends = [o if o.startswith(")") else f"    {o}" for o in rows]
        lines[first:last+1] = ["\0".join([head[:start], *(name + re.sub(r"\s{2,}#", "  #", o) for o in ends)]),
                               *["\1"]*(last-first)]
    return [part for o in lines for part in o.split("\0") if o != "\1"]


def definitions(cell):
    "The public functions and classes of an exported cell, with their source; not those that `@patch` puts elsewhere."
    if cell.cell_type != "code" or "export" not in cell.directives_: return
    for o in cell.parsed_() or []:
        if not isinstance(o, DEFS) or o.name.startswith("_"): continue
        if any(getattr(d, "id", "") == "patch" for d in o.decorator_list): continue
        start = min(n.lineno for n in [o, *o.decorator_list])
        lines = cell.source.splitlines()
        lines[o.end_lineno:], lines[:start-1] = [], ["\1"]*(start-1)
        yield o.name, "\n".join(narrow(lines, o))


class add_sources(Processor):
    """Show every exported function and class as it is written, under a heading of its name, with a link to its entry.
    The heading is as deep as its place: below the title, or below a section."""
    def begin(self):
        cells, self.nb.has_docs_ = self.nb.cells, False  # nothing has to be run for it
        opens = (i for i, c in enumerate(cells) if c.cell_type == "markdown" and re.search("^## ", c.source, re.M))
        first = next(opens, len(cells))  # place of the first section
        for i, c in reversed(list(enumerate(cells))):
            for name, source in reversed(list(definitions(c))):
                to = f"\n\n[API](../api/{pages()[name]}.html#{name})" if name in pages() else ""
                text = f"```python\n{source}\n```"
                if text.count("\n") > LONG:
                    text = f"<details><summary>Source of {name}</summary>\n\n{text}\n\n</details>"
                head = "##" if i < first else "###"
                cells.insert(i+1, mk_cell(f"{head} {name} {{#{name}}}\n\n{text}{to}", "markdown"))


@cache
def pages():
    "The page of the API for every name that has an entry."
    return api.Api().pages


def up(notebook):
    "The way from a notebook's page to the site's root."
    return "../"*(len(notebook.relative_to(get_config().nbs_path).parts)-1)


WORDS = {"losses", "peers", "targets", "noise", "calibration"}  # pages whose names are no words of everyday use


def to_entry(name, root):
    "The address of a name's entry; None where it has none, or where a word of everyday use means another thing."
    name = name.split(".")[-1] if name.startswith("softnce.") else name
    page = pages().get(name)
    telling = page in WORDS or "_" in name or name != name.lower()
    return f"{root}api/{page}.html#{name}" if page and telling else None


def linked(text, root="../"):
    "Names in backticks, in prose, link to their entries; code, maths, links and headings stay as they are."
    def to(m): return f"[{m[0]}]({at})" if (at := to_entry(m[1], root)) else m[0]
    parts = re.split(r"(```.*?```|\$\$.*?\$\$|\[[^\]]*\]\([^)]*\)|^#[^\n]*$)", text, flags=re.S | re.M)
    return "".join(o if i % 2 else re.sub(r"(?<![`\w])`([\w.]+)`(?!`)", to, o) for i, o in enumerate(parts))


GLOSSARY = "theory/notation"  # the page, and its words with their anchors
TERMS = {"noise distribution": "noise-distribution", "noise samples?": "noise-sample", "candidates?": "candidate",
         "in-batch": "in-batch", "read-outs?": "read-out"}
# not a word of the glossary: code, maths, links, headings and quotations of the title's cell
APART = re.compile(r"(```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|!?\[[^\]]*\]\([^)]*\)|^[#>][^\n]*$)", re.S | re.M)


def explained(text, left, root="../"):
    "The first use of each word of `left` links to the glossary; `left` loses the words that were found."
    parts = APART.split(text)
    for term in list(left):
        for i in range(0, len(parts), 2):
            word = re.search(rf"(?<![\w-]){term}(?![\w-])", parts[i], re.I)
            if not word: continue
            link = f"[{word[0]}]({root}{GLOSSARY}.html#{TERMS[term]})"
            parts[i:i+1] = [parts[i][:word.start()], link, parts[i][word.end():]]
            left.remove(term)
            break
    return "".join(parts)


class add_links(Processor):
    "Link what stands in backticks, and in what readers start with the first use of a word to the glossary."
    def begin(self):
        self.root = up(Path(self.nb.path_))
        path = Path(self.nb.path_).relative_to(get_config().nbs_path)
        self.left = list(TERMS) if path.parts[0] in ("guides", "experiments", "results", "index.ipynb") else []
    def cell(self, cell):
        if cell.cell_type != "markdown": return
        cell.source = explained(linked(cell.source, self.root), self.left, self.root)


def page_after_file(cell):
    "Name the page after its notebook, in both renderers."
    if cell.cell_type == "raw": cell.source = re.sub(r"^output-file:.*\n", "", cell.source, flags=re.M)


class Procs(FilterDefaults):
    "nbdev's processors, with the three above: sources in the place of entries, for which the notebook was run."
    def base_procs(self):
        ours = {processors.add_show_docs: add_sources, processors.add_links: add_links}
        gone = processors.clean_show_doc, processors.exec_show_docs
        return [ours.get(o, o) for o in super().base_procs() if o not in gone] + [page_after_file]
