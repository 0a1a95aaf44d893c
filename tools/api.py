"""Write the pages of the API: what stands in nbs/api/*.md, with each name's signature, parameters and errors filled in.

A page names what it lists, `### softnce.nll` or `### softnce.NLL: forward, probs` with the methods that a user calls;
below it may stand words, a formula, and an example as a doctest. The rest is read from the source (signatures.py).
"""
import re, textwrap
from dataclasses import dataclass
from functools import cache

import stubs
from common import ROOT, notebooks, read
from rules import sidebar
from rules import pages as in_order
from signatures import SHARED, Class, Function, Package, public_names

ENTRY = re.compile(r"^### (softnce(?:\.\w+)*)\.(\w+)(?:: (.+))?$")
OVERVIEW = "<!-- overview -->"  # stands where the names of all pages come
ERROR = re.compile(r"\b(?:\w+(?:Error|Warning)|StopRequested|RunFailed|RunStopped|RunLocked)\b")
EQUATION = re.compile(r"Eqs?\. \((\d+)\)")
WIDTH = 72  # columns of a signature: what fits beside sidebar and contents at 1280 pixels
# Used between the rooms of the package, or by its own experiments; nobody needs them to use it.
HELPERS = {
    "softnce.candidates", "softnce.contrast", "softnce.experiments", "softnce.rows", "softnce.runs.preflight",
    "softnce.runs.model_folder", "softnce.runs.pages", "softnce.runs.sweeps", "softnce.runs.ledgers",
    "softnce.vision.files", "softnce.vision.judged", "softnce.vision.checks", "softnce.text.definitions",
    *("softnce.calibration." + o for o in ["bin_index"]),
    *("softnce.noise." + o for o in ["noise_of"]),
    *("softnce.distributed." + o for o in ["MicroBatch"]),
    *("softnce.sparse." + o for o in ["has_values", "value_checks", "checks_values"]),
    *("softnce.targets." + o for o in ["drawn"]),
}


@dataclass(frozen=True)
class Entry:
    "A name on a page, and what the page says of it."
    package: str      # from which it is imported
    name: str
    methods: tuple    # that are shown
    page: str         # stem of the page's file
    section: str
    said: str         # the page's own words below the heading


def pages(root=ROOT):
    "The sources of the pages, by stem."
    return {p.stem: p.read_text(encoding="utf-8") for p in sorted((root/"nbs"/"api").glob("*.md"))}


def entries(root=ROOT):
    "What the pages list, in order."
    for page, text in pages(root).items():
        section, lines = "", text.splitlines()
        for i, line in enumerate(lines):
            if line.startswith("## "): section = line[3:]
            if not (m := ENTRY.match(line)): continue
            end = next((j for j in range(i+1, len(lines)) if re.match(r"##", lines[j])), len(lines))
            methods = tuple(m[3].split(", ")) if m[3] else ()
            yield Entry(m[1], m[2], methods, page, section, "\n".join(lines[i+1:end]).strip())


class Api:
    "The entries of a tree with their definitions."
    def __init__(self, root=ROOT):
        self.root, self.package, self.entries = root, Package(root), list(entries(root))
        self.pages = {e.name: e.page for e in self.entries}
    def home(self, e):
        "The module that a package's name comes from; None where it has no such name."
        path = self.package.paths.get(e.package)
        if path is None: return None
        modules = stubs.lazy_modules(path) if path.name == "__init__.py" else None
        for module in [f"{e.package}.{m}" for m in modules] if modules else [e.package]:
            names = public_names(self.package.paths[module])
            if module == SHARED[0]: names = [*names, SHARED[1], "RowOptions"]  # of types only
            if e.name in names: return self.package.find(module, e.name)[0] or module
        return None
    def definition(self, e):
        module = self.home(e)
        return self.package.whole(module, e.name) if module else None

    # ------------------------------------------------------------ text
    def link(self, text):
        "Names in backticks that have an entry link to it."
        def to(m):
            page = self.pages.get(m[1].split(".")[-1])
            return f"[{m[0]}]({page}.html#{m[1].split('.')[-1]})" if page else m[0]
        text = re.sub(r"(?<!\[)`([\w.]+)`", to, text)
        plain = re.split(r"(`[^`]*`)", text)  # strings are code, not quotations
        coded = (o if i % 2 else re.sub(r"(?<!\w)(\w+=)?'(\w[\w.]*)'", r"`\1'\2'`", o) for i, o in enumerate(plain))
        return "".join(coded)
    def derivation(self, e):
        "The page that derives a name: the notebook that its definition was exported from."
        module = self.home(e)
        lines = self.package.paths[module].read_text(encoding="utf-8").splitlines()
        found = [i for i, o in enumerate(lines) if re.match(rf"(?:def|class) {e.name}\b|{e.name}\s*=", o)]
        above = [re.match(r"# %% (\S+nbs/)?(\S+)\.ipynb", o) for o in lines[:found[0]+1]] if found else []
        at = next((m[2] for m in reversed(above) if m), None)
        if at is None: return None
        return f"../{at}.html" + (f"#{e.name}" if e.name in headings(self.root/"nbs"/f"{at}.ipynb") else "")


