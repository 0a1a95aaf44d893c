"The pages of digits: what stands there is what their ledgers say, and the ledgers bear it."
import json, re

import matplotlib
import pandas as pd
import pytest

from softnce.runs import at_best_rate, difference, holm, ledgers, read_ledger
from small_experiments import REPO

matplotlib.use('agg')
PAGES = ['digits', 'noise_samples', 'label_smoothing', 'calibration', 'heads']
FOLDER = REPO/'nbs'/'experiments'
CE, NCE = 'soft_target_cross_entropy', 'soft_target_info_nce'


def before_method(name):
    "The code cells of a page that read its ledger: source and stored outputs."
    cells = json.loads((FOLDER/f'{name}.ipynb').read_text())['cells']
    stop = next(i for i, c in enumerate(cells) if '## Method' in ''.join(c['source']))
    return [(''.join(c['source']), c['outputs']) for c in cells[:stop] if c['cell_type'] == 'code']


def texts(outputs, kind='text/markdown'):
    return [''.join(o['data'][kind]) for o in outputs if kind in o.get('data', {})]


@pytest.mark.parametrize('name', PAGES)
def test_a_page_says_what_its_ledger_says(name, monkeypatch):
    "Its sentences and tables, made again from the ledgers, are the committed ones."
    import matplotlib.pyplot as plt
    monkeypatch.chdir(FOLDER)
    shown, space = [], {}
    space['display'] = lambda *a: shown.extend(a)
    for source, outputs in before_method(name):
        shown.clear()
        exec(compile(source, name, 'exec'), space)
        assert [o.data for o in shown if hasattr(o, 'data')] == texts(outputs), source[:80]
        frames, tables = [o for o in shown if isinstance(o, pd.DataFrame)], texts(outputs, 'text/html')
        assert len(frames) == len(tables), source[:80]
        for frame, html in zip(frames, tables):  # every cell with an interval
            wanted = [str(v) for row in frame.values for v in row if '±' in str(v)]
            assert re.findall('<td>([^<]*±[^<]*)</td>', html) == wanted, source[:80]
    plt.close('all')


