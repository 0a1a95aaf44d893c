"""What the site does to a rendered page, whichever renderer made it: figures as files, names for a screen reader,
contents on a phone, ways to run the page, and nothing that another host must send."""
import base64, io, re, struct
from html import escape

from bs4 import BeautifulSoup, Comment
from PIL import Image
from searching import entries, readable, title_and_line

MATHJAX = "site_libs/mathjax/tex-chtml-full.js"
OTHER_HOST = re.compile(r"^(?:https?:)?//", re.I)
MATHS_HOSTS = re.compile(r"mathjax|katex|polyfill", re.I)
# no menu on every formula: each would be a stop of the Tab key
MATHS_OPTIONS = "window.MathJax = {options: {enableMenu: false}};"
CSS_IMPORT = re.compile(r"""@import\s*(?:url\(\s*(['"]?)https?:[^)]*?\1\s*\)|(['"])https?:.*?\2)[^;{}]*;""")
KINDS = {"png": "png", "jpeg": "jpg", "gif": "gif"}
WHITE, DRAWING = 250, .5  # from this grey value on a pixel is paper; a drawing has at least this share of it
NUMBER = re.compile(r"[-+−]?\d[\d.,]*(?:e[-+]?\d+)?(?:\s|$|%)|$")  # what a cell of numbers begins with; or it is empty
LONG = 30         # characters of a cell that is read as a sentence
MAX_CONTENTS = 2  # sections from which on the contents are worth a click on a phone


def new(soup, tag, text="", **attrs):
    "A new element; `class_` for its class."
    o = soup.new_tag(tag, attrs={k.rstrip("_").replace("_", "-"): v for k, v in attrs.items()})
    if text: o.string = text
    return o


# ---------------------------------------------------------------- links and scripts

def own_links(soup, page):
    "Links to the site's own address are relative."
    for a in soup.find_all("a", href=True):
        if a["href"].startswith(page.site+"/"): a["href"] = (page.up or "./") + a["href"][len(page.site)+1:]


def maths(soup, page):
    "MathJax comes from the site, where it could be fetched."
    if not page.maths or not soup.find(class_="math"): return
    for o in soup.find_all(["link", "script"]):
        src = o.get("src") or o.get("href") or ""
        if OTHER_HOST.match(src) and MATHS_HOSTS.search(src): o.decompose()
    for o in (new(soup, "script", MATHS_OPTIONS), new(soup, "script", src=page.up+MATHJAX, defer="")):
        soup.head.append(o)


def scripts(soup, page):
    "The site's own scripts; a figure that moves brings its own."
    moves = soup.find(attrs={"data-moving": True}) is not None
    for name in ["site.js", *["moving_data.js", "moving.js"]*moves]:
        if not (page.docs/"scripts"/name).exists(): continue
        soup.head.append(new(soup, "script", src=f"{page.up}scripts/{name}", defer=""))


# ---------------------------------------------------------------- figures

def size(data):
    "Width and height at which a PNG is shown: its pixels at 100 dots an inch, fewer if it says that it has more dots."
    if data[:8] != b"\x89PNG\r\n\x1a\n": return None
    at = data.find(b"pHYs", 0, 200)
    dots = struct.unpack(">I", data[at+4:at+8])[0]*.0254 if at > 0 else 100  # the chunk counts dots a metre
    return [round(v*min(1, 100/dots)) for v in struct.unpack(">II", data[16:24])]


def paper(data):
    "The share of a picture that is white: of a drawing most is, of a photograph or a map of colours little."
    grey = Image.open(io.BytesIO(data)).convert("L").histogram()
    return sum(grey[WHITE:])/sum(grey)


def figures(soup, page):
    "Pictures stored in a page become files beside it, which a browser fetches when they are near."
    for n, img in enumerate(soup.find_all("img", src=re.compile("^data:image/(png|jpeg|gif);base64,"))):
        kind, data = re.match(r"data:image/(\w+);base64,(.*)", img["src"], re.S).groups()
        data = base64.b64decode(data)
        path = page.path.parent/"figures"/f"{page.path.stem}-{n+1}.{KINDS[kind]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        img["src"] = f"figures/{path.name}"
        if (wh := size(data)) and not img.get("width"): img["width"], img["height"] = map(str, wh)
        img["loading"] = "lazy"
        if paper(data) < DRAWING: img["class"] = [*img.get("class", []), "photo"]


