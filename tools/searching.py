"""What the search box of the site reads: letters instead of TeX, guides before the rest, a page's own keywords.

A page names its keywords in its title cell, `- keywords: label smoothing, votes`: each is found as if it
were a section.
"""
import json, re

from bs4 import NavigableString

FIRST = ["guides/", "index", "api/", "theory/", "experiments/", "losses/"]  # among equals the earlier comes first
NAMES = ("alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi varphi chi psi omega"
         " Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell partial sum prod int times cdot cdots dots ldots"
         " le leq ge geq ne neq approx sim propto infty to in mid langle rangle top equiv perp otimes odot pm sqrt"
         " lVert rVert")
LETTERS = dict(zip(NAMES.split(), "αβγδεζηθκλμνξπρστφφχψωΓΔΘΛΞΠΣΦΨΩℓ∂ΣΠ∫×·………≤≤≥≥≠≠≈~∝∞→∈|⟨⟩ᵀ≡⊥⊗⊙±√‖‖"))
WORDS = {"log", "exp", "max", "min", "softmax", "cos", "sin", "tanh", "arg", "det", "Pr", "lim"}
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
FONT = re.compile(r"\\(?:math\w+|text\w*|operatorname|hat|bar|tilde|sqrt|boldsymbol)\*?\s*\{([^{}]*)\}")
LAYOUT = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\(?:left|right|[bB]ig[lr]?|limits|displaystyle)\b|&")
MATHS = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


def letters(tex):
    "A formula as a line of letters: `\\frac{a}{b}` is (a)/(b), a command that says nothing is left out."
    text = re.sub(r"\\tag\s*\{([^{}]*)\}", r" (\1)", tex)
    for _ in range(4):  # innermost braces first
        text = re.sub(r"[_^]\{([^{}\\]*)\}", r"_\1", FONT.sub(r" \1 ", FRACTION.sub(r"(\1)/(\2)", text)))
    def word(m): return f" {LETTERS.get(m[1]) or (m[1] if m[1] in WORDS else '')} "
    text = re.sub(r"\\([A-Za-z]+)", word, LAYOUT.sub(" ", text))
    return re.sub(r"\s+", " ", re.sub(r"\\[,;:! |]?|[{}]", " ", text)).strip()


def readable(text): return MATHS.sub(lambda m: letters(m[1] or m[2]), text)


SKIPPED = "script, style, nav, button, .phone-contents, .ways, details.code-fold, #title-block-header, .anchorjs-link"


def sections(soup):
    "The text of a page by section: `(anchor, heading, text)`; what stands before the first heading has no anchor."
    found = [["", "", []]]
    def walk(o):
        for c in o.children:
            if isinstance(c, NavigableString): found[-1][2].append(str(c))
            elif id(c) in skipped: continue
            elif c.name in ("h2", "h3"):
                anchor = c.get("id") or c.get("data-anchor-id") or c.parent.get("id") or ""
                found.append([anchor, readable(c.get_text()), []])
            elif "math" in c.get("class", []): found[-1][2].append(f" {readable(c.get_text())} ")
            else: walk(c)
    main = soup.find("main")
    skipped = {id(o) for o in main.select(SKIPPED)} if main else set()
    if main: walk(main)
    return [(anchor, heading, re.sub(r"\s+", " ", "".join(text)).strip()) for anchor, heading, text in found]


def title_and_line(soup, href):
    "What a page is called, and its one line."
    title = soup.select_one("main h1") or soup.find("title")
    return readable(title.get_text()).strip() if title else href, readable(meta(soup, "description"))


def meta(soup, name): return (soup.find("meta", attrs={"name": name}) or {}).get("content", "")


def entries(soup, href):
    "What can be found on a page: its sections, and one entry for every keyword."
    title, what = title_and_line(soup, href)
    def entry(anchor, section, text):
        return dict(objectID=f"{href}#{anchor or section}", href=f"{href}#{anchor}" if anchor else href, title=title,
                    section=section, text=text)
    for word in filter(None, map(str.strip, meta(soup, "keywords").split(","))):
        yield {**entry("", word, word), "title": f"{title}: {word}"}  # a match in every field, short, comes first
    for anchor, heading, text in sections(soup):
        if anchor or text: yield entry(anchor, heading, text if anchor else f"{what}. {text}")


def rank(entry):
    "Guides first; pages of a folder that is not named last."
    return next((n for n, o in enumerate(FIRST) if entry["href"].startswith(o)), len(FIRST))


def write(docs, found):
    "Write search.json, in place of the renderer's."
    text = json.dumps(sorted(found, key=rank), ensure_ascii=False)
    (docs/"search.json").write_text(text, encoding="utf-8")
