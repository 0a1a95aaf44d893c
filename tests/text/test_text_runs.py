"The experiments on text at a small size, by the command."
import json
import math
import random
from collections import Counter

import pandas as pd
import pytest
from small_experiments import cli


def rows_of(tmp_path, name, **parameters):
    given = [a for k, v in parameters.items() for a in ('-p', f'{k}={json.dumps(v)}')]
    res = cli('run', name, *given, '--out', tmp_path/'runs', cwd=tmp_path)
    assert res.returncode == 0, res.stdout[-2000:] + res.stderr[-2000:]
    found, = (tmp_path/'runs'/name).glob('*/metrics.json')
    return pd.DataFrame(json.loads(found.read_text())), found.parent


def test_the_language_of_a_word(tmp_path):
    "Closed-form noise is cross-entropy; a read-out that does not exist is said to be none."
    rows, folder = rows_of(tmp_path, 'words', rows=300, held_out=400, epochs=1, batch_size=64, buckets=512, seeds=[0],
                           search_seeds=[1], lrs=[.01], targets=['label', 'votes 3', 'distribution'],
                           losses=['soft CE', 'in-batch', 'closed form', 'sampled', 'expected'])
    test = rows[rows.split == 'test'].set_index(['targets', 'loss'])
    assert len(test) == 14 and (test.kl > 0).all() and (test.kl_fitted <= test.kl + .5).all()
    for kind in ('label', 'votes 3', 'distribution'):
        assert test.kl[kind, 'closed form'] == pytest.approx(test.kl[kind, 'soft CE'], rel=1e-4)
    right = test.read_right.astype(bool)
    assert right['label', 'in-batch'] and right['votes 3', 'expected'] and right['distribution', 'closed form']
    assert not right['votes 3', 'in-batch'] and not right['distribution', 'in-batch']
    assert (folder/'kl.png').exists() and (folder/'scores.csv').exists()


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
    arms = ['soft CE', 'closed form', 'in-batch', 'queue', 'fresh, unigram', 'expected, counts']
    rows, folder = rows_of(tmp_path, 'missing_word', path=str(tmp_path/'plain.txt'), seconds=.4, looks=2, batch_size=64,
                           noise_size=32, seeds=[0], lrs=[.3], sizes=[40], arms=arms)
    end = rows[(rows.split == 'test') & (rows.seconds == .4)].set_index('arm')
    assert sorted(end.index) == sorted(arms) and (end.steps > 0).all() and (end.hit10 > .5).all()
    assert (end.nll < entropy - .1).all()
    assert set(pd.read_csv(folder/'costs.csv').classes) == {len(counts), 40}
