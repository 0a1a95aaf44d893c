"What is done to a rendered page, piece by piece, and what the search and llms.txt read of it."
import base64, json, sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/"tools"))
pytest.importorskip("bs4"); pytest.importorskip("PIL")
import about
import mending
import searching
from bs4 import BeautifulSoup
from small_site import png

SITE, GIT = "https://site.example/book", "https://github.com/me/book"
HEAD = '<header id="title-block-header"><h1 class="title">Noise</h1></header>'


@pytest.fixture
def page(tmp_path):
    (tmp_path/"guides").mkdir()
    return SimpleNamespace(path=tmp_path/"guides"/"a.html", docs=tmp_path, notebook="guides/a.ipynb", maths=True,
                           site=SITE, git=GIT, branch="main", up="../")


def soup(body, head=""):
    return BeautifulSoup(f"<html><head>{head}</head><body><main>{HEAD}{body}</main></body></html>", "html.parser")


def done(step, page, body, head=""):
    s = soup(body, head)
    step(s, page)
    return s


def test_pictures_become_files(page):
    s = done(mending.figures, page, f'<img alt="x" src="data:image/png;base64,{png(width=7, height=5, shade=255)}">')
    assert s.img["src"] == "figures/a-1.png" and (s.img["width"], s.img["height"]) == ("7", "5")
    assert (page.path.parent/"figures"/"a-1.png").read_bytes() == base64.b64decode(png(width=7, height=5, shade=255))
    assert "photo" not in s.img.get("class", [])


def test_a_picture_without_paper_is_a_photograph(page):
    s = done(mending.figures, page, f'<img src="data:image/png;base64,{png(shade=90)}">')
    assert s.img["class"] == ["photo"]


def test_links_to_the_own_address_are_relative(page):
    s = done(mending.own_links, page, f'<a href="{SITE}/b.html#x">b</a><a href="https://other.example">o</a>')
    assert [a["href"] for a in s.find_all("a")] == ["../b.html#x", "https://other.example"]


def test_what_opens_is_a_button(page):
    s = done(mending.buttons, page, '<a data-bs-toggle="collapse" role="navigation" href="#">Use</a><a href="b">b</a>')
    assert s.button["type"] == "button" and "role" not in s.button.attrs and s.a["href"] == "b"


def test_an_empty_corner_is_no_header(page):
    s = done(mending.tables, page, "<table><tr><th></th><th>loss</th></tr></table>")
    assert len(s.find_all("th")) == 1 and len(s.find_all("td")) == 1


def test_columns_of_words_begin_at_the_left(page):
    long = "It is better than the other one, by far"
    rows = [["", "claim", "ours", "note", "why"], ["1", long, "+0.1 ± 0.2 points", "", long],
            ["2", "No", "-3e-05", "1 of them", ""], ["3", "Yes", "1", "", "so"]]
    table = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in r) + "</tr>" for r in rows)
    s = done(mending.tables, page, f'<div class="cell-output-display"><table>{table}</table></div>')
    for r in s.select("tr"): assert [c.get("class") for c in r.select("td")] == [
        None, ["words", "long"], None, None, ["words"]]


def test_a_number_and_its_interval_stay_together(page):
    s = done(mending.together, page, "<p>By -0.2 ± 0.4 points</p><code>1 ± 2</code>")
    assert s.p.get_text() == "By -0.2\u00a0±\u00a00.4 points" and s.code.get_text() == "1 ± 2"


@pytest.mark.parametrize("summary, folded", {"Answer": 2, "Code": 0}.items())
def test_an_answer_is_folded_with_its_output(page, summary, folded):
    cell = f'<div class="cell"><details class="code-fold"><summary>{summary}</summary><pre>1+1</pre></details>'
    outputs = '<div class="cell-output">2</div>'*2
    s = done(mending.answers, page, cell + outputs + '</div><div class="cell-output">3</div>')
    assert len(s.select("details .cell-output")) == folded and len(s.select(".cell-output")) == 3


def test_empty_links_go_and_formulas_are_named(page):
    links = r'<a href="b"></a><a href="c"><span class="math">\(\alpha\)</span></a>'
    s = done(mending.link_texts, page, links)
    assert [(a["href"], a["aria-label"]) for a in s.find_all("a")] == [("c", "α")]


def test_contents_on_a_phone(page):
    toc = '<nav id="TOC"><ul><li><a id="toc-x" href="#x">X</a></li><li><a href="#y">Y</a></li></ul></nav>'
    s = done(mending.phone_contents, page, toc)
    assert [a["href"] for a in s.select(".phone-contents a")] == ["#x", "#y"] and len(s.select("#toc-x")) == 1


def test_ways_to_run_lead_to_the_notebook(page):
    s = done(mending.ways, page, "")
    links = {a.get_text(): a["href"] for a in s.select(".ways a")}
    assert links["Colab"] == "https://colab.research.google.com/github/me/book/blob/main/nbs/guides/a.ipynb"
    assert links["Binder"] == "https://mybinder.org/v2/gh/me/book/main?urlpath=lab/tree/nbs/guides/a.ipynb"
    first = s.select_one(".ways pre").get_text()
    assert f"git clone -q --depth 1 {GIT}" in first and "%cd -q book/nbs/guides" in first
    page.notebook = None
    assert not done(mending.ways, page, "").select(".ways")


