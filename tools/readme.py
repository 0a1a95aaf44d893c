"Write README.md from nbs/index.ipynb."
import re, sys

import nbformat
from common import ROOT
from nbconvert import MarkdownExporter

NOTE = "<!-- Made from nbs/index.ipynb by `make export`: edit the notebook. -->\n\n"
# the target of a Markdown link or image, inside the repository
RELATIVE = re.compile(r"(\]\()(?![a-z]+:|[#/])([^)\s]+)")


def cell_for_readme(cell):
    "The cell without nbdev's directives; None when it is hidden."
    lines = cell.source.splitlines()
    directives = {o.removeprefix("#|").split()[0] for o in lines if re.match(r"#\|\s*\w", o)}
    if cell.cell_type == "code":
        if directives & {"hide", "default_exp"} or not cell.source.strip(): return None
        if any("image/" in mime for o in cell.outputs for mime in o.get("data", {})):
            sys.exit("nbs/index.ipynb: an output holds a picture; "
                     "commit the picture in nbs/images and link to it in Markdown")
        if "echo:" in directives: return nbformat.v4.new_markdown_cell(in_repository(computed(cell)))
        cell.source = "\n".join(o for o in lines if not o.startswith("#|"))
    else: cell.source = in_repository(cell.source)
    return cell


def in_repository(text):
    "Links of a notebook at the top of nbs, as a file at the top of the repository has them."
    return RELATIVE.sub(r"\1nbs/\2", text).replace("](nbs/../", "](")


def computed(cell):
    "The sentences that a cell made."
    return "\n".join(o["data"]["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {}))


def readme(root=ROOT):
    "The text of README.md."
    nb = nbformat.read(root/"nbs"/"index.ipynb", as_version=4)
    nb.cells = [c for c in map(cell_for_readme, nb.cells) if c]
    nb.metadata.language_info = {"name": "python"}  # nbdev_clean drops it; the fences need it
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(o.rstrip() for o in body.splitlines()))
    return NOTE + body.strip() + "\n"


if __name__ == "__main__": (ROOT/"README.md").write_text(readme(), encoding="utf-8")
