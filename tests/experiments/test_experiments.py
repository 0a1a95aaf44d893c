"Sweeps, tables and their ledgers: what they ask for, what is committed, and what is read out of it."
import json, re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from softnce.losses import SoftTargetInfoNCE
from softnce.runs import (as_text, at_best_rate, difference, find_experiment, half_width, holm, ledgers, needs,
                          read_ledger, resolve, run_experiment, run_id, write_ledger)
from softnce.runs.ledgers import ledger_path
from softnce.targets import one_hot, smooth

SWEEPS = ['noise_samples', 'label_smoothing', 'heads', 'calibration', 'tables']
TINY = dict(dataset='tiny_imagenet', root='data')
LOSSES = ['nll', 'soft_target_cross_entropy', 'info_nce', 'soft_distribution_info_nce', 'soft_target_info_nce']
SOURCES = ['in_batch', 'queue', 'fresh', 'closed_form', 'hard_labels']
AT_SIZE = dict(
    noise_samples=dict(sources=SOURCES, batch_sizes=[64, 256], epochs=[100, 100], same_steps=[25, 100],
                       sizes=[64, 4096], noise_size=4096, lrs=[[6e-5, 7.5e-5], [2.5e-4, 3e-4]], seeds=[0, 1, 2],
                       **TINY),
    label_smoothing=dict(epochs=100, epsilons=[0., .1, .2], seeds=[0, 1, 2], **TINY),
    heads=dict(dataset='cifar100', root='data', epochs=100, hiddens=[0, 4096]),
    calibration=dict(epochs=100, seeds=[0, 1], **TINY),
    tables=dict(dataset='imagenet', root='data', epochs=100, smoothing=.1, mixup=.8, cutmix=1.))
# seeds x rates x (two batch sizes, one of them at equal steps too, of six sources; two sources with one more size)
COUNT = dict(noise_samples=3*2*(3*6 + 2), label_smoothing=3*2*3, heads=8, calibration=8, tables=7)


def ids(name, parameters):
    "Ids of the runs that a sweep asks for; raises where the experiment does not have a parameter."
    asked = needs(name, parameters)
    assert list(asked) == ['images']
    return {run_id('images', resolve(find_experiment('images'), s)) for s in asked['images']}


@pytest.mark.parametrize('name', SWEEPS)
def test_a_sweep_asks_for_runs_that_exist(name):
    assert 1 < len(ids(name, {})) <= 12  # a default page is a few runs
    assert len(ids(name, AT_SIZE[name])) == COUNT[name]


@pytest.mark.parametrize('name', SWEEPS)
def test_a_sweep_shows_what_it_made(name):
    code = '\n'.join(find_experiment(name).sources('code'))
    for call in ('run.save_figure(', 'run.save_table(', 'run.save_metrics(', 'write_ledger(', 'at_best_rate('):
        assert call in code, call
    assert 'ledger' in find_experiment(name).parameters and find_experiment(name).parameters['ledger'].default is False


def cells(name): return find_experiment(name).sources('code')


def test_the_columns_of_graphs_are_one_training_a_run():
    asked = needs('cell_types', dict(folds=[0, 1, 2, 3, 4], seeds=[0, 1, 2], depth=32))
    assert list(asked) == ['graphs']
    assert all(len(s[k]) == 1 for s in asked['graphs'] for k in ('losses', 'folds', 'seeds'))
    assert len({run_id('graphs', resolve(find_experiment('graphs'), s)) for s in asked['graphs']}) == 5*5*3


