"Each check of tools/browse.py finds what it is for, on small pages with one fault each, and nothing on a good page."
import json, sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/"tools"))
pytest.importorskip("playwright"); pytest.importorskip("axe_playwright_python")
import browse
import linking
from small_site import png

NAV = """<header id="quarto-header"><button class="quarto-btn-toggle" type="button"
onclick="document.getElementById('quarto-sidebar').classList.toggle('show')">Pages</button></header>
<nav id="quarto-sidebar" aria-label="Pages"><a href="index.html">Home</a></nav>"""
STYLE = """body { margin: 0; font: 16px monospace; color: #111; background: #fff } main { max-width: 900px }
#quarto-sidebar { position: fixed; left: -300px; width: 250px; top: 60px; background: #fff }
#quarto-sidebar.show { left: 0 } pre { font-size: 13px; margin: 0; overflow-x: auto } img { display: block }
@media (prefers-color-scheme: dark) { body, #quarto-sidebar { background: #111; color: #eee } a { color: #9cf } }"""
FIGURE = f'<figure><img alt="A grey picture." width="30" height="20" src="data:image/png;base64,{png()}"></figure>'
CODE = '<pre class="sourceCode cell-code"><code>x = 1</code></pre>'
WIDE = "<pre{}>" + "a"*400 + "</pre>"
TABLE = '<table style="white-space: nowrap"><tr>' + f"<td>{'a'*40}</td>"*4 + "</tr></table>"
EQUATION = f'<span class="math display" style="display: block; width: 600px; {{}}">{"x "*10}</span>'


def page(body="", style="", head="", header=NAV, phone=True):
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>T</title>{head}'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{style}</style></head>'
            f'<body>{header}<main><h1>A page</h1>{FIGURE}{CODE}<p>Words.</p>{body}</main></body></html>')


GOOD = {
    "plain.html": page(),
    "scrolls.html": page(WIDE.format(' class="scrolls" tabindex="0"')),
    "maths_in_code.html": page("<p><code>$x$</code></p>"),
    "experiments/answer.html": page(),
    "contents.html": page('<details class="phone-contents"><summary>On this page</summary></details>' + "<h2>S</h2>"*3),
}
FAULTS = {  # page: (its text, what must be said)
    "host.html": (page(head='<link rel="stylesheet" href="https://fonts.example.org/a.css">'), "asks another host"),
    "console.html": (page("<script>console.error('broken')</script>"), "console: broken"),
    "missing.html": (page('<img alt="No file." src="nothing.png">'), "console: Failed to load"),
    "script.html": (page("<script>nothing.here()</script>"), "nothing is not defined"),
    "tex.html": (page(r"<p>So $\alpha_m$ is it.</p>"), "$\\alpha_m$"),
    "tex_command.html": (page(r"<p>So \frac{1}{2} is it.</p>"), "\\frac"),
    "alt.html": (page(FIGURE.replace('alt="A grey picture."', "")), "has no text"),
    "big_figure.html": (page(FIGURE.replace('width="30"', 'width="900"')), "9.0 inches wide"),
    "overflow.html": (page('<div style="width: 1500px">wide</div>'), "wider than the window"),
    "cut.html": (page(f'<div style="overflow: hidden">{WIDE.format(" style=overflow:visible")}</div>'),
                 "scrolls, and nothing shows it|cut at the column's edge"),
    "cut_table.html": (page(TABLE), "cut at the column's edge"),
    "cut_equation.html": (page(EQUATION.format("width: 1000px")), "cut at the column's edge"),
    "cut_on_a_phone.html": (page(EQUATION.format("")), "cut at the column's edge"),
    "no_key.html": (page(WIDE.format(' class="scrolls"')), "no key reaches it"),
    "no_hint.html": (page(WIDE.format(' tabindex="0"')), "nothing shows it"),
    "narrow.html": (page(style="main { max-width: 500px }"), "columns of code"),
    "experiments/code.html": (page().replace(FIGURE+CODE, CODE+FIGURE), "code stands before the first figure"),
    "experiments/no_figure.html": (page().replace(FIGURE, ""), "no figure"),
    "light.html": (page('<p style="color: #bbb">Pale.</p>'), "axe, light: color-contrast"),
    "dark.html": (page('<p style="color: #333">Dark.</p>'), "axe, dark: color-contrast"),
    "label.html": (page('<input type="text">'), "axe, light: label"),
    "empty_header.html": (page("<table><tr><th></th><td>1</td></tr></table>"), "axe, light: empty-table-header"),
    "covered.html": (page(style="nav#quarto-sidebar { left: 0; top: 0; height: 90px }"), "covered"),
    "no_button.html": (page(header=NAV.replace("quarto-btn-toggle", "other")), "phone: no button"),
    "stuck.html": (page(header=NAV.replace("toggle('show')", "add('other')")), "the list of pages does not open"),
    "no_contents.html": (page("<h2>S</h2>"*3), "contents of the page cannot be reached"),
    "heavy.html": (page("<p>" + "word "*150_000 + "</p>"), "KB with its pictures"),
}


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    "What is said of every small page, by page."
    if why := browse.ready(): pytest.skip(why)
    docs = tmp_path_factory.mktemp("pages")
    (docs/"experiments").mkdir()
    for name, text in {**GOOD, **{k: v for k, (v, _) in FAULTS.items()}}.items(): (docs/name).write_text(text)
    found = {name: [] for name in [*GOOD, *FAULTS]}
    for o in browse.look_at(docs, list(found)): found[o.split(": ")[0]].append(o.partition(": ")[2])
    return found


