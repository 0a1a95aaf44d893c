"The experiment on frozen features: at a small size by the command, and its ledger."
import json

import numpy as np
import pandas as pd
import pytest
from small_experiments import REPO, cli

from softnce.runs import at_best_rate

KEY = ['part', 'hidden', 'logits_bn', 'targets', 'loss', 'noise', 'noise_size', 'batch_size', 'smoothing', 'per_class',
       'softness']
SMALL = dict(parts=['table', 'uncertainty', 'few labels', 'smoothing', 'noise samples', 'noise sources'], heads=[0],
             norms=[False], seeds=[0, 1], epochs=2, lrs=[.01, .03], few=[5], softness=[2.], smoothings=[.2],
             ratios=[1.])


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The rows of a run on digits, and its folder."
    root = tmp_path_factory.mktemp('frozen')
    given = [a for k, v in SMALL.items() for a in ('-p', f'{k}={json.dumps(v)}')]
    res = cli('run', 'tiny_features', *given, '--out', root/'runs', cwd=root)
    assert res.returncode == 0, res.stdout[-2000:] + res.stderr[-2000:]
    found, = (root/'runs'/'tiny_features').glob('*/metrics.json')
    return pd.DataFrame(json.loads(found.read_text())), found.parent


def test_every_setting_is_searched_and_reported(made):
    "A rate inside its grid, chosen by one seed on the validation part; the others on the reported part at that rate."
    rows, folder = made
    assert rows.part.value_counts().index.sort_values().tolist() == sorted(SMALL['parts'])
    for _, part in rows.groupby(KEY):
        valid, test = (part[part.split == s] for s in ('valid', 'test'))
        assert set(valid.seed) == {100} and test.seed.tolist() == [0, 1] and valid.lr.is_unique
        best = valid.sort_values('nll_fitted').lr.iloc[0]
        assert (test.lr == best).all() and valid.lr.min() < best < valid.lr.max()
    assert {'tiny_features.png', 'table.csv', 'few_labels.csv'} <= {p.name for p in folder.iterdir()}


def test_what_the_rows_say_is_so(made):
    rows, _ = made
    test = rows[rows.split == 'test']
    assert (test[test.part == 'table'].top1 > .8).all() and (test.nll > 0).all()
    right = test.groupby(['targets', 'loss']).read_right.all()
    assert not right['mixed', 'soft_target_info_nce'] and right['mixed', 'expected_info_nce']
    assert right['smoothed', 'soft_target_info_nce'] and right['labels', 'info_nce']
    known = test[test.part == 'uncertainty']
    assert (known.kl > 0).all() and test[test.part != 'uncertainty'].kl.isna().all()
    closed = test[(test.noise == 'closed_form')].set_index('seed').nll # the expectation over uniform noise: NLL
    nll = rows[(rows.part == 'noise samples') & (rows.loss == 'nll')].set_index(['lr', 'seed', 'split']).nll
    lr = test[test.noise == 'closed_form'].lr.iloc[0]
    for seed in (0, 1):
        if (lr, seed, 'test') in nll.index: assert closed[seed] == pytest.approx(nll[lr, seed, 'test'], abs=2e-3)


def test_unknown_parts_are_named(tmp_path):
    res = cli('run', 'tiny_features', '-p', "parts=['tabel']", '--out', tmp_path/'runs', cwd=tmp_path)
    assert res.returncode and 'parts must be among table, uncertainty' in res.stdout + res.stderr


def test_the_ledger_has_its_seeds_and_its_rates():
    "Five seeds, none of the search's; at least four rates; the reported rate is the one that the search chose."
    book = pd.read_csv(REPO/'results'/'tiny_features.csv')
    assert not book.duplicated([*KEY, 'lr', 'seed', 'split']).any()
    for key, part in book.groupby(KEY):
        valid, test = (part[part.split == s] for s in ('valid', 'test'))
        assert valid.lr.nunique() >= 4 and set(test.seed) == {0, 1, 2, 3, 4} and set(valid.seed) == {100}, key
        assert (test.lr == valid.sort_values('nll_fitted').lr.iloc[0]).all(), key
    main = book[(book.part == 'table') & (book.hidden == 0) & ~book.logits_bn]
    assert set(main.loss) == {'nll', 'info_nce', 'soft_target_cross_entropy', 'soft_distribution_info_nce',
                              'soft_target_info_nce', 'expected_info_nce'}
    assert (book.rows == 10000).all() and (main.train_rows == 90000).all()
    assert len(at_best_rate(book[book.part == 'table'], KEY)) % 5 == 0
    assert np.isfinite(book[['top1', 'nll', 'nll_fitted', 'temperature']]).all(axis=None)