def test_columns_of_graphs_by_hand():
    "A fold is the mean over its specimens, a loss over folds and seeds; losses are compared within a fold and seed."
    losses = nll, ce = 'nll', 'soft_target_cross_entropy'
    shown = {'top1': 'top-1', 'class_average': 'class average', 'class_average_recall': 'recall',
             'class_average_naive': 'naive class average'}
    common, rows = dict(seed=0, epoch=1, synthetic=True, stage='1'), []
    for loss, fold, values in ((nll, 0, [.2, .4]), (nll, 1, [.9]), (ce, 0, [.2, .2]), (ce, 1, [.5])):
        rows += [dict(loss=loss, fold=fold, stack=str(i), **common, **dict.fromkeys(shown, v))
                 for i, v in enumerate(values)]
    rows = pd.DataFrame(rows)
    space = dict(pd=pd, losses=losses, NAMES={l: l for l in losses}, half_width=half_width, difference=difference,
                 holm=holm)
    for name in ('def fold_means', 'def differences_of'):
        exec(next(c for c in cells('cell_types') if name in c), space)
    assert space['columns_of'](rows).loc['nll', 'top-1'].startswith('60.0 ± ')  # (.3 + .9)/2, not 1.5/3
    assert space['differences_of'](rows).loc['nll', 'top-1'].startswith('+25.0 ± ')  # (.1 + .4)/2
    again = pd.concat([rows, rows.assign(seed=1), rows.assign(seed=2)])  # the folds are the sample, not the seeds
    for made in ('columns_of', 'differences_of'): assert space[made](again).equals(space[made](rows))
    half = scipy.stats.t.ppf(.975, 1)*scipy.stats.sem([10., 40.])
    assert space['differences_of'](again).loc['nll', 'top-1'] == f'+25.0 ± {half:.1f}'


def test_the_ledger_of_graphs():
    df = read_ledger('cell_types')
    assert not df.duplicated(['loss', 'fold', 'seed', 'stage', 'stack']).any() and df.synthetic.all()
    assert len(set(zip(df.loss, df.fold, df.seed))) == 5*3*3 and df.groupby(['fold', 'seed']).loss.nunique().eq(5).all()
    for column in ('top1', 'class_average', 'class_average_recall', 'class_average_naive'):
        assert df[column].between(0, 1).all()


def test_the_papers_numbers():
    "The tables against the differences that the paper's section 4.1 states in words."
    space = {'pd': pd, 'losses': LOSSES, 'NAMES': {k: k for k in LOSSES}}
    exec(next(c for c in cells('tables') if '\nlosses = ' in c), space)
    t1, t2 = space['table1'], space['table2']
    def gap(a, b, column): return round(t1.loc[a, column] - t1.loc[b, column], 2)
    nce, ce = 'soft_target_info_nce', 'soft_target_cross_entropy'
    assert [gap(ce, nce, 'CellTypeGraph'), gap(nce, ce, 'Tiny ImageNet'), gap(nce, ce, 'CIFAR-100')] == [.55, .19, .06]
    assert gap('nll', nce, 'CIFAR-100') == .04
    assert [gap(nce, 'nll', c) for c in ('CellTypeGraph', 'ImageNet', 'Tiny ImageNet')] == [.2, 1.19, 1.23]
    assert gap(ce, nce, 'ImageNet') == .31  # the text says 0.29
    assert (t1.loc['soft_distribution_info_nce'] < t1.loc[nce]).all()  # "consistently better"
    assert (t2.iloc[:, :3].to_numpy() > t1.iloc[:, :3].to_numpy()).all() and (t2.CellTypeGraph < t1.CellTypeGraph).all()


# ---- the ledgers

LEDGERS = sorted(p for n in SWEEPS for p in ledger_path(n).parent.glob(f'{n}*.csv')
                 if not re.search('bins|matched|small|shrinkage', p.name))


def test_every_sweep_has_a_ledger():
    for name in (*SWEEPS, 'noise_samples_tiny_imagenet'): assert read_ledger(name) is not None, name


@pytest.mark.parametrize('path', LEDGERS, ids=lambda p: p.stem)
def test_ledgers(path):
    "Rows are unique, validation and reported part come in pairs, values are in range, no path of a machine is there."
    df = pd.read_csv(path)
    key = [c for c in ledgers.KEY if c in df]
    assert not df.duplicated(key).any() and list(df.columns[:len(key)]) == key
    parts = df.groupby([c for c in key if c != 'split'], dropna=False).split.agg(sorted)
    assert parts.map(lambda found: found == ['test', 'valid']).all()
    rates = ['top1', 'ece_naive', 'ece_correct', 'ece_fitted', 'floor']
    assert ((df[rates] >= 0) & (df[rates] <= 1)).all(axis=None)
    assert (df.temperature > 0).all() and (df.top5 >= df.top1).all()
    steps = 1/df.rows
    assert (abs(df.top1/steps - (df.top1/steps).round()) < 1e-2).all()  # an accuracy is a count over the rows
    assert not re.search(r'/(work|tmp|root|home|Users)/', path.read_text())
    assert len(set(df.dataset)) == 1 and set(df[df.split == 'test'].rows).isdisjoint({0})


