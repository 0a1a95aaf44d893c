"""The numbers and the stills of the figures that move: nbs/scripts/moving_data.js and one SVG each.

`python tools/moving.py` writes them again; tests/site/test_moving.py says when that is due.
"""
import json
from pathlib import Path

import torch

from browse import launch
from softnce.theory.information import info_nce_bound, mutual_information, optimal_info_nce, soft_joint

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT/"nbs"/"scripts"
FIGURES = ["candidates", "field", "bound"]
NOISE = (1, 2, 4, 8, 16, 32, 64)  # numbers of negatives of the bound


def numbers():
    "What the figures are drawn from; the same as on the pages of gradients and information."
    four, grid = (.9*torch.eye(4, dtype=torch.float64) + .1/4)/4, torch.linspace(0, 1, 21).tolist()
    g = torch.Generator().manual_seed(5)
    labels = [0, 1, 2, 0, 3, 1]
    logits = torch.randn(6, 4, generator=g) + 1.5*torch.eye(4)[labels]
    def rounded(v): return [round(float(x), 6) for x in v]
    return dict(
        batch=dict(labels=labels, logits=[[round(x, 2) for x in row] for row in logits.tolist()]),
        noise=torch.randint(5, (64,), generator=torch.Generator().manual_seed(39)).tolist(),
        truth=rounded(mutual_information(soft_joint(four, e)) for e in grid),
        bounds={n: rounded(info_nce_bound(optimal_info_nce(four, e, n), n) for e in grid) for n in NOISE})


def data_file(): return f"window.movingData = {json.dumps(numbers())};\n"


def page():
    "A page with the scripts, before any figure is on it."
    texts = [(SCRIPTS/n).read_text(encoding="utf-8") for n in ("moving_data.js", "moving.js")]
    return "".join(f"<script>{o}</script>" for o in texts)


def stills(tab):
    "The figures as they stand at first, in ink on white, by a browser's page that has the scripts."
    svgs = {n: tab.evaluate("n => moving.still(n)", n) for n in FIGURES}
    ink = ' style="color: #212529; background: #fff"'
    return {n: svg.replace("<svg ", f"<svg{ink} ", 1)+"\n" for n, svg in svgs.items()}


def main():
    (SCRIPTS/"moving_data.js").write_text(data_file(), encoding="utf-8")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = launch(p)
        tab = browser.new_page()
        tab.set_content(page())
        for name, svg in stills(tab).items(): (SCRIPTS/f"{name}.svg").write_text(svg, encoding="utf-8")
        browser.close()


if __name__ == "__main__": main()