# ---------------------------------------------------------------- names and roles

NAMED = {  # what a screen reader calls the parts of a page: each renderer leaves some without a name
    "#quarto-header nav.navbar": "Site", "#quarto-header nav.quarto-secondary-nav": "This page's place",
    "nav#quarto-sidebar": "Pages", "nav.page-navigation": "Previous and next page", "nav#TOC": "On this page",
}


def landmarks(soup, page):
    "Parts of a page have names that differ; what stands beside the text is marked so."
    for where, name in NAMED.items():
        for o in soup.select(where): o["aria-label"] = name
    for o in soup.select("nav#TOC[role]"): del o["role"]
    for o in soup.select("nav.quarto-secondary-nav"): o.name = "div"; o.attrs.pop("aria-label", None)
    for o in soup.select("#quarto-margin-sidebar"): o.name, o["aria-label"] = "aside", "Beside the text"
    for o in soup.select("i.bi, i[role=img]"):
        o.attrs.pop("role", None)
        o["aria-hidden"] = "true"


def buttons(soup, page):
    "What opens or switches something is a button, which the keyboard reaches."
    for o in soup.select("a[data-bs-toggle=collapse], a.quarto-color-scheme-toggle"):
        o.name, o["type"] = "button", "button"
        for k in ("role", "href"): o.attrs.pop(k, None)
    for o in soup.select(".quarto-color-scheme-toggle"): o["aria-label"] = o["title"] = "Dark or light"
    for o in soup.select(".sidebar-item-section > .sidebar-item-container"):
        text, toggle = o.select_one(".sidebar-item-text"), o.select_one(".sidebar-item-toggle")
        if text and toggle: toggle["aria-label"] = "Pages of " + text.get_text(strip=True)
    for o in soup.select("button.code-copy-button"): o["aria-label"] = "Copy this code"


def open_use(soup, page):
    "On the home page the guides are seen in the list of pages."
    section = soup.select_one(".sidebar-item-section") if page.notebook == "index.ipynb" else None
    if section is None: return
    for o in section.select(":scope > ul"): o["class"] = [*o.get("class", []), "show"]
    for o in section.select(":scope > .sidebar-item-container [aria-expanded]"):
        o["aria-expanded"], o["class"] = "true", [c for c in o["class"] if c != "collapsed"]


def columns(table):
    "Columns of words are told from those of numbers: they begin at the left, and the first long one has room."
    rows = [r.find_all(["th", "td"]) for r in table.find_all("tr")]
    if any(c.get("colspan") or c.get("rowspan") for r in rows for c in r): return
    roomy = False  # one column is: more would push the rest out of sight
    for column in zip(*(r for r in rows if len(r) == len(rows[0]))):
        texts = [c.get_text(" ", strip=True) for c in column[1:]]
        if sum(bool(NUMBER.match(t)) for t in texts) > len(texts)/2: continue
        long = not roomy and max(map(len, texts), default=0) > LONG
        kinds, roomy = ["words"] + ["long"]*long, roomy or long
        for c in column: c["class"] = [*c.get("class", []), *kinds]


def tables(soup, page):
    "An empty corner of a table is no header."
    for o in soup.find_all("th"):
        if not o.get_text(strip=True) and not o.find("img"): o.name = "td"
    for o in soup.select("table[border]"): del o["border"]
    for o in soup.select("tr[style]"): del o["style"]
    for o in soup.select(".cell-output-display table"): columns(o)


def answers(soup, page):
    "The answer to a question is folded with what it printed, and not its code alone."
    for fold in soup.select("details.code-fold"):
        if fold.summary.get_text(strip=True) != "Answer": continue
        fold["class"] = [*fold["class"], "answer"]
        for o in list(fold.find_next_siblings(class_="cell-output")): fold.append(o.extract())


APART = "pre", "code", "script", "style", "math"  # text in which a space is a space