@pytest.mark.parametrize('path', LEDGERS, ids=lambda p: p.stem)
def test_seeds_of_a_ledger(path):
    "Three seeds or more behind everything that is reported at the batch sizes in question."
    df = pd.read_csv(path)
    assert len(set(df.seed)) >= 3


def test_closed_form_with_hard_labels_is_cross_entropy():
    "In the ledger, not only in theory: the same NLL to a few per cent (the classes are not exactly balanced)."
    df = read_ledger('noise_samples')
    hard = (df.noise == 'closed_form') & (df.noise_lam == 1) & (df.noise_epsilon == 0)
    on = ['batch_size', 'epochs', 'lr', 'seed', 'split']
    both = df[hard].merge(df[df.loss == 'soft_target_cross_entropy'], on=on, suffixes=('', '_ce'))
    assert len(both) >= 12
    assert abs(both.nll_fitted - both.nll_fitted_ce).median() < 1e-2 and abs(both.top1 - both.top1_ce).median() < .01


@pytest.mark.parametrize('name', ['noise_samples', 'noise_samples_tiny_imagenet'])
def test_the_answer_on_small_batches_is_the_ledgers(name):
    """What the page says in words of batch size 64.

    No gap to be told from zero in-batch, none of the paper's size, and no source better than the batch by more than
    its interval.
    """
    df = read_ledger(name)
    df = df[(df.batch_size == 64) & ~df.noise_size.isin([16, 128])]
    hard = (df.noise == 'closed_form') & (df.noise_lam == 1) & (df.noise_epsilon == 0)
    df['source'] = df.noise.mask(hard, 'hard_labels').mask(df.loss == 'soft_target_cross_entropy', 'ce')
    best = at_best_rate(df, ['source'])
    gap = difference(best, dict(source='in_batch'), dict(source='ce'))
    assert abs(gap['points']) < gap['half'] and gap['points'] - gap['half'] > -4.21
    for source in ('queue', 'fresh', 'closed_form'):
        d = difference(best, dict(source=source), dict(source='in_batch'))
        assert d['seeds'] == 3 and d['points'] < d['half']


def test_bins_are_the_runs_of_the_ledger():
    df, bins = read_ledger('calibration'), read_ledger('calibration_bins')
    arm = pd.Series(['mixed' if m > 0 else 'smoothed' for m in df.mixup], df.index)
    for (loss, a, kind), b in bins.groupby(['loss', 'arm', 'read_out']):
        part = df[(df.loss == loss) & (arm == a) & (df.split == 'test')]
        n = b['count'].sum()
        assert n % part.rows.iloc[0] == 0 and n <= part.rows.sum() and len(b) == 15
        seeds = n//part.rows.iloc[0]
        if seeds == len(part) and kind == 'naive':
            pooled = (abs(b.accuracy - b.confidence).fillna(0)*b['count']).sum()/n
            assert pooled <= part.ece_naive.mean() + 1e-6  # pooling bins over seeds can only cancel


def test_matched_runs_are_partners_of_the_ledger():
    "Every smoothed soft target InfoNCE run has its temperature-matched one, which starts on the same path."
    df, m = read_ledger('label_smoothing'), read_ledger('label_smoothing_matched')
    own = df[(df.loss == 'soft_target_info_nce') & (df.split == 'test') & (df.smoothing > 0)]
    assert sorted(zip(own.smoothing, own.seed, own.lr)) == sorted(zip(m.epsilon, m.seed, m.lr))
    assert m.apart_first.median() < 1e-5 and m.apart_first.max() < 1e-2  # nats; a loss of about three
    assert m.apart_last.max() > m.apart_first.max()  # rounding has grown


