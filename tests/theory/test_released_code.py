"""The page about the released code: its arms do what it says of them, and its sentences are those of the ledger."""
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from softnce.vision import Mixing

ROOT = Path(__file__).resolve().parents[2]
CELLS = json.loads((ROOT/'nbs'/'theory'/'released_code.ipynb').read_text(encoding='utf-8'))['cells']


def source(cell): return ''.join(cell['source'])


@pytest.fixture(scope='module')
def page():
    "The names that the page's folded cells of arms define."
    wanted = ('#| code-summary: The arms', '#| code-summary: Heads', '#| code-summary: Mixing\n')
    names = {}
    for cell in CELLS:
        if cell['cell_type'] != 'code': continue
        imports = source(cell).startswith('#| hide\nimport warnings')
        if imports or any(w in source(cell) for w in wanted): exec(source(cell), names)
    return names


def test_the_head_of_the_code(page):
    "Three layers without biases, normalised and cut between, logits of mean zero and mean square one over the batch."
    torch.manual_seed(0)
    head = page['head']('normalised', True)
    kinds = [type(layer) for layer in head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU]*2 + [nn.Linear, nn.BatchNorm1d]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear)) and head[-1].weight is None
    logits = head(torch.randn(64, 32))
    torch.testing.assert_close(logits.mean(0), torch.zeros(10), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.pow(2).mean(0), torch.ones(10), rtol=0, atol=1e-2)
    assert isinstance(page['head']('linear', False), nn.Linear)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in page['head']('paper', False).modules())


def test_statistics_of_a_rank(page):
    x = torch.arange(8.)[:, None]*torch.tensor([1., -2.])
    module = page['PerRank'](nn.BatchNorm1d(2, affine=False), 2)
    by_hand = torch.cat([(v - v.mean(0))/(v.var(0, unbiased=False) + 1e-5).sqrt() for v in (x[:4], x[4:])])
    torch.testing.assert_close(module(x), by_hand)
    assert (module.eval()(x) - by_hand).abs().max() > .1  # in evaluation the running statistics, of all rows at once


def drawn(mixing, seed=0):
    "Mixed images and targets of eight rows, each image a constant."
    from softnce.vision.batches import seeded
    images, labels = torch.arange(8.)[:, None, None, None].expand(8, 1, 2, 2).clone(), torch.arange(8)
    with seeded(seed): return mixing(images, labels)


def weights(x):
    "lambda of every row, from its constant image: lam i + (1-lam)(partner)."
    x, n = x[:, 0, 0, 0], len(x)
    rows = torch.arange(n, dtype=x.dtype)
    return (x - rows.flip(0))/(rows - rows.flip(0))


def test_mixing_by_rank_with_a_probability_and_own_labels(page):
    lam = weights(drawn(page['ReleasedMixing']())[0])
    torch.testing.assert_close(lam, lam[:1].expand(8), rtol=0, atol=1e-5)  # one a batch
    x, targets = drawn(page['ReleasedMixing'](lam_ranks=2))
    own = [weights(part - 4*k)[0] for k, part in enumerate(x.chunk(2))]    # pairs are within a rank
    assert abs(own[0] - own[1]) > 1e-3
    said = [(targets.dense()[4*k, 4*k] - .01)/.9 for k in range(2)]        # and the targets have the same lambda
    torch.testing.assert_close(torch.stack(said), torch.stack(own), rtol=0, atol=1e-4)
    x, labels = drawn(page['ReleasedMixing'](own_label=True))
    assert labels.tolist() == list(range(8)) and (x[:, 0, 0, 0] - torch.arange(8.)).abs().max() > .1
    def whole(mixing, seeds): return sum(torch.equal(drawn(mixing, s)[0][:, 0, 0, 0], torch.arange(8.)) for s in seeds)
    assert 20 <= whole(page['ReleasedMixing'](prob=.8), range(200)) <= 60
    assert whole(Mixing(10, .8, 0., .1), range(50)) == 0


# ---------------------------------------------------------------- the ledger
BOOK = pd.read_csv(ROOT/'results'/'released_code.csv')


def reported(arm, loss):
    "Reported rows of an arm at the rate of the least validation NLL over seeds from 10 on."
    search = BOOK[(BOOK.loss == loss) & (BOOK.seed >= 10) & (BOOK.split == 'valid')]
    own = search[search.arm == arm]
    rates = (own if len(own) else search[search.arm == 'paper']).groupby('lr').nll_fitted.mean()
    assert min(rates.index) < rates.idxmin() < max(rates.index), (arm, loss, rates)
    rows = BOOK[(BOOK.arm == arm) & (BOOK.loss == loss) & (BOOK.lr == rates.idxmin()) & (BOOK.split == 'test')]
    return rows[rows.seed < 10].set_index('seed')


@pytest.mark.parametrize('arm, loss', sorted(set(zip(BOOK.arm, BOOK.loss))))
def test_every_arm_has_its_seeds_and_a_rate_within_the_grid(arm, loss):
    rows = reported(arm, loss)
    assert len(rows) >= 5 and rows.index.is_unique and (rows.rows == 719).all()
    assert (rows.best_epoch_top1 >= rows.top1).all()


def test_the_sentences_are_those_of_the_ledger():
    said = next(''.join(o['data']['text/markdown']) for c in CELLS for o in c.get('outputs', [])
                if 'text/markdown' in o.get('data', {}))
    for arm in ('paper', 'linear head', 'both'):
        d = reported(arm, 'soft_target_info_nce').top1 - reported(arm, 'soft_target_cross_entropy').top1
        assert f'{100*d.mean():+.1f} ± ' in said, arm
    d = reported('own label on a mixed image', 'soft_distribution_info_nce').top1
    d = (d - reported('paper', 'soft_distribution_info_nce').top1).dropna()
    assert f'{100*d.mean():+.1f} ± ' in said
    best = [reported('paper', loss).pipe(lambda r: 100*(r.best_epoch_top1 - r.top1)).mean()
            for loss in ('soft_target_cross_entropy', 'soft_target_info_nce')]
    assert all(f'{b:.2f} ± ' in said for b in best) and min(best) >= 0
    assert len(re.findall(r'[+-]\d+\.\d ± \d+\.\d', said)) >= 10 and np.isfinite(best).all()