def together(soup, page):
    "A number and its interval stay on one line."
    for s in soup.find_all(string=re.compile(r" ± ?\d")):
        if s.find_parent(APART) is None: s.replace_with(re.sub(r" ± ?(?=\d)", "\u00a0±\u00a0", s))


def link_texts(soup, page):
    "A link without text leads nobody anywhere; one that is a formula has it in letters."
    for o in soup.select("main a[href]"):
        if not o.get_text(strip=True) and not o.find("img") and not o.get("aria-label"): o.unwrap()
        elif o.find(class_="math"): o["aria-label"] = readable(o.get_text())


def phone_contents(soup, page):
    "The contents of a long page, folded above its text, where a narrow screen has no margin for them."
    toc, head = soup.select_one("nav#TOC > ul"), soup.select_one("#title-block-header")
    if not toc or not head or len(toc.find_all("a")) < MAX_CONTENTS: return
    box = BeautifulSoup(str(toc), "html.parser")
    for o in box.find_all(True):
        for k in ("id", "data-scroll-target", "class"): o.attrs.pop(k, None)
    details = new(soup, "details", class_="phone-contents")
    details.append(new(soup, "summary", "On this page"))
    details.append(box)
    head.insert_after(details)


# ---------------------------------------------------------------- ways to run it

# editable, for the ledgers of the experiments lie in the clone; the kernel runs already, so it is told the path
INSTALL = """import os, sys
if not os.path.exists('{up}settings.ini'):  # not in a clone
    !git clone -q --depth 1 {git}
    %pip install -q -e './{name}[train,graph,nbs,text]'
    %cd -q {name}/nbs{folder}
    sys.path.insert(0, os.path.abspath('{up}'))"""


NOTE = """<p>Colab brings this page without the rest of the repository: run this cell before the others; in a clone it
does nothing. Binder needs nothing. In a clone, <code>make lab</code> opens the notebooks with their kernel.</p>"""


def ways(soup, page):
    "A notebook's page says where it can be run, and what Colab needs first."
    if page.notebook is None: return
    path = f"nbs/{page.notebook}"
    repo = page.git.removeprefix("https://github.com/")
    name = repo.split("/")[-1]
    folder = "".join(f"/{o}" for o in page.notebook.split("/")[:-1])
    links = {
        "Colab": f"https://colab.research.google.com/github/{repo}/blob/{page.branch}/{path}",
        "Binder": f"https://mybinder.org/v2/gh/{repo}/{page.branch}?urlpath=lab/tree/{path}",
        "Notebook": f"{page.git}/blob/{page.branch}/{path}",
    }
    row = " ".join(f'<a href="{escape(v)}">{k}</a>' for k, v in links.items())
    root = "../"*(path.count("/"))  # the clone, from the notebook's folder
    first = escape(INSTALL.format(git=page.git, name=name, folder=folder, up=root), quote=False)
    box = BeautifulSoup(f'''<div class="ways"><span>Run this page: {row}</span> <details>
<summary>first cell for Colab</summary>{NOTE}<pre><code>{first}</code></pre></details></div>''', "html.parser")
    head, main = soup.select_one("#title-block-header"), soup.select_one("main")
    if page.notebook != "index.ipynb" and head: head.insert_after(box)
    elif main: main.append(box)


MENDS = [own_links, figures, landmarks, buttons, open_use, tables, together, answers, link_texts, phone_contents, ways,
         maths, scripts]


def mend(page):
    "Every change, on one page; what the search finds there, and its title and line by address."
    soup = BeautifulSoup(page.path.read_text(encoding="utf-8"), "html.parser")
    for o in soup.find_all(string=lambda s: isinstance(s, Comment)): o.extract()
    for step in MENDS: step(soup, page)
    page.path.write_text(str(soup), encoding="utf-8")
    href = str(page.path.relative_to(page.docs))
    return list(entries(soup, href)), {href: title_and_line(soup, href)}


def own_fonts(docs):
    "Style sheets ask no other host for fonts: styles.css names those that a reader's system has."
    for path in docs.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        if "@import" in text: path.write_text(CSS_IMPORT.sub("", text), encoding="utf-8")
