"The experiments on text at a small size, by the command."
import json
import math
import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from small_experiments import cli

from softnce.training import load_checkpoint


def rows_of(tmp_path, name, **parameters):
    given = [a for k, v in parameters.items() for a in ('-p', f'{k}={json.dumps(v)}')]
    res = cli('run', name, *given, '--out', tmp_path/'runs', cwd=tmp_path)
    assert res.returncode == 0, res.stdout[-2000:] + res.stderr[-2000:]
    found, = (tmp_path/'runs'/name).glob('*/metrics.json')
    return pd.DataFrame(json.loads(found.read_text())), found.parent


def test_the_language_of_a_word(tmp_path):
    "Closed-form noise is cross-entropy; a read-out that does not exist is said to be none."
    rows, folder = rows_of(tmp_path, 'words', rows=300, held_out=400, epochs=1, batch_size=64, buckets=512, seeds=[0],
                           search_seeds=[1], lrs=[.01], kept=400, targets=['label', 'votes 3', 'distribution'],
                           losses=['soft CE', 'in-batch', 'closed form', 'sampled', 'expected'])
    test = rows[rows.split == 'test'].set_index(['targets', 'loss'])
    assert len(test) == 14 and (test.kl > 0).all() and (test.kl_fitted <= test.kl + .5).all()
    for kind in ('label', 'votes 3', 'distribution'):
        assert test.kl[kind, 'closed form'] == pytest.approx(test.kl[kind, 'soft CE'], rel=1e-4)
    right = test.read_right.astype(bool)
    assert right['label', 'in-batch'] and right['votes 3', 'expected'] and right['distribution', 'closed form']
    assert not right['votes 3', 'in-batch'] and not right['distribution', 'in-batch']
    assert (folder/'kl.png').exists() and (folder/'scores.csv').exists()
    for loss in ('soft CE', 'in-batch', 'expected'):
        kept = load_checkpoint(folder/'checkpoint'/f"distribution-{loss.replace(' ', '_')}-0.01-0.pt")['kept']
        p, q = kept['probs'].numpy(), kept['truth'].numpy()
        nll = -np.where(q > 0, q*np.log(np.maximum(p, 1e-30)), 0).sum(1).mean()
        assert test.nll['distribution', loss] == pytest.approx(nll, rel=1e-6)
        right = q[np.arange(len(p)), p.argmax(1)].mean()
        assert test.top1['distribution', loss] == pytest.approx(right, rel=1e-6)


def test_a_kind_of_target_that_is_none(tmp_path):
    res = cli('run', 'words', '-p', "targets=['vote 3']", '--out', tmp_path/'runs', cwd=tmp_path)
    assert res.returncode and 'targets must be among label' in res.stdout + res.stderr


def test_the_missing_word(tmp_path):
    "Every arm learns more than the words' frequencies from a text with a grammar."
    r = random.Random(0)
    nouns, verbs = 'cat dog mat rat hat cow owl fox hen'.split(), 'sat ran saw ate hit'.split()
    def text(): return f"{r.choice(('a', 'the'))} {r.choice(nouns)} {r.choice(verbs)} the {r.choice(nouns)}"
    texts = [text() for _ in range(600)]
    (tmp_path/'plain.txt').write_text('\n'.join(texts))
    counts = Counter(' '.join(texts).split())
    entropy = -sum(n/counts.total()*math.log(n/counts.total()) for n in counts.values())
    arms = ['soft CE', 'closed form', 'in-batch', 'queue', 'fresh, unigram', 'sampled softmax', 'expected, counts']
    rows, folder = rows_of(tmp_path, 'missing_word', path=str(tmp_path/'plain.txt'), seconds=.4, search_seconds=.1,
                           looks=2, batch_size=64, noise_size=32, seeds=[0], lrs=[.3], sizes=[40], arms=arms, kept=2000)
    end = rows[(rows.split == 'test') & (rows.seconds == .4)].set_index('arm')
    assert sorted(end.index) == sorted(arms) and (end.steps > 0).all() and (end.hit10 > .5).all()
    assert (end.nll < entropy - .1).all()
    assert set(pd.read_csv(folder/'costs.csv').classes) == {len(counts), 40}
    for arm in ('soft CE', 'in-batch', 'sampled softmax'): # the scores again, from the logits that are kept
        kept = load_checkpoint(folder/'checkpoint'/f"{arm.replace(' ', '_')}-0.3-0-test.pt")['logits']
        logits, y = kept['logits'].double().numpy(), kept['words'].numpy()
        own = logits[np.arange(len(y)), y]
        assert end.nll[arm] == pytest.approx((np.log(np.exp(logits).sum(1)) - own).mean(), rel=1e-4)
        order = (-logits).argsort(1)
        for n in (1, 10):
            assert end[f'hit{n}'][arm] == pytest.approx((order[:, :n] == y[:, None]).any(1).mean(), abs=1e-9)


