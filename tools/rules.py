"""The house rules, one small function each. It yields what breaks the rule, as `where: what`; it changes nothing.

Rules of a notebook take its cells, rules of the tree take its root. `tools/check.py` runs them all and says what mends.
"""
import ast, inspect, json, os, re, subprocess, sys
from collections import defaultdict

import yaml

from common import notebooks, read

MAX_CELLS, MAX_OUTPUT = 60, 1_000_000  # of a notebook: cells; characters of outputs
DOC_LINES = range(5, 21)               # of a module's docstring
MAX_FUNCTION, MAX_MODULE = 30, 450     # lines
MAX_LINE = 120                         # columns
MAX_TOP, MAX_PAGES = 14, 12            # modules directly in softnce/; lines of a section of the sidebar
TABLES = set()  # "softnce/...py: name" of functions that may be longer: a program wrote the table that they hold
LOCAL = re.compile(r"(?<![\w.:/-])/(?:work|tmp|root|home|Users|private|mnt)/[\w.-]+|\b[A-Z]:\\Users")


# ---------------------------------------------------------------- a notebook

def code(cells): return [c for c in cells if c["cell_type"] == "code"]


def directives(cell): return set(re.findall(r"^#\|\s*(\w+)", cell["source"], re.M))


def exports(cells): return any("default_exp" in directives(c) for c in code(cells))


def parsed(cell):
    "The statements of a code cell; none where it holds a magic or a shell line."
    try: return ast.parse(cell["source"]).body
    except SyntaxError: return []


def sets(statement, name): return isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == name


def title(cells):
    "It opens with a title and a subtitle: nbdev takes both from the first cell."
    first = cells[0]["source"].strip() if cells[0]["cell_type"] == "markdown" else ""
    if not re.fullmatch(r"# .+\n\n> .+(\n\n(- .+: .+\n?)+)?", first):
        yield "the first cell must hold `# Title`, a blank line and `> one-line subtitle`, and nothing else"


def size(cells):
    "It is one sitting."
    if len(cells) > MAX_CELLS: yield f"{len(cells)} cells, at most {MAX_CELLS} are allowed"
    written = sum(len(json.dumps(c["outputs"])) for c in code(cells))
    if written > MAX_OUTPUT: yield f"outputs of {written:,} characters, at most {MAX_OUTPUT:,} are allowed"


def default_dtype(cells):
    "It leaves the default dtype as the next notebook in the same process of nbdev_test expects it."
    text = "\n".join(c["source"] for c in code(cells))
    if text.rfind("set_default_dtype(torch.float64)") > text.rfind("set_default_dtype(torch.float32)"):
        yield ("sets the default dtype and leaves it so for the next notebook of nbdev_test: "
               "end with torch.set_default_dtype(torch.float32)")


def errors(cells):
    "No cell failed when it was last run."
    for n, c in enumerate(cells):
        if any(o["output_type"] == "error" for o in c.get("outputs", [])): yield f"cell {n} holds an error output"