@cache
def headings(path):
    "The names whose source a notebook's page shows, each below a heading of its name (nbproc.definitions)."
    cells = [c["source"] for c in read(path)["cells"] if re.search(r"^#\|\s*export\b", c["source"], re.M)]
    return {name for text in cells for name in re.findall(r"^(?:def|class) (\w+)", text, re.M)}


@cache
def equations(root=ROOT):
    "The display equations of the notebooks by their number, with the notebook."
    found = {}
    for path in notebooks(root):
        for c in read(path)["cells"]:
            for m in re.finditer(r"\$\$(.+?)\$\$", c["source"], re.S) if c["cell_type"] == "markdown" else ():
                for number in re.findall(r"\\tag\{(\d+)\}", m[1]): found.setdefault(number, m[1])
    return found


def equation(doc, root=ROOT):
    "The equation that a docstring names first."
    m = EQUATION.search(doc)
    tex = equations(root).get(m[1]) if m else None
    if not tex or "\n\n" in tex: return ""
    tex = re.sub(r"\s*\\tag\{[^}]*\}", "", tex).strip()
    return f"$$ {tex} $$"


def sentences(paragraph): return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", " ".join(paragraph.split()))


def parted(doc):
    "A docstring as what it says, in paragraphs, and the sentences on errors."
    said, errors = [], []
    for paragraph in doc.split("\n\n"):
        parts = sentences(paragraph)
        errors += [o for o in parts if ERROR.search(o)]
        plain = " ".join(o for o in parts if not ERROR.search(o))
        if plain: said.append(plain)
    if not said and errors: said = [errors.pop(0)]  # one sentence says both
    return said, errors


def call(path, f, prefix=""):
    "A signature: the names and defaults, wrapped."
    parts = []
    for i, p in enumerate(f.parameters):
        if f.keyword_from == i: parts.append("*")
        parts.append(p.name if p.default is None else f"{p.name}={p.default}")
    one = f"{prefix}{path}({', '.join(parts)})"
    if len(one) <= WIDTH: return one
    body = textwrap.fill(", ".join(o.replace(" ", "\0") for o in parts), WIDTH-4).replace("\0", " ")
    return f"{prefix}{path}(\n{textwrap.indent(body, '    ')})"


def typed(p):
    "A type and default as they are shown."
    kind = f"`{p.type}`" if p.type else ""
    return kind if p.default is None else f"{kind}, default `{p.default}`"


def term(api, name, kind, said): return f"**{name}**{': '*bool(kind)}{kind}\n:   {api.link(said)}\n"


def parameters(api, f):
    "The parameters as a list of definitions; options that every loss takes are named once."
    shared = [p for p in f.parameters if p.shared]
    rows = [term(api, f"`{p.name}`", typed(p), p.text) for p in f.parameters
            if not p.shared and not p.type.startswith("Unpack[")]
    if shared:
        names = ", ".join(f"`{p.name}`" for p in shared)
        rows.append(term(api, names, "", f"options of every loss: `{SHARED[1]}`"))
    for p in f.parameters:
        if p.type.startswith("Unpack["):
            rows.append(term(api, f"`{p.name}`", "", f"{p.text}: `{p.type[7:-1]}`"))
    return "\n".join(rows)


def result(api, f):
    if f.name == "__init__" or f.kind == "property" or f.result.type in ("", "None"): return ""
    return f"**Returns** `{f.result.type.strip(chr(39))}`" + (f": {api.link(f.result.text)}" if f.result.text else "")


def raises(api, errors):
    return "**Raises** " + api.link(" ".join(o.removeprefix("Raises ") for o in errors)) if errors else ""


def blocks(*parts): return "\n\n".join(p.strip("\n") for p in parts if p)


def fence(text): return f"```python\n{text}\n```"


def method(api, e, m):
    "A method of an entry."
    said, errors = parted(m.doc)
    star = {"classmethod": "classmethod ", "staticmethod": "staticmethod "}.get(m.kind, "")
    name = f"{e.name}.{m.name}"
    if m.kind == "property":
        return blocks(f"#### {m.name} {{#{name}}}", fence(f"{name}: {m.result.type}"),
                      *map(api.link, said), api.link(m.result.text))
    return blocks(f"#### {m.name} {{#{name}}}", fence(call(name, m, star)), *map(api.link, said),
                  parameters(api, m), result(api, m), raises(api, errors))


def words(e):
    "What the page itself says of a name: words, and the example."
    at = e.said.find(">>> ")
    return (e.said, "") if at < 0 else (e.said[:at].strip(), e.said[at:].strip())


