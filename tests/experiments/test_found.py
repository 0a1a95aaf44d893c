"What the pages of the experiments say they found: made again from the ledgers, and its main numbers by hand."
import json, math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from small_experiments import REPO

PAGES = ['gmm', 'imbalance', 'cell_types', 'tables', 'graphs', 'images']
PAPER_TOP1 = dict(ImageNet=(83.54, 83.85, 50_000), TinyImageNet=(83.86, 83.67, 10_000), CIFAR100=(90.80, 90.74, 10_000))


def cells(name): return json.loads((REPO/'nbs'/'experiments'/f'{name}.ipynb').read_text())['cells']


def above(name, heading):
    "The cells of a page above a heading."
    found = cells(name)
    stop = next(i for i, c in enumerate(found) if any(line.strip() == heading for line in c['source']))
    return found[:stop]


def committed(name):
    "The sentences in the outputs of a page, above its advice."
    outputs = [o for c in above(name, '## What follows for you') for o in c.get('outputs', ())]
    return [''.join(o['data']['text/markdown']).strip() for o in outputs if 'text/markdown' in o.get('data', {})]


@pytest.fixture
def said(tmp_path, monkeypatch):
    "A page's sentences, made by its cells above its advice."
    import matplotlib
    monkeypatch.setattr('matplotlib.pyplot.show', lambda *a: None)
    def made(name):
        shown, space = [], {}
        space['display'] = lambda *objects: shown.extend(o.data for o in objects if type(o).__name__ == 'Markdown')
        with matplotlib.rc_context({'backend': 'agg'}):
            for c in above(name, '## What follows for you'):
                source = ''.join(c['source'])
                if c['cell_type'] == 'code' and 'preflight' not in c['metadata'].get('tags', ()): exec(source, space)
        return [text.strip() for text in shown]
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.parametrize('name', PAGES)
def test_what_a_page_says_is_what_its_ledger_says(name, said):
    texts = committed(name)
    assert texts and 'nan' not in ' '.join(texts) and said(name) == texts


@pytest.mark.parametrize('name', PAGES)
def test_the_answer_stands_first(name):
    "Question, answer, advice, method, run; each figure has a text for those who do not see it."
    headings = [''.join(c['source']).splitlines()[0] for c in cells(name) if c['cell_type'] == 'markdown']
    text = '\n'.join(''.join(c['source']) for c in cells(name) if c['cell_type'] == 'markdown')
    parts = '## What was found', '## What follows for you', '## Method', '## This run'
    places = [f'{text}\n'.index(f'\n{h}\n') for h in parts]
    assert places == sorted(places) and headings[0].startswith('# ')
    for c in cells(name):
        source = ''.join(c['source'])
        drawn = any('image/png' in o.get('data', {}) for o in c.get('outputs', ()))
        if drawn: assert '#| fig-alt: "' in source, source[:80]


def test_the_ratio_of_the_errors_by_hand():
    "Pooled over 20 to 80 %: geometric mean over alignments, then over data sets."
    rows = pd.read_csv(REPO/'results'/'gmm.csv', keep_default_na=False)
    text = committed('gmm')[0]
    for schedule, column, digits in (('constant 0.001', 'kl_train', 3), ('constant 0.01', 'kl_train', 3),
                                     ('cosine 0.01', 'last_train', 4)):
        own = rows[(rows.schedule == schedule) & (rows.alignment >= 20)]
        nll, nce = (own[o].pivot(index='seed', columns='alignment', values=column).to_numpy(float) for o in (
            own.loss == 'NLL', (own.noise == 'counts') & (own.candidates == 'in-batch')))
        logs = np.log(nce/nll).mean(axis=1)
        low, high = np.exp(scipy.stats.t.interval(.95, 9, logs.mean(), scipy.stats.sem(logs)))
        assert nll.shape == nce.shape == (10, 7)
        assert f'{np.exp(logs.mean()):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]' in text, schedule


def test_the_papers_z_by_hand():
    text = committed('tables')[0]
    for nce, ce, n in PAPER_TOP1.values():
        error = math.sqrt(sum(a/100*(1 - a/100)/n for a in (nce, ce)))*100
        assert f'(z {(nce - ce)/error:+.2f})' in text and f'{nce - ce:+.2f} ± {1.96*error:.2f} points' in text


def test_no_reduced_data_beside_the_papers_columns():
    "A network at 12 % accuracy is in no table of the page."
    outputs = [o for c in above('tables', '## What follows for you') for o in c.get('outputs', ())]
    html = ' '.join(''.join(o['data']['text/html']) for o in outputs if 'text/html' in o.get('data', {}))
    assert 'Tiny ImageNet (paper)' in html and 'reduced' not in html


def test_folds_are_the_sample_by_hand():
    rows = pd.read_csv(REPO/'results'/'cell_types.csv')
    means = 100*rows.groupby(['loss', 'fold', 'seed']).top1.mean().unstack('loss')
    d = (means.soft_target_info_nce - means.soft_target_cross_entropy)
    folds = d.groupby('fold').mean()
    half, naive = (scipy.stats.t.ppf(.975, len(v) - 1)*scipy.stats.sem(v) for v in (folds, d))
    text = committed('cell_types')[0]
    assert f'{folds.mean():+.1f} ± {half:.1f} points' in text and f'± {naive:.2f} instead of ± {half:.2f}' in text
    assert half > 2*naive


def test_the_sweep_has_all_its_rows():
    rows = pd.read_csv(REPO/'results'/'gmm_sweep.csv')
    key = ['reading', 'optimizer', 'alignment', 'seed', 'rate', 'loss', 'rule']
    assert not rows.duplicated(key).any() and not rows.isna().any(axis=None)
    for _, part in rows.groupby(key[:2]):
        assert part.groupby(['rate', 'loss', 'rule', 'alignment']).seed.nunique().nunique() == 1
    letter = rows[(rows.reading == 'as described') & (rows.optimizer == 'Adam')]
    assert sorted(letter.seed.unique()) == [0, 1, 2, 3, 4] and sorted(letter.alignment.unique()) == [0, 20, 50, 80]


def test_the_sweep_is_the_study_where_they_meet():
    "The same data, start and batches: early stopping with a patience of 20 gives the same error in both ledgers."
    sweep, study = (pd.read_csv(REPO/'results'/f'{n}.csv', keep_default_na=False) for n in ('gmm_sweep', 'gmm'))
    sweep = sweep[(sweep.reading == 'as described') & (sweep.optimizer == 'Adam') & (sweep.rule == 'patience 20')]
    study = study[(study.loss == 'NLL') | (study.noise == 'counts') & (study.candidates == 'in-batch')]
    study = study[study.schedule.isin(['constant 0.001', 'constant 0.01'])]
    study = study.assign(rate=study.schedule.str.split().str[1].astype(float))
    both = sweep.merge(study, on=['alignment', 'seed', 'rate', 'loss'], suffixes=('', '_study'))
    off = np.log(both.kl_train/both.kl_train_study.astype(float)).abs()
    assert len(both) >= 5*4*2*2 and off.median() < 1e-3 and (off < .02).mean() > .9  # a rounding can move a stop
