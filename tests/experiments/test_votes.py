"Images that people labelled: ten counts an image, through the tables of labels into an image run and its metrics."
import csv, json, math

import numpy as np
import pytest
import torch

pytest.importorskip('sklearn'); pytest.importorskip('timm'); pytest.importorskip('papermill')
from PIL import Image
from sklearn.datasets import load_digits

from softnce.calibration import (brier_score, classwise_calibration_error, entropy_correlation, expected_accuracy,
                                 expected_calibration_error, fit_temperature, kl_divergence, negative_log_likelihood,
                                 total_variation, vote_floor)
from softnce.runs import run_experiment
from softnce.runs.model_folder import find_model
from softnce.training import SCORES
from softnce.training.checkpoints import load_checkpoint
from softnce.vision.export import export_model
from softnce.vision.images import load
from softnce.vision.predictions import predict_files
from softnce.vision.presets import settings
from softnce.vision.recipes import target_kind

V, K = 10, 3
ONE_SHOT = dict(zip(SCORES, (negative_log_likelihood, kl_divergence, brier_score, total_variation, expected_accuracy,
                             expected_calibration_error, classwise_calibration_error, entropy_correlation)))
SMALL = dict(dataset='soft_labels', recipe='small', model='small_cnn', image_size=8, hidden=0, width=4, batch_size=32,
             epochs=2, warmup_epochs=0, lr=.03, smoothing=0., mixup=0., cutmix=0., auto_augment='none',
             precision='fp32', channels_last=False, device='cpu')


