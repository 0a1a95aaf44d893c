"The site: order of the pages, links, equations, figures, API entries, and maths from the site itself."
import ast, configparser, re, shutil, subprocess, sys, tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/"tools"))
from common import notebooks, read
from rules import LOCAL, pages, sidebar

DOCS, NBS = ROOT/"_docs", ROOT/"nbs"
NAMES = [str(p.relative_to(NBS)) for p in notebooks()]
VOID = {"img", "link", "meta", "br", "hr", "input"}


class Page(HTMLParser):
    """A page's links, scripts, ids, headings and text; text inside code and maths is kept apart.

    `entries`: below each heading, what is there until the next one; `headings`: their anchors and texts."""
    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.scripts, self.ids, self.images, self.headings = path, [], [], set(), [], []
        self.text, self.prose, self.tex, self.attrs, self.stack, self.entries = "", "", "", "", [], []
        self.feed(path.read_text(encoding="utf-8"))
    def handle_starttag(self, tag, attrs):
        a = {k: v or "" for k, v in attrs}
        if tag not in VOID: self.stack.append((tag, a.get("class", "")))
        if "id" in a: self.ids.add(a["id"])
        if tag == "a" and "href" in a: self.links.append(a["href"])
        if tag == "img": self.images.append(a.get("src", ""))
        if tag == "link" and a.get("rel") in ("stylesheet", "icon"): self.scripts.append(a["href"])
        if tag == "script" and "src" in a: self.scripts.append(a["src"])
        if tag in ("h2", "h3"): self.headings.append([a.get("data-anchor-id"), ""])
        if tag in ("h1", "h2", "h3"): self.entries.append([tag, ""])
        self.attrs += "\n" + " ".join(v for v in a.values() if not v.startswith("data:"))
    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag: pass
    def handle_data(self, data):
        tags = {o[0] for o in self.stack}
        if tags & {"script", "style", "head"}: return
        self.text += data
        if any("math" in o[1].split() for o in self.stack): self.tex += data
        elif not tags & {"code", "pre"}: self.prose += data
        elif self.entries: self.entries[-1][1] += data
        if tags & {"h2", "h3"}: self.headings[-1][1] += data
    def under(self, heading):
        "The text of the entries that are called so, by text and anchor: a section `Batches` has the anchor `batches`."
        found = [text for tag, text in self.entries if tag != "h1"]
        return [text for name, text in zip(self.headings, found, strict=True) if name == [heading]*2]


@pytest.fixture(scope="session")
def build_error():
    "What building the site said where it failed, else nothing; it is built where a source is newer."
    if not (shutil.which("quarto") or shutil.which("smalldocs")): pytest.skip("neither quarto nor smalldocs is on PATH")
    sources = [*NBS.rglob("*"), *(ROOT/"tools").glob("*.py"), ROOT/"_quarto.yml", ROOT/"settings.ini"]
    index = DOCS/"index.html"
    with FileLock(Path(tempfile.gettempdir())/f"{ROOT.name}-site.lock"):  # test workers build it one after the other
        if index.exists() and index.stat().st_mtime > max(p.stat().st_mtime for p in sources if p.is_file()): return ""
        res = subprocess.run([sys.executable, "tools/docs.py"], cwd=ROOT, text=True, capture_output=True)
    return "\n".join(res.stderr.splitlines()[-12:]) or "tools/docs.py failed" if res.returncode else ""


@pytest.fixture(scope="session")
def site(build_error):
    "The pages by file name."
    if build_error: pytest.skip("the site cannot be built: see test_the_site_builds")
    return {str(p.relative_to(DOCS)): Page(p) for p in DOCS.rglob("*.html")}


def page(site, name): return site[name.removesuffix(".ipynb")+".html"]


def words(text): return re.sub(r"[^A-Za-z0-9]+", "", re.sub(r"\]\([^)]*\)", "", text))


def shown(nb): return [c for c in nb["cells"] if not re.search(r"^#\|\s*(hide|include:\s*false)\b", c["source"], re.M)]


def test_sidebar_names_every_notebook_once():
    assert sorted(o for o in pages(sidebar(ROOT)) if o.endswith(".ipynb")) == sorted(NAMES)


def test_titles_are_unique():
    titles = [read(NBS/n)["cells"][0]["source"].splitlines()[0] for n in NAMES]
    assert sorted(titles) == sorted(set(titles))