def shown(cell):
    "What a reader of a cell sees as text: its source and its outputs, pictures left out."
    yield cell["source"]
    for o in cell.get("outputs", []):
        data = {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")}
        yield json.dumps([o.get("text", ""), data, o.get("traceback", "")])


def local_paths(cells):
    "It names no path of the machine that it was written on."
    for n, c in enumerate(cells):
        found = {m[0] for t in shown(c) for m in LOCAL.finditer(t)}
        for path in sorted(found): yield f"cell {n} holds a local path: {path}"


def mixed(cell):
    "Whether a cell that is not exported holds imports and other code."
    if re.search(r"^#\|\s*(export|eval:\s*false)", cell["source"], re.M): return False
    def imports(o): return isinstance(o, (ast.Import, ast.ImportFrom))
    return not all(map(imports, parsed(cell))) and any(imports(o) for s in parsed(cell) for o in ast.walk(s))


def imports_apart(cells):
    "Imports stand in cells of their own, because nbdev runs such cells when the site is built."
    if not exports(cells): return
    for n, c in enumerate(cells):
        if c["cell_type"] == "code" and mixed(c):
            yield f"cell {n} mixes imports with other code: give the imports a cell of their own"


def documented(cells):
    "The first cell that goes to the module is its docstring, in `__doc__`."
    if not exports(cells): return
    exported = [c for c in code(cells) if directives(c) & {"export", "exporti", "exports"}]
    doc = [s.value for c in exported[:1] for s in parsed(c) if sets(s, "__doc__") and isinstance(s.value, ast.Constant)]
    if not doc: yield "the first exported cell must set `__doc__`, which says what the module is for"
    elif (n := len(inspect.cleandoc(doc[0].value).splitlines())) not in DOC_LINES:
        yield f"`__doc__` has {n} lines, from {DOC_LINES[0]} to {DOC_LINES[-1]} are allowed"


NOTEBOOK = [title, size, default_dtype, errors, local_paths, imports_apart, documented]


def one_parameters_cell(path, cells):
    "An experiment has the cell that papermill fills."
    tagged = sum("parameters" in c["metadata"].get("tags", []) for c in code(cells))
    if path.parent.name == "experiments" and path.stem != "index" and tagged != 1:
        yield f"{tagged} cells are tagged `parameters`, an experiment needs exactly one"


def faults(path):
    "What is wrong with one notebook."
    cells = read(path)["cells"]
    for rule in NOTEBOOK: yield from rule(cells)
    yield from one_parameters_cell(path, cells)


def notebooks_keep_the_rules(root):
    for p in notebooks(root):
        for o in faults(p): yield f"{p.relative_to(root)}: {o}"


# ---------------------------------------------------------------- the package

def modules(root):
    "The modules of the package, by name in the tree; not the index that nbdev writes."
    found = sorted((root/"softnce").rglob("*.py"))
    return {str(p.relative_to(root)): p for p in found if p.name != "_modidx.py"}


def run(root, *cmd):
    "A checker in the tree: its exit status and what it said, without lines broken for a terminal."
    env = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1"}
    done = subprocess.run(cmd, cwd=root, text=True, capture_output=True, env=env)
    return done.returncode, (done.stdout + done.stderr).strip()


LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True, no_cache=True))"


def contracts(root):
    "Layers and cycles, as pyproject.toml says them to import-linter."
    failed, said = run(root, sys.executable, "-c", LINT)
    if not failed: return
    broken = said.split("Broken contracts\n----------------\n")[-1].strip()
    yield re.sub(r"\n{2,}", "\n", re.sub(r"\n-{3,}\n", ":\n", broken)).replace("\n", "\n    ")


def style(root):
    "Lines of 120 columns, and no import that is not used or made twice, as pyproject.toml says them to ruff."
    failed, said = run(root, sys.executable, *"-m ruff check --quiet --no-cache --output-format concise".split())
    if failed: yield from (o for o in said.splitlines() if not describes_a_figure(root, o))


def scripts(root):
    "Lines of 120 columns in the site's scripts and style sheets; a program wrote what ends in `_data`."
    for path in [*(root/"tools").glob("*.js"), *(root/"nbs"/"scripts").glob("*.js"), *(root/"nbs").glob("*.css")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        for i, line in enumerate(lines if not path.stem.endswith("_data") else [], 1):
            if len(line) > MAX_LINE: yield f"{path.relative_to(root)}:{i}: {len(line)} columns, at most {MAX_LINE}"


def describes_a_figure(root, found):
    "Whether a long line is the caption or the alternative text of a figure: YAML has those on one line."
    place = re.match(r"(.+\.ipynb):cell (\d+):(\d+):\d+: E501", found)
    if not place: return False
    cells = json.loads((root/place[1]).read_text())["cells"]
    return "".join(cells[int(place[2])-1]["source"]).splitlines()[int(place[3])-1].startswith("#| fig-")


def functions(node, prefix=""):
    "Functions at the top of a module and methods, with their names; one inside a function counts with it."
    for o in ast.iter_child_nodes(node):
        if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef)): yield prefix+o.name, o
        elif isinstance(o, ast.ClassDef): yield from functions(o, f"{prefix}{o.name}.")
        elif isinstance(o, ast.stmt): yield from functions(o, prefix)  # below an if, a try or a with


def short_functions(root, excepted=TABLES):
    "A function, from `def` to its last line, can be seen at once; `#| exporti` is no way round."
    for name, path in modules(root).items():
        for function, o in functions(ast.parse(path.read_text(encoding="utf-8"))):
            n = o.end_lineno - o.lineno + 1
            if n > MAX_FUNCTION and f"{name}: {function}" not in excepted:
                yield f"{name}:{o.lineno}: {function} has {n} lines, at most {MAX_FUNCTION} are allowed"


