"softnce.vision.use, predictions and judged: a kept model gives what the training gave, and says what is wrong."
import csv, json, os, subprocess, sys

import numpy as np
import pytest
import torch
from kept import finished, keep
from PIL import Image
from pictures import cifar, jpeg, put

from softnce.runs import UsageError
from softnce.runs.model_folder import find_model
from softnce.vision.images import load
from softnce.vision.judged import (confusion, draw_mistakes, per_class, readable_rows, save_predictions, soft_scores,
                                   wilson, worst_mistakes)
from softnce.vision.predictions import find_images, predict_files
from softnce.vision.presets import settings
from softnce.vision.recipes import LOSSES, loaders, train_images
from softnce.vision.use import load_run, save_model


# ---- what is kept

@pytest.mark.parametrize('kind', ['folder', 'digits', 'cifar100'])
def test_a_loaded_model_gives_the_logits_of_the_training(kind, tmp_path):
    "From files, from an array of bytes and from tensors: the same transform, the same weights."
    asked = dict(model='small_cnn', image_size=8 if kind == 'digits' else 32, width=4, hidden=8, batch_size=8, epochs=2,
                 warmup_epochs=0, precision='fp32', ema=.5)
    loss = dict(name='soft_target_info_nce', noise='queue', noise_size=16)
    root = dict(folder=lambda: put_pictures(tmp_path/'d'), cifar100=lambda: cifar(tmp_path/'d'), digits=lambda: None)
    where = dict(name=kind, root=root[kind](), valid=.3, **(dict(limit=8) if kind == 'digits' else {}))
    s = settings('small', kind, loss['name'], asked) | dict(lr=1e-3)
    out = train_images(where, s, loss, tmp_path/'c', device='cpu', keep_best=True)
    data = load(**where)
    save_model(tmp_path/'model', tmp_path/'c', data, s, loss, out['valid'])
    model, part = load_run(tmp_path/'model'), data.test
    if kind == 'digits': x = part.images[part.rows]
    else: x = torch.stack([model.transform(part.image(i)) for i in range(len(part))])
    torch.testing.assert_close(model.logits(x), out['test'][0], rtol=0, atol=1e-5)
    assert model.classes == data.classes and not model.model.training
    if kind == 'folder':
        paths = [part.images.root/part.name(i) for i in range(len(part))]
        want = model.read_out(out['test'][0])
        torch.testing.assert_close(model.predict(paths, batch_size=4), want, rtol=0, atol=1e-5)


def put_pictures(root, each=14):
    for k, c in enumerate('abc'):
        for i in range(each): put(root/c/f'{i}.jpg', jpeg(100*k+i))
    return root


def test_last_and_best_weights(tmp_path):
    data, s, nets, _ = keep(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    for name in ('last', 'best'): torch.testing.assert_close(load_run(tmp_path/'model', name).logits(x), nets[name](x))
    assert torch.equal(load_run(tmp_path/'model').logits(x), load_run(tmp_path/'model', 'last').logits(x))
    keep(tmp_path, used='best')  # written again, in the place of what is there
    torch.testing.assert_close(load_run(tmp_path/'model').logits(x), nets['best'](x))
    assert find_model(tmp_path/'model').about['weights'] == dict(
        used='best', best=dict(file='model.safetensors', epoch=2), last=dict(file='last.safetensors', epoch=3))
    assert os.stat(tmp_path/'model'/'model.safetensors').st_mode & 0o777 == 0o666 & ~umask()
    with pytest.raises(UsageError, match="weights must be last or best, got 'first'"):
        load_run(tmp_path/'model', 'first')


def umask():
    old = os.umask(0); os.umask(old)
    return old


def test_without_the_best_weights_the_last_are_kept(tmp_path):
    keep(tmp_path)
    (tmp_path/'checkpoint'/'best.pt').unlink()
    from softnce.vision.use import _weights
    with pytest.warns(UserWarning, match='does not hold epoch 2'):
        assert list(_weights(tmp_path/'checkpoint', 'last')) == ['last']
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='must hold epoch 2'):
        _weights(tmp_path/'checkpoint', 'best')


# ---- the read-out

def softmax(x): return np.exp(x)/np.exp(x).sum(1, keepdims=True)


def nll_of(p, labels): return -np.log(p[np.arange(len(p)), labels]).mean()