def voted(folder, rows=240, votes=lambda g, n: np.full(n, V)):
    "Digits 0, 1 and 2 as files, and a table of so many votes an image, of voters who are right two times in three."
    raw, g = load_digits(n_class=K), np.random.default_rng(0)
    table = ['file,zero,one,two,split']
    for i, n in enumerate(votes(g, rows)):
        Image.fromarray((raw.images[i]*255/16).astype('uint8')).convert('RGB').save(folder/f'{i:03}.png')
        counts = g.multinomial(n, np.full(K, 1/6) + np.eye(K)[raw.target[i]]/2)
        table.append(','.join(map(str, [f'{i:03}.png', *counts, ('train', 'valid', 'test')[max(i//60 - 1, 0)]])))
    (folder/'votes.csv').write_text('\n'.join(table))
    return folder


@pytest.fixture(scope='module')
def people(tmp_path_factory): return voted(tmp_path_factory.mktemp('people'))


def test_the_number_of_votes_is_read_with_them(people, tmp_path):
    data = load('soft_labels', people, people/'votes.csv')
    assert all((part.part_votes == V).all() and part.part_targets.shape[1] == K for part in data.parts.values())
    torch.testing.assert_close((data.test.part_targets*V).round(), data.test.part_targets*V, rtol=0, atol=1e-5)
    other = voted(tmp_path, 60, lambda g, n: 1 + np.arange(n) % 5)
    data = load('soft_labels', other, other/'votes.csv', valid=.2)
    assert sorted(torch.cat([p.part_votes for p in data.parts.values()]).tolist()) == sorted(1 + np.arange(60) % 5)


@pytest.mark.parametrize('form, votes', [
    ('file,a,b\n{0},3,1\n{1},0,2\n{2},1,0\n{3},1,1\n', [4, 2, 1, 2]),
    ('file,a,b\n{0},.3,.7\n{1},0,1\n{2},1,0\n{3},1,0\n', None),                       # probabilities
    ('file,a,b\n{0},30,70\n{1},0,100\n{2},100,0\n{3},1,99\n', None),                  # percent
    ('file,label\n{0},a\n{1},b\n{2},a\n{3},a\n', None),                               # class names: no shares
    ('file,rater,label\n{0},x,a\n{0},y,b\n{1},x,a\n{2},x,b\n{2},y,b\n{3},x,a\n', [2, 1, 2, 1]),
    ('file,rater,a,b\n{0},x,3,1\n{0},y,2,2\n{1},x,4,0\n{2},x,4,0\n{3},x,2,2\n', [8, 4, 4, 4]),
    ('file,rater,a,b\n{0},x,3,1\n{0},y,1,0\n{1},x,4,0\n{2},x,4,0\n{3},x,2,2\n', None), # a mean of unequal shares
])
def test_when_the_number_of_votes_is_known(form, votes, tmp_path):
    from softnce.vision.labels import read_table
    images = [f'{i}.png' for i in range(4)]
    (tmp_path/'t.csv').write_text(form.format(*images))
    found = read_table(tmp_path/'t.csv', images).votes
    assert found is None if votes is None else found.tolist() == votes


@pytest.mark.parametrize('loss, change, kind', [
    ('expected_info_nce', {}, 'votes'), ('soft_target_info_nce', dict(mixup=.8), 'mixed'), ('nll', {}, 'labels')])
def test_the_kind_of_a_runs_targets(loss, change, kind, people):
    data = load('soft_labels', people, people/'votes.csv')
    s = settings('small', 'soft_labels', loss, dict(mixup=0., cutmix=0.) | change)
    assert target_kind(data, s, loss) == kind
    assert target_kind(load('digits'), s, loss) == ('mixed' if kind == 'mixed' else 'labels')


@pytest.mark.slow
@pytest.mark.parametrize('loss, read', [('expected_info_nce', 'right'), ('soft_target_info_nce', 'as labels')])
def test_a_run_on_votes(loss, read, people, tmp_path):
    "Each column of metrics.json is the one-shot score of the run's own logits against the shares of votes."
    asked = SMALL | dict(root=str(people), labels=str(people/'votes.csv'), loss=loss)
    run = run_experiment('images', asked, tmp_path)
    rows, done = {r['split']: r for r in run.metrics()}, load_checkpoint(run.checkpoint_dir/'result.pt')
    temperature = fit_temperature(*done['valid'])
    for split, row in rows.items():
        logits, votes = done[split][0].double(), done[split][1]
        assert votes.shape == (60, K) and row['temperature'] == pytest.approx(temperature)
        assert row['targets'] == 'votes' and row['read_out'] == read
        for ending, probs in (('naive', logits.softmax(1)), ('fitted', (logits/temperature).softmax(1))):
            for name, score in ONE_SHOT.items():
                assert row[f'{name}_{ending}'] == pytest.approx(score(probs, votes)), name
        floor = vote_floor(probs, V)
        assert row['kl_floor'] == pytest.approx(floor.kl_divergence)
        assert row['soft_brier_floor'] == pytest.approx(floor.brier_score) and row['soft_ece_floor'] > 0
        assert math.isfinite(row['kl_correct'])
    figures, tables = (json.loads((run.dir/'report.json').read_text())[k] for k in ('figures', 'tables'))
    assert 'votes' in figures and 'distributions' in tables
    history = run.history()
    assert {'kl', 'soft_ece', 'expected_accuracy'} <= set(history) and len(history) == 2
    cells = json.loads((run.dir/'notebook.ipynb').read_text())['cells']
    words = ''.join(str(o) for c in cells for o in c.get('outputs', []))
    assert words.count('is read as for labels here') == (read == 'as labels') and 'UserWarning: probs' not in words
    assert 'surer than the voters' in (run.dir/'report.html').read_text()
    used(run, people, tmp_path)


def used(run, people, tmp_path):
    "The run's model and its export predict what predictions.csv says, beside the shares of the votes."
    held = list(csv.DictReader(open(run.dir/'predictions.csv')))
    given = {r['file']: r for r in csv.DictReader(open(people/'votes.csv'))}
    to = export_model(find_model(run.dir), tmp_path/'to') # ONNX is compared in it
    for model in (run.dir, to):
        assert predict_files(find_model(model), [people/r['file'] for r in held], tmp_path/'p.csv') == []
        for now, then in zip(csv.DictReader(open(tmp_path/'p.csv')), held, strict=True):
            for c in ('zero', 'one', 'two'):
                assert float(now[f'p_{c}']) == pytest.approx(float(then[f'p_{c}']), abs=1e-5)
                assert float(then[f'q_{c}']) == pytest.approx(float(given[then['file']][c])/V, abs=1e-6)


@pytest.mark.slow
def test_a_report_on_labels_says_nothing_of_voters(tmp_path):
    run = run_experiment('images', SMALL | dict(dataset='digits', limit=20), tmp_path)
    text = (run.dir/'report.html').read_text()
    assert 'Confusions' in text and 'voters' not in text