def short_modules(root):
    for name, path in modules(root).items():
        n = len(path.read_text(encoding="utf-8").splitlines())
        if n > MAX_MODULE: yield f"{name}: {n} lines, at most {MAX_MODULE} are allowed"


def few_at_the_top(root):
    "The folder listing shows the design."
    n = len(list((root/"softnce").glob("*.py")))
    if n > MAX_TOP: yield f"softnce: {n} modules at the top, at most {MAX_TOP} are allowed"


def pages(entry):
    "The pages of a part of the sidebar, in order."
    if isinstance(entry, str): return [entry]
    if isinstance(entry, list): return [p for o in entry for p in pages(o)]
    return pages(entry.get("contents", entry.get("href", [])))


def sidebar(root): return yaml.safe_load((root/"nbs"/"sidebar.yml").read_text())["website"]["sidebar"]["contents"]


def sections(entries):
    "The sections of the sidebar and those inside them."
    for o in entries:
        if isinstance(o, dict) and "section" in o: yield from [o, *sections(o["contents"])]


def short_sections(root):
    "A section is seen at once: its pages, and the names of the sections inside."
    for o in sections(sidebar(root)):
        n = len(o["contents"])
        if n > MAX_PAGES:
            yield f"nbs/sidebar.yml: section {o['section']} has {n} pages, at most {MAX_PAGES} are allowed"


# ---------------------------------------------------------------- names that nobody needs

def room(path):
    "The folder that a file of the package or a notebook belongs to: `contrast`; `losses` for the modules at the top."
    top, *inner = path.parts
    if top not in ("softnce", "nbs"): return top
    if inner[:2] == ["experiments", "code"] or top == "softnce" and len(inner) > 1: return inner[0]
    if top == "softnce": return "losses"
    return "pages" if inner[0] == "experiments" else inner[0]


def words(source):
    "The names in a piece of code: variables, attributes, imports, and the words of its strings."
    try: tree = ast.parse(source)
    except SyntaxError: return set(re.findall(r"\w+", source))  # a magic, or a Snakefile
    found = set()
    for o in ast.walk(tree):
        if isinstance(o, ast.Name): found.add(o.id)
        if isinstance(o, ast.Attribute): found.add(o.attr)
        if isinstance(o, ast.alias): found.update(o.name.split("."))
        if isinstance(o, ast.Constant) and isinstance(o.value, str): found.update(re.findall(r"\w+", o.value))
    return found


def used(root):
    "The names in use, by room; tests, tools and the Snakefile are rooms of their own."
    found = defaultdict(set)
    others = [*(root/"tests").rglob("*.py"), *(root/"tools").glob("*.py"), *root.glob("Snakefile")]
    sources = [(p, p.read_text(encoding="utf-8")) for p in [*modules(root).values(), *others]]
    sources += [(p, c["source"]) for p in notebooks(root) for c in code(read(p)["cells"])]
    for p, source in sources: found[room(p.relative_to(root))] |= words(source)
    return found


def introduced(root, folder):
    "The names in backticks on the page that opens a folder, and on the home page."
    fronts = [p for p in (root/"nbs"/folder/"index.ipynb", root/"nbs"/"index.ipynb") if p.exists()]
    text = "\n".join(c["source"] for p in fronts for c in read(p)["cells"] if c["cell_type"] == "markdown")
    return {w for o in re.findall(r"`([^`]+)`", text) for w in re.findall(r"\w+", o)}


def exported(path):
    "What a module's `__all__` names."
    for o in ast.parse(path.read_text(encoding="utf-8")).body:
        if sets(o, "__all__"): yield from ast.literal_eval(o.value)


def needed_names(root):
    "An exported name is used outside its folder, or the folder's first page introduces it."
    use = used(root)
    for name, path in modules(root).items():
        here = room(path.relative_to(root))
        known = introduced(root, here).union(*(o for folder, o in use.items() if folder != here))
        unused = [o for o in exported(path) if o not in known]
        if unused: yield f"{name}: nobody outside its folder uses {', '.join(unused)}"