@pytest.mark.parametrize('name', LOSSES)
def test_read_out_by_hand(name, tmp_path):
    """The smoothing is undone as the loss does, and the temperature is the best of a fine grid. In-batch the noise
    distribution stands in the read-out of soft target InfoNCE alone."""
    put_pictures(tmp_path/'images', 20)
    for i in range(8): (tmp_path/'images'/'a'/f'{i}.jpg').unlink()  # classes of unequal size
    data = load('folder', tmp_path/'images', valid=.3)
    _, s, _, (logits, labels) = keep(tmp_path, dict(name=name), data=data, smoothing=.2)
    model, l = load_run(tmp_path/'model'), logits.double().numpy()
    share = np.bincount(data.train.labels, minlength=3)/len(data.train)
    nce, soft = 'info_nce' in name, name == 'soft_target_info_nce'
    if soft: plain = .8*(l - np.log(share)) + np.log(share)  # softmax((1-epsilon) s + log eta)
    elif nce: plain = l - np.log(share) + np.log(share)      # smoothing that no scale undoes: the temperature alone
    else: plain = l
    grid = np.exp(np.linspace(-4, 4, 8001))
    best = min(grid, key=lambda t: nll_of(softmax((plain - plain.max(1, keepdims=True))/t), labels))
    T = model.about['read_out']['temperature']
    if T == 1: pytest.fail('the labels should determine a temperature')
    assert abs(np.log(T/best)) < 2e-3 and model.about['epsilon'] == .2
    assert model.about['read_out']['epsilon'] == (.2 if soft else 0)
    np.testing.assert_allclose(model.read_out(logits), softmax(plain/T), atol=1e-6)
    if not nce:  # without the temperature: the cut at zero
        p = np.clip(softmax(l) - .2/3, 0, None)
        np.testing.assert_allclose(model.read_out(logits, fitted=False), p/p.sum(1, keepdims=True), atol=1e-6)


def test_mixed_targets_in_batch_are_read_as_labels_and_it_says_so(tmp_path):
    *_, valid = keep(tmp_path, mixup=.8)
    about = find_model(tmp_path/'model').about
    assert about['targets'] == 'mixed' and about['read_out']['targets'] is None
    assert any('cannot be read from in-batch' in note for note in about['read_out']['notes'])
    keep(tmp_path, dict(name='soft_target_info_nce', noise='closed_form', noise_lam=.7), mixup=.8)
    assert find_model(tmp_path/'model').about['read_out']['targets'] == 'mixed'


def test_a_temperature_that_nothing_determines_is_not_used(tmp_path):
    sure = 5*torch.eye(3)[torch.arange(30) % 3], torch.arange(30) % 3
    keep(tmp_path, valid=sure)
    how = find_model(tmp_path/'model').about['read_out']
    assert how['temperature'] == 1 and 'the 30 validation images do not determine one' in how['notes'][-1]


# ---- what is wrong

