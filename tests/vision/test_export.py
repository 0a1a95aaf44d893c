"softnce.vision.export and interchange: other programs get what the model gives, or nothing is handed over."
import json, re, shutil

import numpy as np
import pytest
import torch
from kept import finished, keep

from softnce.runs import UsageError
from softnce.runs.model_folder import find_model
from softnce.vision import interchange
from softnce.vision.export import export_model, table_of
from softnce.vision.use import load_run


def exported(folder, onnx=False, **asked):
    data, *_ = keep(folder, **asked)
    finished(folder)
    return data, load_run(folder), export_model(find_model(folder), folder/'to', onnx=onnx)


def code_of(card): # the Python of a card
    return re.findall('```python\n(.*?)```', card.read_text(), re.S)


@pytest.mark.parametrize('name, asked', [
    ('test_resnet', dict(hidden=0)), ('test_vit', dict(hidden=0, image_size=64)),
    ('vit_tiny', dict(image_size=32, hidden=0)), ('test_resnet', dict(hidden=8)),
    ('test_vit', dict(hidden=8, logits_bn=True, image_size=160))])
def test_timm_alone_gives_the_logits(name, asked, tmp_path, monkeypatch):
    "A linear head is timm's own; another one is read by the lines of the card."
    data, model, to = exported(tmp_path, model=name, loss=dict(name='nll'), **asked)
    images = torch.stack([model.transform(data.test.image(i)) for i in range(2)])
    monkeypatch.chdir(to)
    code, space = code_of(to/'README.md')[0], dict(images=images)
    assert 'softnce' not in code
    exec(code if asked['hidden'] else code+'logits = model(images)', space)
    torch.testing.assert_close(space['logits'], model.logits(images), rtol=1e-4, atol=1e-5)
    config = json.loads((to/'config.json').read_text())
    assert config['architecture'] == dict(vit_tiny='vit_tiny_patch16_224').get(name, name)
    assert config['pretrained_cfg']['input_size'] == [3, model.transform.size, model.transform.size]
    assert config['num_classes'] == (0 if asked['hidden'] else 3)
    torch.testing.assert_close(load_run(to).logits(images), model.logits(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['small_cnn', 'resnet18_64'])
def test_what_timm_cannot_build_is_not_offered_as_timms(name, tmp_path):
    data, model, to = exported(tmp_path, model=name)
    assert 'timm has no such network' in (to/'README.md').read_text()
    assert list(json.loads((to/'config.json').read_text())) == ['softnce']
    path = data.test.images.root/data.test.name(0)
    assert torch.equal(load_run(to).predict(path), model.predict(path))


@pytest.mark.parametrize('loss, asked', [
    (dict(name='nll'), dict(smoothing=.2)),
    (dict(name='soft_target_info_nce', noise='closed_form', noise_lam=.7, noise_epsilon=.1), dict(mixup=.8)),
    pytest.param(dict(name='soft_target_info_nce'), dict(model='test_vit', image_size=160), marks=pytest.mark.slow)])
def test_onnx_gives_what_torch_gives(loss, asked, tmp_path):
    "On held images, one and several at a time; the read-out is inside."
    session = pytest.importorskip('onnxruntime').InferenceSession
    data, model, to = exported(tmp_path, onnx=True, loss=loss, **asked)
    t = model.transform
    x = torch.stack([t(data.test.image(i)) for i in range(len(data.test))])
    images = x*torch.tensor(t.std).view(-1, 1, 1) + torch.tensor(t.mean).view(-1, 1, 1)
    run = session(str(to/'model.onnx'))
    for rows in (len(x), 1):
        logits, probs = run.run(None, {'images': images[:rows].numpy()})
        np.testing.assert_allclose(logits, model.logits(x[:rows]), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(probs, model.predict(x[:rows]), rtol=0, atol=1e-5)
    assert json.loads(run.get_modelmeta().custom_metadata_map['classes']) == ['a', 'b', 'c']


def test_a_graph_that_differs_is_not_handed_over(tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    export = interchange._exported
    def other(whole, images, path):
        whole.read_out.temperature *= 2
        export(whole, images, path)
        whole.read_out.temperature /= 2
    monkeypatch.setattr(interchange, '_exported', other)
    keep(tmp_path); finished(tmp_path)
    with pytest.raises(RuntimeError, match='model.onnx does not give what the model gives'):
        export_model(find_model(tmp_path), tmp_path/'to')
    assert not [p for p in tmp_path.iterdir() if 'to' in p.name and p.name != 'metrics.json']


def test_the_card(tmp_path):
    data, model, to = exported(tmp_path, mixup=.8)
    text = (to/'README.md').read_text()
    T = model.about['read_out']['temperature']
    for words in ('`a`, `b`, `c`', '| test | 30 | 0.9000 [0.7438, 0.9654] | 0.5000 |', 'on 36 images of `folder`',
                  "the last epoch's (3)", 'cannot be read from in-batch', f'temperature of {T:.4g}'):
        assert words in text, words
    best = export_model(find_model(tmp_path), tmp_path/'best', 'best', onnx=False)
    assert 'metrics below are those of the last epoch' in (best/'README.md').read_text()
    assert load_run(best).about['weights'] == dict(used='best', best=dict(file='model.safetensors', epoch=2))


def test_metrics_as_a_table():
    rows = [dict(split='test', rows=4, top1=.5, top5=None, nll=.25), dict(split='valid', rows=2, top1=1., nll=None)]
    assert table_of(rows).splitlines()[2] == '| test | 4 | 0.5000 [0.1500, 0.8500] | 0.2500 |'
    assert 'top-5' not in table_of(rows)


def test_refusals(tmp_path, monkeypatch):
    keep(tmp_path); finished(tmp_path)
    model = find_model(tmp_path)
    for name, message in (('images', 'is there and not empty'), ('metrics.json', 'is there and not empty'),
                          ('metrics.json/x', 'is no folder')):
        with pytest.raises(UsageError, match=message): export_model(model, tmp_path/name)
    from softnce.vision import export
    monkeypatch.setattr(export.util, 'find_spec', lambda name: None)
    with pytest.raises(UsageError, match=r"needs onnx, onnxruntime, onnxscript: pip install 'softnce\[export\]'"):
        export_model(model, tmp_path/'to')
    to = export_model(model, tmp_path/'to', onnx=False)
    with pytest.raises(UsageError, match='is an exported model: export the run'):
        export_model(find_model(to), tmp_path/'x', onnx=False)
    shutil.rmtree(to)
