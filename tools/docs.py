"""Build the site into _docs/: with Quarto where there is one, else with smalldocs.

Both render the notebooks that nbdev processes into _proc/, and the pages that tools/api.py and tools/about.py write
there. Some things are mended on the way: an exported function is shown as its source, because here the code is the
equation; MathJax and fonts are not fetched from another host; tools/mending.py says what else is done to a page.
nbdev_docs is not called: it would also write README.md, in its own way.
"""
import os, re, shutil, subprocess, sys, tempfile
from dataclasses import dataclass
from pathlib import Path

import about
import api
import nbdev.serve
from nbdev.config import get_config
from nbproc import Procs
from mending import mend, own_fonts
from searching import write

MATHJAX = "sphinx-mathjax-offline==0.0.2"  # a wheel that holds MathJax 3.2.2 as published; its Sphinx part is not used
MATHJAX_FILES = ["tex-chtml-full.js", "output/chtml/fonts/woff-v2"]


def process(cfg):
    "The notebooks as they go to the renderer, in `_proc/`; only what changed is done again."
    proc = cfg.config_path/"_proc"
    made_by = [Path(__file__).with_name(f"{o}.py") for o in ("nbproc", "api", "signatures")]
    stale = proc.exists() and proc.stat().st_mtime < max(p.stat().st_mtime for p in made_by)
    nbdev.serve.FilterDefaults = Procs
    try: nbdev.serve.proc_nbs(cfg.nbs_path, force=stale)
    except Exception as e:  # it names the notebook and shows the cell; its cause is the text of a traceback
        sys.exit("\n".join([str(e), *re.findall(r"^\w+(?:Error|Exception): .*", str(e.__cause__), re.M)[:1]]))
    if not (proc/"_quarto.yml").exists():
        sys.exit("nbdev processed nothing: it skips a checkout under a folder whose name starts with a dot")
    for p in proc.rglob("*"):  # notebooks and figures that are no more
        ours = proc/cfg.doc_path.name in p.parents or proc/"about" in p.parents
        if p.is_file() and not ours and not (cfg.nbs_path/p.relative_to(proc)).exists(): p.unlink()
    api.write(proc/"api")
    return proc


def render(proc):
    "Render `_proc/` into `_proc/_docs/`."
    if shutil.which("quarto"): return subprocess.run(["quarto", "render", "--no-cache"], cwd=proc, check=True)
    if not shutil.which("smalldocs"): sys.exit("neither Quarto nor smalldocs is installed: pip install -e '.[dev]'")
    print("Quarto is not installed: the site is built with smalldocs.")
    res = subprocess.run(["smalldocs", "render"], cwd=proc, text=True, stderr=subprocess.PIPE)
    for line in res.stderr.splitlines():  # keys that only Quarto reads are no news
        if not re.search(r"(is ignored|unknown key)", line): print(line)
    if res.returncode: sys.exit(res.returncode)


def mathjax():
    "The folder with MathJax's files, fetched once with pip into the environment; None where that fails."
    have = Path(sys.prefix)/"share"/"mathjax"
    if have.exists(): return have
    print(f"fetching MathJax ({MATHJAX}) into {have.relative_to(sys.prefix)}, once")
    with tempfile.TemporaryDirectory() as tmp:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*pip, "--target", tmp, MATHJAX]).returncode: return None
        new = have.with_name("mathjax.part")
        shutil.rmtree(new, ignore_errors=True)
        for name in MATHJAX_FILES:
            src = Path(tmp)/"sphinx-mathjax-offline/static/mathjax"/name
            (new/name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if src.is_dir() else shutil.copy)(src, new/name)
    os.replace(new, have)
    return have


@dataclass
class Page:
    "One page of the site and what mending it needs to know."
    path: Path            # the rendered file
    docs: Path            # the site's folder
    notebook: str | None  # its notebook, from nbs/; None where another source made the page
    maths: bool           # whether MathJax lies in the site
    site: str             # the site's address
    git: str              # the repository's
    branch: str

    @property
    def up(self): return "../"*len(self.path.relative_to(self.docs).parent.parts)


def pages(cfg, docs, maths):
    for path in sorted(docs.rglob("*.html")):
        name = str(path.relative_to(docs).with_suffix(".ipynb"))
        notebook = name if (cfg.nbs_path/name).exists() else None
        yield Page(path, docs, notebook, maths, cfg.doc_host+cfg.doc_baseurl, cfg.git_url, cfg.branch)


def main():
    cfg = get_config()
    proc, docs = process(cfg), cfg.doc_path
    about.write(cfg.config_path, proc, cfg)
    render(proc)
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(proc/docs.name, docs)
    maths = mathjax()
    if maths: shutil.copytree(maths, docs/"site_libs"/"mathjax")
    else: print("MathJax could not be fetched: the pages load their maths from a CDN")
    shutil.copytree(cfg.nbs_path/"scripts", docs/"scripts", dirs_exist_ok=True)
    own_fonts(docs)
    made = list(pages(cfg, docs, maths))
    found, titles = zip(*map(mend, made))
    write(docs, sum(found, []))
    about.llms(docs, cfg, {k: v for o in titles for k, v in o.items()})
    print(f"{len(made)} pages in {docs.name}/, starting at {docs.name}/index.html")


if __name__ == "__main__": main()