class Shell:
    "What IPython is asked to run."
    def __init__(self): self.asked = []
    def system(self, line): self.asked.append(line)
    def run_line_magic(self, name, line, **options): self.asked.append(f"{name} {line}")


@pytest.mark.parametrize("folder, asked", {"else": 3, "book/nbs/guides": 0}.items())
def test_the_first_cell_installs_outside_a_clone_only(page, tmp_path, monkeypatch, folder, asked):
    transform = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager().transform_cell
    first = done(mending.ways, page, "").select_one(".ways pre").get_text()
    (tmp_path/folder).mkdir(parents=True)
    (tmp_path/"book").mkdir(exist_ok=True)
    (tmp_path/"book"/"settings.ini").write_text("")
    monkeypatch.chdir(tmp_path/folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shell = Shell()
    exec(compile(transform(first), "first", "exec"), {"get_ipython": lambda: shell})
    assert len(shell.asked) == asked and all(w in o for w, o in zip(["git clone", "pip", "cd"], shell.asked))


def test_maths_is_the_sites(page):
    far = '<script src="https://cdn.example/katex.js"></script>'
    s = done(mending.maths, page, '<span class="math">x</span>', far)
    assert [o.get("src") for o in s.find_all("script")] == [None, "../site_libs/mathjax/tex-chtml-full.js"]


@pytest.mark.parametrize("rule", [
    '@import url(https://fonts.example/css2?family=A:wght@300;400&display=swap);',
    '@import url("https://fonts.example/css2?family=A:wght@300;400");', '@import "https://fonts.example/a;b.css";'])
def test_no_style_asks_for_fonts(tmp_path, rule):
    (tmp_path/"a.css").write_text(f"a{{b:c}}{rule}d{{e:f}}@import 'own.css';")
    mending.own_fonts(tmp_path)
    assert (tmp_path/"a.css").read_text() == "a{b:c}d{e:f}@import 'own.css';"


@pytest.mark.parametrize("tex, text", {
    r"\frac{a}{b}": "(a)/(b)", r"(1-\epsilon)\,\beta_m": "(1- ε ) β _m", r"\mathrm{softmax}(s)": "softmax (s)",
    r"\log\sum_k s_{ik} \tag{7}": "log Σ _k s_ik (7)"}.items())
def test_formulas_are_read_as_letters(tex, text): assert searching.letters(tex) == text


def test_entries_of_the_search():
    head = '<meta name="keywords" content="queue, small batches"><meta name="description" content="Where it is from">'
    body = (r'<p>First <span class="math inline">\(\tau\)</span>.</p><h2 id="size">How many</h2><p>Many.</p>'
            '<details class="code-fold"><pre>hidden = 1</pre></details><div class="ways">Colab</div>')
    found = list(searching.entries(soup(body, head), "guides/a.html"))
    assert [o["href"].removeprefix("guides/a.html") + " " + o["section"] for o in found] == [
        " queue", " small batches", " ", "#size How many"]
    assert found[0]["title"] == "Noise: queue" and "First τ ." in found[2]["text"] and found[3]["text"] == "Many."


def test_guides_come_first(tmp_path):
    found = [dict(href=o, text="") for o in ("runs/a.html", "losses/a.html", "guides/a.html", "index.html")]
    searching.write(tmp_path, found)
    order = [o["href"] for o in json.loads((tmp_path/"search.json").read_text())]
    assert order == ["guides/a.html", "index.html", "losses/a.html", "runs/a.html"]


CFG = SimpleNamespace(git_url=GIT, branch="main", title="book", description="About it", doc_host="https://site.example",
                      doc_baseurl="/book")


def test_files_of_the_repository_become_pages(tmp_path):
    (tmp_path/"CHANGELOG.md").write_text("# Changelog\n\nSee [this](docs/a.md) and [that](https://b.example).\n")
    cff = "title: Book\nmessage: Cite it.\nversion: 1.0\nrepository-code: r\nauthors: [{name: We}]\n"
    (tmp_path/"CITATION.cff").write_text(cff)
    about.write(tmp_path, tmp_path/"proc", CFG)
    changes, cite = ((tmp_path/"proc"/"about"/f"{n}.md").read_text() for n in ("changes", "cite"))
    assert 'title: "Changelog"' in changes and f"[this]({GIT}/blob/main/docs/a.md)" in changes
    assert "[that](https://b.example)" in changes and "@software{softnce," in cite and "author = {We}" in cite


def test_llms_txt_lists_every_page(tmp_path):
    about.llms(tmp_path, CFG, {"a.html": ("A", "What it is")})
    assert "- [A](https://site.example/book/a.html): What it is" in (tmp_path/"llms.txt").read_text()
