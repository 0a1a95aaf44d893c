"What a page makes of a cell: options that hide or fold its code, and that describe its figure."
import html, re, shutil, sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]/"tools"))
pytest.importorskip("nbdev")
import nbproc
from small_site import build, cell, picture, said, text

SIDEBAR = """
format: {html: {css: styles.css}}
website: {sidebar: {contents: [index.ipynb, guides/a.ipynb]}}
"""
CELLS = [
    cell("#| echo: false\nhidden = 1", said("hidden_says\n")),
    cell("#| code-fold: true\nfolded = 2", said("folded_says\n")),
    cell('#| fig-alt: "A line: it rises."\n#| fig-cap: "See that \'it\' rises & falls."\nshown = 3', picture()),
    cell('#| echo: false\n#| fig-alt: "Only described."\nhidden = 4', picture()),
    cell("#| hide\nsecret = 5", said("secret_says\n")),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if not (shutil.which("quarto") or shutil.which("smalldocs")): pytest.skip("neither quarto nor smalldocs is on PATH")
    docs = build(tmp_path_factory.mktemp("cells"), SIDEBAR, index=("Home", text("Hello.")), guides__a=("Guide", *CELLS))
    return (docs/"guides"/"a.html").read_text()


def without_tags(page): return re.sub(r"<[^>]+>", "", page)


def test_echo_false_hides_the_code_and_keeps_the_output(page):
    assert "hidden_says" in page and "hidden =" not in without_tags(page)


def test_a_hidden_cell_leaves_nothing(page): assert "secret" not in page


def test_folded_code_opens_on_a_click(page):
    folds = re.findall(r"<details[^>]*>.*?</details>", page, re.S)
    folded, = [o for o in folds if "code-fold" in o.split(">")[0]]  # the way to Colab is folded too
    assert "folded = 2" in without_tags(folded) and "<summary" in folded and "open" not in folded.split(">")[0]
    assert "folded_says" not in folded and "folded_says" in page


def test_a_figure_has_its_text_and_its_caption(page):
    first, second = re.findall(r"<figure.*?</figure>", page, re.S)
    assert 'alt="A line: it rises."' in first and "<figcaption" in first
    assert "See that 'it' rises & falls." in html.unescape(first)
    assert 'alt="Only described."' in second and "<figcaption" not in second
    assert "shown = 3" in without_tags(page)


TO = "../theory/notation.html#"
TEXTS = {
    "Noise samples are *candidates*, and candidates stay.":
        f"[Noise samples]({TO}noise-sample) are *[candidates]({TO}candidate)*, and candidates stay.",
    "The candidates of a noise\ndistribution": f"The [candidates]({TO}candidate) of a noise\ndistribution",
    "`candidate` $candidate$ [a candidate](b.html)\n\n## A candidate\n\nnon-candidate": None,
    "```\ncandidate\n```\n\n$$ candidate $$": None,
    "an [`a`](a.html) in-batch": f"an [`a`](a.html) [in-batch]({TO}in-batch)",
}


@pytest.mark.parametrize("text, wanted", TEXTS.items())
def test_words_of_the_glossary_are_linked_once(text, wanted):
    assert nbproc.explained(text, list(nbproc.TERMS)) == (wanted or text)


def test_the_next_cell_does_not_link_again():
    left = list(nbproc.TERMS)
    assert nbproc.explained("a candidate", left) != "a candidate" and "candidates?" not in left
    assert nbproc.explained("a candidate", left) == "a candidate"


def test_the_glossary_has_the_words():
    cells = nbproc.api.read(nbproc.api.ROOT/"nbs"/f"{nbproc.GLOSSARY}.ipynb")["cells"]
    there = {m.lower().replace(" ", "-") for c in cells for m in re.findall(r"^### (.+)", c["source"], re.M)}
    assert set(nbproc.TERMS.values()) <= there