def flip(path):
    raw = bytearray(path.read_bytes()); raw[len(raw)//2] ^= 1
    path.write_bytes(raw)


def test_damage_is_named_with_its_path(tmp_path):
    keep(tmp_path)
    for name in ('model.safetensors', 'loss.safetensors'):
        flip(tmp_path/'model'/name)
        with pytest.raises(UsageError, match=f'model/{name} is damaged: its checksum'): load_run(tmp_path/'model')
        flip(tmp_path/'model'/name)
    load_run(tmp_path/'model')
    (tmp_path/'model'/'model.safetensors').unlink()
    with pytest.raises(UsageError, match='model/model.safetensors is missing'): load_run(tmp_path/'model')
    config = tmp_path/'model'/'config.json'
    whole = config.read_text()
    later = whole.replace('"format": 1', '"format": 9')
    for text, message in ((whole[:90], 'config.json is damaged'), ('{"architecture": "resnet18"}', 'is not of softnce'),
                          (later, 'has format 9, this version of softnce reads 1')):
        config.write_text(text)
        with pytest.raises(UsageError, match=message): load_run(tmp_path/'model')


@pytest.mark.parametrize('change, message', [
    (dict(family='vizion'), "is of family 'vizion', which this version of softnce does not know"),
    (dict(family='../x'), 'is of family'), (dict(weights=None), 'has no whole weights'),
    (dict(weights=dict(used='best')), 'has no whole weights'),
    (dict(weights=dict(used='last', last=dict(file='x.safetensors', epoch=3))), 'has no whole weights'),
    (dict(classes=None), 'has no whole classes;'), (dict(model=3, read_out=[]), 'has no whole model, read_out;')])
def test_settings_that_are_not_whole_are_said_in_one_line(change, message, tmp_path):
    "In both commands, before anything is imported."
    keep(tmp_path); finished(tmp_path)
    config = tmp_path/'model'/'config.json'
    found = json.loads(config.read_text())
    config.write_text(json.dumps(found | dict(softnce=found['softnce'] | change)))
    for args in (['predict', '.', 'images'], ['export', '.', '--to', 'to']):
        done = subprocess.run([sys.executable, '-c', LIGHT, *args], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout == '2 []\n' and done.stderr.count('\n') == 1, (args, done)
        assert 'model/config.json' in done.stderr and message in done.stderr
    assert not (tmp_path/'to').exists()


def test_runs_without_a_model(tmp_path):
    def run(name, id, *files):
        for f in ('params.yaml', *files): put(tmp_path/name/id/f, '{}')
        return tmp_path/name/id
    for folder, message in (
            (tmp_path/'none', 'there is no folder'), (run('images', 'a'), 'is not finished: softnce status'),
            (run('images', 'b', 'metrics.json'), 'an older version of softnce made it. softnce run images -p @'),
            (run('graphs', 'c', 'metrics.json'), 'a run of graphs keeps none; this is offered for runs of images'),
            (tmp_path/'images', 'is a folder of 2 runs: name one'),
            (put(tmp_path/'x'/'y').parent, 'is no run and no exported model')):
        with pytest.raises(UsageError, match=message) as e: find_model(folder)
        assert '\n' not in str(e.value)


LIGHT = ("import sys; from softnce.runs.cli import main\ntry: main()\nexcept SystemExit as e: code = e.code\n"
         "print(code, sorted({'torch', 'timm', 'pandas'} & set(sys.modules)))") # a command, and what it has imported


def test_nothing_heavy_is_imported_for_an_error(tmp_path):
    keep(tmp_path); finished(tmp_path)
    for args in (['predict', 'nowhere', 'x.jpg'], ['predict', '.', 'x.jpg'], ['predict', '.', 'params.yaml'],
                 ['predict', '.', 'images', '--weights', 'first'], ['predict', '.', 'images', '--csv', 'no/x.csv'],
                 ['predict', '.', 'images', '--csv', 'images'], ['predict', '.', 'images', '--device', 'gpu'],
                 ['export', '.', '--to', 'images']):
        done = subprocess.run([sys.executable, '-c', LIGHT, *args], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout == '2 []\n' and done.stderr.count('\n') == 1, (args, done)


# ---- predictions

def test_a_model_is_loaded_without_torchmetrics(tmp_path):
    "It takes longer than all the rest, and nothing of it is used."
    keep(tmp_path)
    code = "import sys; from softnce.vision import load_run; load_run('model'); print('torchmetrics' in sys.modules)"
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == 'False\n', done


def test_damaged_metrics_stop_an_export_at_once_and_no_prediction(tmp_path):
    keep(tmp_path); finished(tmp_path, '[{"top1": ')
    done = subprocess.run([sys.executable, '-c', LIGHT, 'export', '.', '--to', 'to'], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.stdout == '2 []\n' and 'metrics.json is damaged' in done.stderr and done.stderr.count('\n') == 1
    assert not (tmp_path/'to').exists()
    assert predict_files(find_model(tmp_path), [tmp_path/'images'], tmp_path/'p.csv') == []


def test_find_images(tmp_path, monkeypatch):
    for name in ('a/1.jpg', 'a/deep/2.PNG', 'a/.hidden/3.jpg', 'a/notes.txt', 'b.jpg'): put(tmp_path/name, 'x')
    monkeypatch.chdir(tmp_path)
    def names(*given): return [str(p) for p in find_images(given)]
    assert names('a') == ['a/1.jpg', 'a/deep/2.PNG']
    assert names('b.jpg', 'a/*.jpg', './b.jpg', 'a/notes.txt', 'b.jpg') == ['b.jpg', 'a/1.jpg', 'a/notes.txt']
    assert names('**/*.PNG') == ['a/deep/2.PNG'] and names('[a]') == ['a/1.jpg', 'a/deep/2.PNG']
    for given, message in (('c', "there is no file or folder 'c'"), ('*.bmp', "no file fits '\\*.bmp'")):
        with pytest.raises(UsageError, match=message): names(given)
    put(tmp_path/'empty'/'x.txt', 'x')
    with pytest.raises(UsageError, match='empty has no images: it holds 1 .txt'): names('empty')


def test_predict_files(tmp_path, capsys):
    "A row a file in the order given; probabilities are those of `predict`; what cannot be read is named."
    keep(tmp_path)
    files = sorted((tmp_path/'images').rglob('*.png'))[:5]
    half = put(tmp_path/'half.png', files[0].read_bytes()[:100])
    unread = predict_files(find_model(tmp_path/'model'), [files[0], half, *files[1:]], tmp_path/'p.csv', batch_size=2)
    rows, model = list(csv.DictReader(open(tmp_path/'p.csv'))), load_run(tmp_path/'model')
    said = capsys.readouterr().err # without a terminal there is no bar in it
    assert [p for p, _ in unread] == [half] and said.startswith(f'cannot be read: {half} (') and '\r' not in said
    assert [r['file'] for r in rows] == [str(p) for p in (files[0], half, *files[1:])]
    assert rows[1]['error'] and not rows[1]['p_a'] and not rows[0]['error']
    want = model.predict(files)
    got = torch.tensor([[float(r[f'p_{c}']) for c in 'abc'] for r in rows if not r['error']], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert [r['class'] for r in rows if r['class']] == ['abc'[k] for k in want.argmax(1)]
    predict_files(find_model(tmp_path/'model'), files, tmp_path/'p.csv', top=2)
    row = next(csv.DictReader(open(tmp_path/'p.csv')))
    assert list(row) == ['file', 'class_1', 'p_1', 'class_2', 'p_2', 'error']
    assert (float(row['p_1']), float(row['p_2'])) == pytest.approx(sorted(want[0].tolist())[:0:-1], abs=1e-6)
    predict_files(find_model(tmp_path/'model'), files[:1])
    assert capsys.readouterr().out.startswith(f"{files[0]}  {row['class_1']} {float(row['p_1']):.3f}  ")


def test_a_table_is_whole_or_as_it_was(tmp_path, monkeypatch):
    keep(tmp_path)
    put(tmp_path/'p.csv', 'old')
    from softnce.vision import predictions
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(predictions, '_predict_batch', stop)
    with pytest.raises(KeyboardInterrupt):
        predict_files(find_model(tmp_path/'model'), [tmp_path/'images'], tmp_path/'p.csv')
    assert (tmp_path/'p.csv').read_text() == 'old' and not list(tmp_path.glob('.p.csv*'))


def test_pictures_are_read_as_in_training(tmp_path):
    "Turned by EXIF, of 16 bits, with a palette: as the upright picture of 8 bits."
    keep(tmp_path)
    x = np.kron(np.random.default_rng(0).integers(0, 255, (6, 9)), np.ones((6, 6))).astype('uint8')
    Image.fromarray(x).save(tmp_path/'8.png')
    Image.fromarray(x.astype('uint16')*257).save(tmp_path/'16.png')
    turned = Image.fromarray(np.rot90(x)); exif = turned.getexif(); exif[0x112] = 6
    turned.save(tmp_path/'turned.png', exif=exif)
    Image.fromarray(x).convert('P').save(tmp_path/'p.png')
    p = load_run(tmp_path/'model').predict([tmp_path/f'{n}.png' for n in ('8', '16', 'turned', 'p')])
    for other in p[1:]: torch.testing.assert_close(other, p[0], rtol=0, atol=1e-6)
    assert load_run(tmp_path/'model').predict([]).shape == (0, 3)


# ---- what a report shows

def test_wilson():
    "scipy's intervals."
    from scipy.stats import binomtest
    for right, rows in ((0, 5), (3, 7), (10, 10), (480, 500)):
        want = binomtest(right, rows).proportion_ci(method='wilson')
        assert wilson(right, rows) == pytest.approx((want.low, want.high), abs=2e-4)
    assert wilson(0, 0) == (0, 1)


def test_classes_and_confusions():
    true, said = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 0])
    probs = torch.nn.functional.one_hot(torch.tensor(said), 3).double()
    counts = confusion(probs, torch.tensor(true))
    assert counts.tolist() == [[1, 2, 0], [1, 1, 0], [1, 0, 0]]
    table = per_class(counts, ['x', 'y', 'z']).set_index('class')
    assert list(table.index) == ['z', 'x', 'y']
    assert table['taken for'].to_dict() == dict(z='x (1)', x='y (2)', y='x (1)')
    assert table.loc['x', 'found'] == 1/3 and table.loc['y', 'right when said'] == 1/3
    assert np.isnan(table.loc['z', 'right when said'])


def test_worst_mistakes(tmp_path):
    probs = torch.tensor([[.9, .1], [.6, .4], [.2, .8], [.3, .7]])
    assert worst_mistakes(probs, torch.tensor([1, 1, 1, 0])).tolist() == [0, 3, 1]
    data, *_ = keep(tmp_path)
    assert draw_mistakes(data.test, [0, 1], torch.eye(3)[:2], torch.tensor([0, 1]), data.classes) is None
    assert draw_mistakes(data.test, [0, 1], torch.eye(3)[:2], torch.tensor([0, 2]), data.classes) is not None


@pytest.mark.filterwarnings('ignore')
def test_predictions_have_their_names(tmp_path):
    "Images that cannot be read are left out; of soft labels the distribution is there."
    rows = [f'{k}.jpg,{1+k%2},{1+(k+1)%2}' for k in range(40)]
    for k in range(40): put(tmp_path/'i'/f'{k}.jpg', jpeg(k))
    put(tmp_path/'votes.csv', 'file,x,y\n'+'\n'.join(rows))
    data = load('soft_labels', tmp_path/'i', tmp_path/'votes.csv')
    bad = data.test.name(1)
    put(tmp_path/'i'/bad, 'half')
    batches = loaders(data, settings('small', 'soft_labels', 'nll', dict(batch_size=8, image_size=32)), 'nll')['test']
    batches.max_corrupt = batches.loader.dataset.allowed = 9
    labels = torch.cat([t for _, t in batches]).argmax(-1) # of distributions
    read = readable_rows(data.test, list(batches.corrupt), len(labels))
    assert len(read) == len(data.test)-1 and 1 not in read
    probs = torch.full((len(read), 2), .5)
    save_predictions(tmp_path/'p.csv', data.test, read, probs, labels, data.classes)
    for r in csv.DictReader(open(tmp_path/'p.csv')):
        k = int(r['file'].split('.')[0])
        assert (float(r['q_x']), float(r['q_y'])) == pytest.approx(((1+k % 2)/3, (1+(k+1) % 2)/3), abs=1e-6)
        assert r['label'] == ('y' if k % 2 == 0 else 'x') and float(r['p_x']) == .5 and r['file'] != bad
    with pytest.warns(UserWarning, match='the rows have no names'):
        assert readable_rows(data.test, [], len(read)) is None
    save_predictions(tmp_path/'p.csv', data.test, None, probs, labels, data.classes)
    assert next(csv.DictReader(open(tmp_path/'p.csv')))['file'] == ''


def test_many_classes_have_the_likeliest_and_the_own(tmp_path):
    data, *_ = keep(tmp_path)
    probs = torch.rand(2, 150, dtype=torch.float64).softmax(-1)
    save_predictions(tmp_path/'p.csv', data.test, [0, 1], probs, torch.tensor([7, 140]), [f'c{k}' for k in range(150)])
    rows = list(csv.DictReader(open(tmp_path/'p.csv')))
    assert len(rows[0]) == 3+10 and float(rows[1]['p_label']) == pytest.approx(probs[1, 140].item(), rel=1e-6)
    assert float(rows[0]['p_1']) == pytest.approx(probs[0].max().item(), rel=1e-6)


def test_soft_scores_by_hand():
    p, q = torch.tensor([[.6, .4]]).double(), torch.tensor([[.5, .5]]).double()
    s = soft_scores(p, q)
    assert s['negative log likelihood'] == pytest.approx(-.5*np.log(.6)-.5*np.log(.4))
    assert s['total variation'] == pytest.approx(.1) and s['brier score'] == pytest.approx(.02)


def test_what_is_kept_is_plain(tmp_path):
    keep(tmp_path)
    about = json.loads((tmp_path/'model'/'config.json').read_text())['softnce']
    assert about['classes'] == ['a', 'b', 'c'] and about['loss'] == dict(name='soft_target_info_nce')
    assert about['transform'] == dict(size=32, channels=3, crop_pct=1., mean=[.485, .456, .406], std=[.229, .224, .225],
                                      interpolation='bicubic')