@pytest.mark.parametrize("name", GOOD)
def test_a_good_page(findings, name): assert not findings[name]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(findings, name):
    assert any(said in o for o in findings[name] for said in FAULTS[name][1].split("|")), findings[name]


def test_a_page_that_the_browser_gives_up(monkeypatch):
    tries = []
    def look(*args):
        tries.append(args)
        if len(tries) != wanted: raise RuntimeError("Timeout 60000ms exceeded.\nCall log: ...")
        yield "pale"
    monkeypatch.setattr(browse, "look", look)
    browser = SimpleNamespace(contexts=[])
    for wanted, found in {1: ["pale"], 2: ["pale"], 3: ["the browser gave up: Timeout 60000ms exceeded."]}.items():
        tries.clear()
        assert browse.look_twice(browser, "a.html") == found and len(tries) == min(wanted, 2)


BOX = """<input type="search"><div id="r"></div><script>
document.querySelector("input").addEventListener("input", (e) => {
  const href = `./${e.target.value.split(" ")[0]}.html`;
  document.getElementById("r").innerHTML = `<a class="search-result" href="${href}">x</a>`;
});</script>"""


def test_the_first_result_counts(tmp_path):
    if why := browse.ready(): pytest.skip(why)
    (tmp_path/"index.html").write_text(page(BOX))
    queries = {"labels of people": "labels.html", "noise": ("other/", "noise.html"), "queue": "guides/queue.html"}
    said, = browse.searches(tmp_path, queries)
    assert said == "search for 'queue' finds ./queue.html first, not guides/queue.html"


LINKS = {  # on the page a/b.html: what is said of it
    '<a href="../index.html#here">x</a> <a href="#own">x</a> <a href="#top">x</a> <h2 id="own">x</h2>': "",
    '<a href="https://other.example/x.html#y">x</a> <img src="data:image/png;base64,AA=="> <a name="y">x</a>': "",
    '<a href="https://me.example/book/">x</a> <a href="https://me.example/book/index.html#here">x</a>': "",
    '<a href="nothing.html">x</a>': "nothing.html is no file of the site",
    '<a href="../../outside.html">x</a>': "../../outside.html is no file of the site",
    '<img alt="x" src="lost.png">': "lost.png is no file of the site",
    '<a href="../index.html#there">x</a>': "../index.html#there names no place on its page",
    '<a href="#gone">x</a>': "#gone names no place on its page",
    '<a href="https://me.example/book/old.html">x</a>': "old.html is no file of the site",
}


@pytest.mark.parametrize("text, said", LINKS.items())
def test_a_link_that_leads_nowhere(tmp_path, text, said):
    (tmp_path/"outside.html").write_text("")
    docs = tmp_path/"docs"
    (docs/"a").mkdir(parents=True)
    (docs/"index.html").write_text('<h1 id="here">x</h1>')
    (docs/"a"/"b.html").write_text(text)
    found = list(linking.broken(docs, "https://me.example/book"))
    assert found == ([f"a/b.html: a link that leads nowhere: {said}"] if said else [])


TEXTS = {r"the \alpha of": 1, r"\sum_m P": 1, "α of it": 0, r"regex \(4, 3\)": 0}

@pytest.mark.parametrize("text, found", TEXTS.items())
def test_tex_in_the_search(tmp_path, text, found):
    entry = dict(href="a.html", title="A", section="", text=text)
    (tmp_path/"search.json").write_text(json.dumps([entry]))
    assert len(list(browse.raw_tex_in_search(tmp_path))) == found


def test_the_sample_has_a_page_of_each_section():
    found = browse.sample()
    assert "index.html" in found and len(found) >= 8 and len({o.split("/")[0] for o in found}) >= 5
    assert all((ROOT/"nbs"/o).with_suffix(".ipynb").exists() or o.startswith(("about/", "api/")) for o in found)
    assert all(o.endswith(".html") for o in found)


def test_the_report_counts_what_it_does_not_show(capsys):
    assert browse.report(f"a.html: axe at {n} places" for n in range(9)) == 9
    said = capsys.readouterr().out
    assert "axe at 3 places" in said and "axe at 4 places" not in said and "5 more" in said
