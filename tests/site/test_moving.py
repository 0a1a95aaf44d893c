"The figures that move show the package's numbers, answer to the keyboard, and have a still where no script runs."
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT/"tools"))
pytest.importorskip("playwright")
import browse
import moving
from softnce import mix, one_hot, smooth, soft_target_info_nce
from softnce.theory import embedding_gradient


@pytest.fixture(scope="module")
def tab():
    if why := browse.ready(): pytest.skip(why)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = browse.launch(p)
        tab = browser.new_page()
        boxes = "".join(f'<div data-moving="{n}"><img class="still" alt="x"></div>' for n in moving.FIGURES)
        tab.set_content(f"<main>{boxes}</main>{moving.page()}")
        yield tab
        browser.close()


@pytest.mark.parametrize("tau, eps, lam", [(1., 0., 1.), (.5, .3, 1.), (2., .1, .6), (.25, .9, .5)])
def test_the_matrix_is_the_loss(tab, tau, eps, lam):
    batch = moving.numbers()["batch"]
    labels, logits = torch.tensor(batch["labels"]), torch.tensor(batch["logits"], dtype=torch.float64)
    hard = one_hot(labels, 4).double()
    targets = smooth(mix(hard, lam), eps) if lam < 1 else smooth(hard, eps)
    wanted = soft_target_info_nce(logits, targets, noise_probs=hard.mean(0), temperature=tau)
    found = tab.evaluate("v => moving.candidates(v)", dict(tau=tau, eps=eps, lam=lam))
    torch.testing.assert_close(torch.tensor(found["targets"], dtype=torch.float64), targets, rtol=0, atol=1e-12)
    assert found["loss"] == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.parametrize("tau, eps, negatives", [(.5, 0., 8), (.1, .5, 64), (2.5, .9, 1), (1., 0., 0)])
def test_the_force_is_minus_the_gradient(tab, tau, eps, negatives):
    angles = torch.pi/2 + 2*torch.pi*torch.arange(5).double()/5
    circle, z = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([[.4, -1.1]], dtype=torch.float64)
    ids = torch.tensor([0, *moving.numbers()["noise"][:negatives]])
    wanted = -embedding_gradient(z, circle, smooth(one_hot(ids, 5).double(), eps), 0, temperature=tau)[0]
    found = tab.evaluate("([v, z]) => moving.force(v, z)", [dict(tau=tau, eps=eps, negatives=negatives), z[0].tolist()])
    assert found == pytest.approx(wanted.tolist(), abs=1e-6)


def test_the_bound_is_below_and_rises(tab):
    at = [tab.evaluate("v => moving.bound(v)", dict(eps=.2, N=n)) for n in moving.NOISE]
    assert all(0 < a["bound"] < b["bound"] < b["truth"] for a, b in zip(at, at[1:]))
    numbers = moving.numbers()
    assert at[0]["truth"] == pytest.approx(numbers["truth"][4])
    assert at[0]["bound"] == pytest.approx(numbers["bounds"][1][4])


@pytest.mark.parametrize("n, name", list(enumerate(moving.FIGURES)))
def test_the_keyboard_moves_them(tab, n, name):
    box = tab.locator("[data-moving]").nth(n)
    before, slider = box.locator("svg").inner_html(), box.locator("input").first
    slider.focus()
    for _ in range(3): tab.keyboard.press("ArrowRight")
    assert box.locator("svg").inner_html() != before
    assert box.locator("svg").get_attribute("aria-label") and box.locator("output").first.inner_text()


def test_numbers_and_stills_are_current(tab):
    assert (moving.SCRIPTS/"moving_data.js").read_text(encoding="utf-8") == moving.data_file(), "python tools/moving.py"
    for name, svg in moving.stills(tab).items():
        assert (moving.SCRIPTS/f"{name}.svg").read_text(encoding="utf-8") == svg, "python tools/moving.py"