def test_a_teacher_of_the_missing_word(tmp_path):
    "Students of a teacher's top see its targets; targets are its most probable words."
    r = random.Random(1)
    texts = [f"the {r.choice('abcde')} {r.choice('xyz')} of the {r.choice('abcde')}" for _ in range(400)]
    (tmp_path/'plain.txt').write_text('\n'.join(texts))
    arms = ['in-batch', 'soft CE, spread', 'expected, teacher', 'expected, half teacher']
    rows, folder = rows_of(tmp_path, 'missing_word', path=str(tmp_path/'plain.txt'), seconds=.4, search_seconds=.1,
                           looks=1, batch_size=64, noise_size=32, seeds=[0], lrs=[.3], sizes=[], arms=arms, taught=500,
                           teacher_seconds=.6, teacher_top=4)
    end = rows[rows.split == 'test'].set_index('arm')
    assert sorted(end.index) == sorted(arms) and (end.taught == 500).all() and (end.nll < 2.).all()
    told = load_checkpoint(folder/'checkpoint'/'teacher.pt')
    mass = told['log_probs'].exp().sum(1)
    assert told['ids'].shape == (500, 4) and (mass <= 1 + 1e-5).all() and mass.mean() > .8


def test_a_teacher_that_is_not_there(tmp_path):
    (tmp_path/'plain.txt').write_text('a b c\n'*50)
    res = cli('run', 'missing_word', '-p', f"path={tmp_path/'plain.txt'}", '-p', "arms=['in-batch, teacher']",
              '--out', tmp_path/'runs', cwd=tmp_path)
    assert res.returncode and 'taught must be above 0 for a teacher' in res.stdout + res.stderr


def test_distillation(tmp_path):
    "Closed-form noise is cross-entropy; T = 1 is cross-entropy; a teacher is better than a student of few labels."
    students = ['labels', 'soft CE', 'closed form', 'in-batch', 'expected', 'KL, T=4, labels .1', 'KL, bucket',
                'soft CE, uniform', 'expected, renormalise']
    rows, folder = rows_of(tmp_path, 'distillation', seeds=[0], search_seeds=[1], lrs=[.03], students=students)
    test = rows[rows.split == 'test'].set_index('student')
    assert sorted(test.index) == sorted(students + ['teacher']) and (test.kl >= 0).all()
    scores = ['kl', 'kl_fitted', 'nll', 'nll_fitted', 'brier', 'brier_fitted', 'top1']
    assert (test.loc['closed form', scores] - test.loc['soft CE', scores]).abs().max() < 1e-3
    assert test.kl['teacher'] < 1e-9 and test.nll_fitted['teacher'] < test.nll_fitted['labels']
    assert test.kl['soft CE'] < test.kl['labels']
    assert (folder/'kl.png').exists() and (folder/'scores.csv').exists()


def test_a_student_that_is_none(tmp_path):
    res = cli('run', 'distillation', '-p', "students=['hard']", '--out', tmp_path/'runs', cwd=tmp_path)
    assert res.returncode and 'students must be among labels' in res.stdout + res.stderr