# ---- reading them

def sweep(rates, seeds, value, **more):
    "Rows of a made-up sweep; `value(rate, seed, split)` is the criterion."
    return pd.DataFrame([dict(lr=r, seed=s, split=split, nll_fitted=value(r, s, split), top1=r, **more)
                         for r in rates for s in seeds for split in ('valid', 'test')])


def test_a_rate_is_chosen_on_the_validation_part_alone():
    def middle(rate, seed, split): return abs(rate - .2) + .01*seed if split == 'valid' else -rate
    def lowest(rate, seed, split): return rate if split == 'valid' else -rate
    df = pd.concat([sweep([.1, .2, .4], range(3), middle, kind='a'), sweep([.1, .2], range(3), lowest, kind='b')],
                   ignore_index=True)
    best = at_best_rate(df, ['kind'])
    assert best.groupby('kind').lr.agg(set).to_dict() == {'a': {.2}, 'b': {.1}}
    assert set(best.split) == {'test'} and len(best) == 6
    noise = np.random.default_rng(0).random(len(df))
    shuffled = at_best_rate(df.assign(nll_fitted=df.nll_fitted.where(df.split == 'valid', noise)), ['kind'])
    assert (shuffled.lr == best.lr).all()


def test_rates_are_compared_on_seeds_that_all_have():
    "Seed 1 was run at one rate only, and does not count in the choice; it is reported."
    df = pd.concat([sweep([.1, .2], [0], lambda r, s, split: r), sweep([.1], [1], lambda *a: 9.)]).assign(kind='a')
    best = at_best_rate(df, ['kind'])
    assert set(best.lr) == {.1} and sorted(best.seed) == [0, 1]
    apart = pd.concat([sweep([.1], [0], lambda *a: 0.), sweep([.2], [1], lambda *a: 0.)]).assign(kind='a')
    with pytest.raises(ValueError, match=r"the rates of \{'kind': 'a'\} share no seed: \[0.1, 0.2\]"):
        at_best_rate(apart, ['kind'])


@pytest.mark.parametrize('n', [2, 3, 5, 30])
def test_intervals(n):
    v = np.random.default_rng(n).normal(size=n)
    low, high = scipy.stats.t.interval(.95, n-1, v.mean(), scipy.stats.sem(v))
    assert half_width(v) == pytest.approx((high-low)/2, rel=1e-12) and np.isnan(half_width(v[:1]))
    assert as_text([.5, .5]) == '50.0 ± 0.0' and as_text([.123], digits=2) == '12.30'


def test_difference_is_paired():
    rng = np.random.default_rng(0)
    base, a, b = rng.normal(size=6), dict(kind='a'), dict(kind='b')
    df = pd.DataFrame([dict(kind=k, seed=s, top1=base[s] + shift + e) for k, shift in (('a', .5), ('b', 0.))
                       for s, e in enumerate(.001*rng.normal(size=6))])
    d = difference(df, a, b, scale=1.)
    of_a, of_b = df[df.kind == 'a'].top1, df[df.kind == 'b'].top1
    test = scipy.stats.ttest_rel(of_a, of_b).confidence_interval()
    assert d['points'] == pytest.approx((of_a.to_numpy() - of_b.to_numpy()).mean())
    assert d['half'] == pytest.approx((test.high-test.low)/2) and d['seeds'] == 6
    assert difference(df[(df.kind == 'a') | (df.seed < 2)], a, b)['seeds'] == 2
    with pytest.raises(ValueError, match='share no seed'): difference(df, a, dict(kind='c'))
    with pytest.raises(ValueError, match='several rows for a seed'): difference(pd.concat([df, df]), a, b)