def entry(api, e):
    "The text of an entry."
    o = api.definition(e)
    text, example = words(e)
    up = f"[where it is derived]({link})" if (link := api.derivation(e)) else ""
    head = f"### {e.name} {{#{e.name}}}"
    shown = blocks("**Example**", fence(example)) if example else ""
    if o is None:  # a constant or an alias: the page says what it is
        return blocks(head, f"`{e.package}.{e.name}`, {up}" if up else f"`{e.package}.{e.name}`", text, shown)
    said, errors = parted(o.doc)
    if isinstance(o, Class) and o.form: errors = errors or parted(api.package.find(api.home(e), o.form)[1].doc)[1]
    f = o if isinstance(o, Function) else o.constructor
    if f is not o and f is not None and f.doc:  # a constructor's own words
        more, wrong = parted(f.doc)
        said, errors = said+more, errors+wrong
    path = f"{e.package}.{e.name}"
    signature = call(path, f, "class "*isinstance(o, Class)) if f else f"class {path}()"
    methods = [m for n in e.methods for m in o.methods if m.name == n] if isinstance(o, Class) else []
    return blocks(head, fence(signature), *map(api.link, said), equation(o.doc, api.root), text,
                  parameters(api, f) if f else "", result(api, f) if f else "", raises(api, errors), shown,
                  f"See {up}." if up else "", *(method(api, e, m) for m in methods))


def overview(api):
    "All names by page and section, each with one line."
    out = []
    sources = pages(api.root)
    for page in [p[4:-3] for p in in_order(sidebar(api.root)) if p.startswith("api/")]:
        here = [e for e in api.entries if e.page == page]
        if not here: continue
        title = re.search(r"^title: (.+)$", sources[page], re.M)[1]
        out.append(f"## [{title}]({page}.html)")
        for section in dict.fromkeys(e.section for e in here):
            rows = []
            for e in [e for e in here if e.section == section]:
                o = api.definition(e)
                line = parted(o.doc)[0][0] if o and o.doc else words(e)[0].split("\n\n")[0]
                rows.append(f"- [`{e.name}`]({page}.html#{e.name}): {sentences(line)[0]}")
            out.append(f"**{section}**\n\n" + "\n".join(rows))
    return "\n\n".join(out)


def filled(api, page):
    "A page as it goes to the renderer."
    text, out = pages(api.root)[page], []
    mine = {f"{e.package}.{e.name}": e for e in api.entries if e.page == page}
    skip = False
    for line in text.splitlines():
        if line.startswith("##"): skip = False
        if m := ENTRY.match(line):
            out += [entry(api, mine[f"{m[1]}.{m[2]}"]), ""]
            skip = True
        elif not skip: out.append(overview(api) if line == OVERVIEW else line)
    return "\n".join(out).rstrip() + "\n"


def write(folder, root=ROOT):
    "Write all pages into a folder."
    api = Api(root)
    folder.mkdir(parents=True, exist_ok=True)
    for page in pages(root): (folder/f"{page}.md").write_text(filled(api, page), encoding="utf-8")


# ---------------------------------------------------------------- checks

def parts(name, o):
    "The functions of a definition, with their names: itself, or its constructor and methods."
    if isinstance(o, Function): return [(name, o)]
    return [(f"{name}.{f.name}", f) for f in [*([o.constructor] if o.constructor else []), *o.methods]]


def described(root):
    "Every parameter of a public name has a type and says what it is."
    for module, name, o in Package(root).public():
        for where, f in parts(name, o):
            for p in f.parameters:
                if p.type in ("", "None"): yield f"{module}: {where} has a parameter without type: {p.name}"
                if not p.text: yield f"{module}: {where} does not say what this parameter is: {p.name}"


def known(root):
    "What the pages list exists, says what it is and what comes back, and names the errors that it raises itself."
    api = Api(root)
    for e in api.entries:
        where = f"nbs/api/{e.page}.md: {e.package}.{e.name}"
        if api.home(e) is None:
            yield f"{where} is no public name"
            continue
        if (o := api.definition(e)) is None: continue
        if not o.doc: yield f"{where} has no docstring"
        there = {m.name: m for m in o.methods} if isinstance(o, Class) else {}
        for m in e.methods:
            if m not in there: yield f"{where} has no method {m}"
        for f in [o] if isinstance(o, Function) else [there[m] for m in e.methods if m in there]:
            if not f.result.text and re.search(r"Tensor|Any|list|dict|tuple", f.result.type):
                yield f"{where} does not say what {f.name} returns"
            for error in f.raises:
                if error not in f.doc + o.doc: yield f"{where} does not say that {f.name} raises {error}"


def listed(root):
    "Every public name has an entry, or is a helper (`HELPERS` in tools/api.py)."
    api = Api(root)
    if not api.entries: return
    have = {(api.home(e), e.name) for e in api.entries}
    for module, name, _ in api.package.public():
        inside = {module.rsplit(".", n)[0] for n in range(3)} | {f"{module}.{name}"}
        if (module, name) not in have and not inside & HELPERS: yield f"{module}: {name} has no entry in nbs/api/"