def test_site_settings_agree_with_settings_ini():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini")
    cfg, web = ini["DEFAULT"], yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]
    assert web["title"] == cfg["title"] and web["repo-url"] == cfg["git_url"]
    assert web["site-url"] == cfg["doc_host"]+cfg["doc_baseurl"]


def test_the_site_builds(build_error):
    if build_error: pytest.fail(build_error, pytrace=False)


def test_every_notebook_has_its_page(site):
    assert "index.html" in site
    assert {n.removesuffix(".ipynb")+".html" for n in NAMES} <= site.keys()


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(site, name):
    here, broken = page(site, name), []
    own = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["site-url"]
    for url in here.links + here.images + here.scripts:
        if url.startswith(own): broken.append(url)  # these are made relative
        parts = urlsplit(url)
        if parts.scheme or parts.netloc: continue
        target = (here.path.parent/unquote(parts.path)).resolve() if parts.path else here.path
        if target.is_dir(): target = target/"index.html"
        if not target.exists() or DOCS not in target.parents: broken.append(url)
        elif parts.fragment and target.suffix == ".html":
            if unquote(parts.fragment) not in site[str(target.relative_to(DOCS))].ids: broken.append(url)
    assert not broken


@pytest.mark.parametrize("name", NAMES)
def test_equations_and_figures_arrive(site, name):
    nb, here = read(NBS/name), page(site, name)
    tex = "\n".join(c["source"] for c in nb["cells"] if c["cell_type"] == "markdown")
    assert re.findall(r"\\tag\{[^}]+\}", here.tex) == re.findall(r"\\tag\{[^}]+\}", tex)
    assert "$$" not in here.prose and not re.search(r"\$[^\s$][^$\n]*\$", here.prose), "raw TeX on the page"
    outputs = [o for c in shown(nb) for o in c.get("outputs", [])]
    assert len(here.images) >= sum("image/png" in o.get("data", {}) for o in outputs)


def test_theory_has_equations(site):
    plain = ("index.ipynb", "losses/modules.ipynb")  # the modules' equations are those of their functions' pages
    theory = [n for n in NAMES if n.startswith(("theory/", "losses/")) and not n.endswith(plain)]
    assert theory and all(page(site, n).tex for n in theory)


@pytest.mark.parametrize("name", NAMES)
def test_maths_comes_from_the_site(site, name):
    here = page(site, name)
    if not (DOCS/"site_libs"/"mathjax").exists(): pytest.skip("MathJax could not be fetched when the site was built")
    assert not [o for o in here.scripts if re.match(r"(https?:)?//.*(mathjax|katex)", o, re.I)]
    assert not here.tex or any(o.endswith("mathjax/tex-chtml-full.js") for o in here.scripts)


def exported(nb):
    "The public functions and classes of cells marked `export`."
    for c in nb["cells"]:
        if c["cell_type"] == "code" and re.search(r"^#\|\s*export\s*$", c["source"], re.M):
            for o in ast.parse(c["source"]).body:
                if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and not o.name.startswith("_"): yield o


@pytest.mark.parametrize("name", [n for n in NAMES if any(exported(read(NBS/n)))])
def test_api_entries(site, name):
    here = page(site, name)
    for o in exported(read(NBS/name)):
        if any(getattr(d, "id", "") == "patch" for d in o.decorator_list): continue  # shown as a method of its class
        entries = here.under(o.name)
        assert len(entries) == 1, f"{o.name} has {len(entries)} entries"
        doc = ast.get_docstring(o)
        assert doc, f"{o.name} has no docstring"
        entry = words(entries[0])
        assert entry.count(words(doc.split("\n")[0])) == 1, f"the docstring of {o.name} is not once in its entry"
        args = [] if isinstance(o, ast.ClassDef) else [a for a in o.args.args if a.arg != "self"]
        for a in args: assert words(a.arg) in entry
    assert not re.search(r"\[`\w+`\]\(http", here.text), "a link inside code"


@pytest.mark.parametrize("name", NAMES)
def test_no_local_path(site, name):
    here = page(site, name)
    assert not LOCAL.findall(here.text + here.attrs)


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    links = [o for o in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", o)]
    assert not [o for o in links if not (ROOT/o.split("#")[0]).exists()]
