"Pages whose sentences and tables are computed from the ledgers: what is committed is what the ledgers say today."
from pathlib import Path

import nbformat, pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]

COMPUTED = ["index.ipynb", "results/claims.ipynb", "guides/which_loss.ipynb"]


def said(notebook):
    "The texts that cells made, one a cell."
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    return [o.data["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})]


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_committed_is_what_the_ledgers_say(name):
    committed = nbformat.read(ROOT/"nbs"/name, as_version=4)
    again = nbformat.read(ROOT/"nbs"/name, as_version=4)
    for c in again.cells: # the home page draws its picture into the tree: not here
        if c.cell_type == "code" and "#| eval: false" in c.source: c.source = ""
    NotebookClient(again, timeout=120, resources={"metadata": {"path": str((ROOT/"nbs"/name).parent)}}).execute()
    assert said(again) and said(committed) == said(again)


def test_every_claim_has_a_verdict():
    counted, *tables = said(nbformat.read(ROOT/"nbs"/"results"/"claims.ipynb", as_version=4))
    rows = [o for o in tables[0].splitlines() if o.startswith("| ") and o[2].isdigit()]
    assert len(rows) == int(counted.split()[0]) > 30
    assert all(sum(f"**{v}**" in o for v in ("reproduced", "refuted", "undecided")) == 1 for o in rows)
    for part in ("abstract", "section 4.1", "section 4.2", "section 5", "ours"):
        assert any(part in o for o in rows), part
    assert any("section 3" in o for o in tables[1].splitlines())
