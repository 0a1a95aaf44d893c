"The ledgers of the experiments on text: what theory says of them, and that the pages say what they hold."
import json
from math import sqrt
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import t

REPO = Path(__file__).parents[2]


def ledger(name): return pd.read_csv(REPO/'results'/f'{name}.csv')


def outputs(page):
    "All that a page's cells have put out, as one text."
    cells = json.loads((REPO/'nbs'/f'{page}.ipynb').read_text())['cells']
    data = [o.get('data', {}).get('text/markdown', '') for c in cells for o in c.get('outputs', ())]
    return '\n'.join(''.join(d) for d in data)


def paired(rows, setting, a, b, column):
    "Mean difference by seed and half its t interval, by hand."
    one, two = (rows[rows[setting] == name].set_index('seed')[column] for name in (a, b))
    d = (one - two).dropna()
    return d.mean(), t.ppf(.975, len(d)-1)*sqrt(((d - d.mean())**2).sum()/(len(d)-1)/len(d)), len(d)


def chosen(rows, by):
    "Reported rows at the rate with the lowest criterion on the validation part, by hand."
    criterion = 'nll_fitted' if 'nll_fitted' in rows else 'nll'
    keep = []
    for key, part in rows.groupby(by):
        valid = part[part.split == 'valid']
        if len(valid) == 0: continue
        if 'seconds' in valid: valid = valid[valid.seconds == valid.seconds.max()]
        rate = valid.groupby('lr')[criterion].mean().idxmin()
        keep.append(part[(part.split == 'test') & (part.lr == rate)])
    return pd.concat(keep)


@pytest.mark.parametrize('name, kind', [('words', 'targets'), ('distillation', 'task')])
def test_closed_form_noise_is_cross_entropy(name, kind):
    rows = ledger(name)
    rows = rows[rows.split == 'test']
    key = [kind, 'seed', 'lr']
    if name == 'distillation': rows = rows[rows.given == 'full']
    scores = [c for c in ('kl', 'kl_fitted', 'nll', 'nll_fitted', 'brier', 'brier_fitted') if c in rows]
    one, two = (rows[(rows.loss == loss) & (rows.get('T', 1.) == 1.)].set_index(key)[scores]
                for loss in ('closed form', 'soft CE'))
    if kind == 'targets': one, two = one.drop('smoothed'), two.drop('smoothed')
    difference = (one - two).dropna()
    assert len(difference) >= 10 and difference.abs().max().max() < 2e-3


def test_undoing_a_smoothing_is_read_alike():
    "Of smoothed targets closed form scales where cross-entropy cuts off at zero; the true languages' mass is the same."
    rows = chosen(ledger('words'), ['targets', 'loss'])
    top = rows[rows.targets == 'smoothed'].groupby('loss').top1.mean()
    assert top['closed form'] == pytest.approx(top['soft CE'], abs=.02)


@pytest.mark.parametrize('name, by, seeds', [('words', ['targets', 'loss'], 10),
                                             ('distillation', ['task', 'student'], 5)])
def test_every_setting_has_its_seeds_and_rates(name, by, seeds):
    rows = ledger(name)
    if 'student' in rows: rows = rows[rows.student != 'teacher']
    best = chosen(rows, by)
    assert (best.groupby(by).seed.nunique() >= seeds).all()
    for key, part in rows[rows.split == 'valid'].groupby(by):
        assert part.lr.nunique() >= 4
        rate = best.set_index(by).sort_index().loc[key].lr.iloc[0]
        assert part.lr.min() < rate < part.lr.max(), (key, rate)


def test_the_missing_words_page_says_what_its_ledger_holds():
    rows = ledger('missing_word')
    best = chosen(rows, ['arm'])
    minute = best[best.seconds == 60.]
    said = outputs('experiments/missing_word')
    for column in ('nll', 'nll_rare', 'nll_frequent'):
        mean, half, n = paired(minute, 'arm', 'in-batch', 'soft CE', column)
        assert n >= 5 and f"{mean:+.2f} ± {half:.2f}" in said
    steps = minute.groupby('arm').steps.mean()
    assert f"made {steps['in-batch']:,.0f} steps" in said
    guide = outputs('guides/huge_label_spaces')
    mean, half, _ = paired(minute, 'arm', 'in-batch', 'soft CE', 'nll')
    assert f"In-batch minus full softmax, NLL: {mean:+.2f} ± {half:.2f}" in guide


def test_steps_and_scores_of_the_missing_word_are_of_one_training():
    "Looks of a training have more and more steps; the scores lie between what is possible."
    rows = ledger('missing_word').sort_values('seconds')
    for _, part in rows[rows.split == 'test'].groupby(['arm', 'seed', 'lr']): assert part.steps.is_monotonic_increasing
    assert (rows.hit10 >= rows.hit1).all() and rows.hit10.between(0, 1).all() and (rows.nll > 0).all()
    assert rows.groupby('arm').seed.nunique().min() >= 6 # five and that of the search


def test_the_distillation_page_says_what_its_ledger_holds():
    rows = ledger('distillation')
    best, said = chosen(rows[rows.student != 'teacher'], ['task', 'student']), outputs('experiments/distillation')
    for task, part in best.groupby('task'):
        for a, b, column in (('in-batch', 'soft CE', 'kl'), ('expected', 'soft CE', 'kl'),
                             ('soft CE, renormalise', 'soft CE', 'kl'), ('soft CE', 'labels', 'nll_fitted')):
            mean, half, n = paired(part, 'student', a, b, column)
            assert n >= 5 and f"{task} {mean:+.3f} ± {half:.3f}" in said


def test_the_words_page_says_what_its_ledgers_hold():
    best, said = chosen(ledger('words'), ['targets', 'loss']), outputs('experiments/words')
    for kind, loss, column in (('label', 'in-batch', 'kl'), ('label', 'in-batch', 'kl_fitted'),
                               ('distribution', 'expected', 'kl'), ('distribution', 'sampled', 'kl')):
        mean, half, n = paired(best[best.targets == kind], 'loss', loss, 'soft CE', column)
        assert n == 10 and f"{mean:+.3f} ± {half:.3f}" in said


def test_no_verdict_turned_with_other_seeds():
    first, second = ledger('words'), ledger('words_further')
    second = second[(second.rows == 10000) & (second.hidden == 0)]
    for kind in ('label', 'distribution'):
        for loss in ('in-batch', 'expected'):
            means = [paired(chosen(rows[rows.targets == kind], ['targets', 'loss']), 'loss', loss, 'soft CE', 'kl')
                     for rows in (first, second)]
            assert not set(first.seed[first.split == 'test']) & set(second.seed[second.split == 'test'])
            seen = [m for m, half, _ in means if abs(m) > half]
            assert len(seen) < 2 or seen[0]*seen[1] > 0