@pytest.mark.parametrize('name', PAGES)
def test_a_page_has_the_order_of_the_others(name):
    cells = json.loads((FOLDER/f'{name}.ipynb').read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    at = [text.index(f'## {part}') for part in ('What was found', 'What follows for you', 'Method', 'This run')]
    assert at == sorted(at)
    for source, outputs in before_method(name):
        if any('image/png' in o.get('data', {}) for o in outputs):
            assert '#| fig-alt: "' in source and '#| fig-cap: "' in source, source[:80]
        if outputs: assert source.startswith('#| echo: false'), source[:80]
    assert any('image/png' in o.get('data', {}) for _, outputs in before_method(name) for o in outputs)


@pytest.mark.parametrize('name', PAGES)
def test_no_interval_has_zero_width(name):
    found = '\n'.join(json.dumps(o, ensure_ascii=False) for _, outputs in before_method(name) for o in outputs)
    tops = [t for _, outputs in before_method(name) for t in texts(outputs, 'text/plain') + texts(outputs)]
    assert '±' in found and not re.search(r'\d\.\d ± 0\.0(?!\d)', '\n'.join(tops))


# ---- N/K

CELL = ['targets', 'norm', 'source', 'batch_size', 'steps']


@pytest.fixture(scope='module')
def small(): return read_ledger('noise_samples_small')


def test_the_ledger_of_small_batches(small):
    "N/K from .1 to 10, at least four rates, none chosen at an edge that was not widened, twenty seeds."
    assert not small.duplicated([*CELL, 'lr', 'seed', 'split']).any()
    assert sorted(set(small.batch_size)) == [1, 2, 4, 8, 16, 32, 100]
    for key, part in small.groupby(CELL):
        valid, test = part[part.split == 'valid'], part[part.split == 'test']
        rates, lr = sorted(set(valid.lr)), set(test.lr)
        assert len(rates) >= 5 and len(lr) == 1 and len(test) == 20 and not set(test.seed) & set(valid.seed), key
        assert valid.groupby('lr').nll_fitted.mean().idxmin() == lr.copy().pop(), key
        assert lr.pop() not in (rates[0], rates[-1]) or len(rates) == 8, key
    both = small[small.split == 'test']
    assert (abs(both.top1*both.rows - (both.top1*both.rows).round()) < .02).all()
    assert not ((small.source == 'in_batch') & (small.batch_size == 1)).any()


def gaps(small, source, base='ce', equal='passes', targets='mixed', norm=False):
    best = at_best_rate(small[(small.targets == targets) & (small.norm == norm)], CELL)
    same = best.steps == 359
    best = best[same if equal == 'steps' else ~same | (best.batch_size == 16)]
    return {N: difference(part, dict(source=source), dict(source=base), counts='rows')
            for N, part in best.groupby('batch_size') if {source, base} <= set(part.source)}


@pytest.mark.parametrize('equal', ['passes', 'steps'])
def test_in_batch_noise_loses_where_rows_are_fewer_than_classes(small, equal):
    found = gaps(small, 'in_batch', equal=equal)
    few = [found[N] for N in (2, 4, 8)]
    assert max(holm([d['p'] for d in found.values()])[:2]) < .05
    assert all(d['points'] + d['half'] < 0 for d in few) and few[0]['points'] < -2
    assert few[0]['points'] < few[1]['points'] < few[2]['points']  # the less, the more rows
    assert abs(found[100]['points']) < 1


def test_part_of_it_is_bias_and_more_candidates_give_it_back(small):
    "The averaged loss has the bias alone; it stands between, at two rows, and explains more of short trainings."
    share = {}
    for equal in ('passes', 'steps'):
        bias, both = gaps(small, 'averaged', equal=equal)[2], gaps(small, 'in_batch', equal=equal)[2]
        assert both['points'] < bias['points'] < 0 and bias['points'] + bias['half'] < 0
        share[equal] = bias['points']/both['points']
    assert share['passes'] < .5 < share['steps']
    for source in ('queue', 'fresh', 'closed_form'):
        d = gaps(small, source, 'in_batch')[2]
        assert d['points'] - d['half'] > 1


def test_the_gradient_shrinks_as_predicted():
    "At equal scores exactly, later to first order where rows are as many as classes or more; not at two rows."
    df = read_ledger('noise_samples_shrinkage')
    mean = df.groupby(['steps', 'batch_size'])[['measured', 'predicted']].mean()
    off = (mean.measured - mean.predicted).abs()
    sizes = mean.loc[0].index.to_numpy()
    assert (abs(mean.loc[0].measured - (1 - 1/sizes)) < .01).all() and off.loc[0].max() < .01
    for steps in (36, 359): assert off.loc[steps][sizes >= 16].max() < .05 < off.loc[steps][2]
    assert mean.measured.unstack('steps').diff(axis=1).iloc[:, 1:].max().max() < 0  # the surer, the less is left


# ---- proper scores

def by_smoothing():
    best = at_best_rate(read_ledger('label_smoothing'), ['loss', 'smoothing'])
    mean = best[best.smoothing > 0].groupby(['loss', 'seed'])[['top1', 'nll_naive', 'nll_fitted', 'brier_fitted',
                                                               'ece_naive', 'ece_fitted']].mean().reset_index()
    return best, lambda c, scale=1.: difference(mean, dict(loss=NCE), dict(loss=CE), c, scale)


def test_smoothing_after_a_temperature():
    "The ECE does not tell the losses apart, NLL, Brier score and accuracy do; before it InfoNCE is ahead."
    _, d = by_smoothing()
    assert d('nll_naive')['points'] + d('nll_naive')['half'] < 0 and d('ece_naive')['points'] < -.1
    for column in ('nll_fitted', 'brier_fitted'): assert d(column)['points'] - d(column)['half'] > 0, column
    assert d('top1')['points'] + d('top1')['half'] < 0
    assert abs(d('ece_fitted', 100.)['points']) < 1


def test_smoothing_helps_cross_entropy():
    best, _ = by_smoothing()
    def gain(loss, e):
        return difference(best, dict(loss=loss, smoothing=e), dict(loss=loss, smoothing=0.), counts='rows')
    for e in (.1, .2, .4):
        ce, nce = gain(CE, e), gain(NCE, e)
        assert nce['points'] < ce['points'] and abs(nce['points']) < nce['half']
        if e > .1: assert ce['points'] - ce['half'] > 0


def test_before_a_temperature_info_nce_is_better_calibrated_at_every_rate():
    "In every seed that the rates were chosen with."
    book = read_ledger('digits')
    mixed = book[(book.split == 'valid') & (book.arm == 'mixed')].set_index(['lr', 'seed'])
    assert mixed.index.unique(0).size == 5 and mixed.index.unique(1).size == 3
    for column in ('ece', 'nll', 'brier'):
        nce, ce = (mixed[mixed.loss == loss][column] for loss in ('soft target InfoNCE', 'soft target cross-entropy'))
        assert (nce - ce < 0).sum() == len(nce) == 15, column


def test_digits_rates_are_those_that_the_other_pages_use():
    book = read_ledger('digits')
    search, final = book[book.split == 'valid'], book[book.split == 'test']
    family = search.loss.str.contains('InfoNCE').map({True: 'InfoNCE', False: 'cross-entropy'})
    chosen = search.groupby([family, 'lr']).valid_nll_fitted.mean().unstack().idxmin(axis=1)
    assert chosen.to_dict() == {'InfoNCE': .03, 'cross-entropy': .01}
    assert sorted(set(final.seed)) == list(range(10)) and not set(final.seed) & set(search.seed)
    assert dict(zip(final.loss, final.lr))['soft target InfoNCE'] == .03 and set(final.rows) == {719}


@pytest.mark.parametrize('name', ['label_smoothing', 'calibration', 'heads'])
def test_five_seeds_behind_every_interval(name):
    df = read_ledger(name)
    key = [c for c in ledgers.KEY if c in df and c not in ('seed', 'split')]
    assert (df.groupby(key, dropna=False).seed.nunique() >= 5).all()


def test_no_head_is_worth_its_layers_here():
    best = at_best_rate(read_ledger('heads'), ['loss', 'hidden', 'logits_bn'])
    def head(hidden): return dict(loss=NCE, hidden=hidden, logits_bn=False)
    d = difference(best, head(128), head(0), counts='rows')
    assert abs(d['points']) < d['half'] and d['detectable'] < 1.72  # the paper's gain on Tiny ImageNet


def test_the_cells_of_small_batches_are_those_that_the_page_asks_for(small):
    "Its own loop, with the parameters of `make ledgers`."
    from softnce.experiments import SMALL_SOURCES, BatchSetting
    cells = [''.join(c['source']) for c in json.loads((FOLDER/'noise_samples.ipynb').read_text())['cells']]
    space = dict(SMALL_SOURCES=SMALL_SOURCES, BatchSetting=BatchSetting, REFERENCE=16, small_passes=8,
                 small_batches=[1, 2, 4, 8, 16, 32, 100], small_arms=['mixed', 'mixed_bn', 'labels'])
    exec(next(c for c in cells if 'def small_cells' in c), space)
    asked = {(s.targets, s.norm, s.source, s.batch_size, s.steps) for s in space['small_cells'](719)}
    assert asked == set(small[CELL].itertuples(index=False, name=None))
    for name in ('small_batches', 'small_passes', 'small_arms'):
        assert f"-p {name}=" in next(l for l in (REPO/'Makefile').read_text().splitlines() if l.startswith('SMALL :='))