def test_a_ledger_grows_and_replaces(tmp_path, monkeypatch):
    monkeypatch.setattr(ledgers, 'ledger_path', lambda name: tmp_path/'results'/f'{name}.csv')
    rows = sweep([.1, .2], [1, 0], lambda r, s, split: r/3, loss='nll', root='/home/me/data', id='0123')
    path = write_ledger(rows, 'x')
    first = pd.read_csv(path)
    assert len(first) == 8 and 'root' not in first and 'id' not in first
    assert first.equals(first.sort_values(['loss', 'lr', 'seed', 'split'], ignore_index=True))
    write_ledger(sweep([.2, .3], [0], lambda r, s, split: 7., loss='nll'), 'x')
    both = pd.read_csv(path)
    assert len(both) == 10 and (both[(both.lr == .2) & (both.seed == 0)].nll_fitted == 7).all()
    assert (both[both.seed == 1].nll_fitted < 1).all()
    before = path.read_bytes()
    write_ledger(sweep([.2, .3], [0], lambda r, s, split: 7., loss='nll'), 'x')
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ['x.csv']


def test_a_ledger_with_a_key_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(ledgers, 'ledger_path', lambda name: tmp_path/f'{name}.csv')
    bins = pd.DataFrame([dict(loss=l, bin=b, count=b+1) for l in 'ab' for b in range(3)])
    write_ledger(bins, 'bins', list(bins), ['loss', 'bin'])
    path = write_ledger(bins.iloc[:1].assign(count=9), 'bins', list(bins), ['loss', 'bin'])
    assert pd.read_csv(path)['count'].tolist() == [9, 2, 3, 1, 2, 3]


def test_no_ledger_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(ledgers, 'checkout', lambda: None)
    assert ledger_path('x') is None and read_ledger('x') is None
    with pytest.raises(ValueError, match='results/ of a checkout'): write_ledger(sweep([.1], [0], lambda *a: 0.), 'x')


# ---- what Figure 3b draws as a line

def test_smoothing_is_a_temperature_all_the_way():
    """Twenty steps on smoothed targets, and on hard ones at tau/(1-eps) and eta^(1-eps): the same weights.

    With the plain eta they part where classes are unbalanced.
    """
    torch.set_default_dtype(torch.float64)
    eps, counts = .3, torch.tensor([8., 4., 2., 1.])
    x, y, eta = torch.randn(64, 5), torch.multinomial(counts, 64, replacement=True), counts/counts.sum()
    power = eta**(1-eps)/(eta**(1-eps)).sum()
    def train(loss, targets, scale=1.):
        w = torch.zeros(5, 4, requires_grad=True)
        for _ in range(20):
            g, = torch.autograd.grad(loss(x@w, targets), w)
            w = (w - .5*g).detach().requires_grad_()
        return w
    hard, even, exact = one_hot(y, 4).double(), torch.full((4,), .25), dict(rtol=0, atol=1e-12)
    def smoothed(noise): return train(SoftTargetInfoNCE(noise_probs=noise), smooth(hard, eps))
    def at_temperature(noise): return train(SoftTargetInfoNCE(noise_probs=noise, temperature=1/(1-eps)), hard)
    torch.testing.assert_close(at_temperature(power), smoothed(eta), **exact)
    assert (at_temperature(eta) - smoothed(eta)).abs().max() > 1e-3
    torch.testing.assert_close(at_temperature(even), smoothed(even), **exact)


# ---- from end to end

@pytest.mark.slow
@pytest.mark.parametrize('name, parameters', [('heads', dict(hiddens=[0], norms=[False], epochs=2)),
                                              ('calibration', dict(arms=['smoothed'], epochs=2))])
def test_a_sweep_runs(name, parameters, tmp_path):
    "Its runs, its own notebook, and what it leaves."
    run = run_experiment(name, parameters, tmp_path)
    assert run.finished and list(run.dir.glob('*.png')) and list(run.dir.glob('*.csv'))
    made = sorted((tmp_path/'images').iterdir())
    assert len(made) == len(needs(name, parameters)['images']) and all((m/'metrics.json').exists() for m in made)
    assert {r['split'] for r in run.metrics()} == {'test'}
    assert {r['loss'] for r in run.metrics()} == {'soft_target_cross_entropy', 'soft_target_info_nce'}
    assert json.loads((run.dir/'report.json').read_text())['figures']
