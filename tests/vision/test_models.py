"softnce.vision.models: heads, bodies, weights from files."
from argparse import Namespace

import numpy as np
import pytest
import torch

pytest.importorskip('timm')
from softnce.vision.models import SmallCNN, load_weights, make_head, make_model


@pytest.mark.parametrize('bn', [False, True])
def test_head_has_three_layers_or_one(bn):
    layers = make_head(5, 3, 7, bn)
    linear = [m for m in layers if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(5, 7), (7, 7), (7, 3)]
    assert isinstance(make_head(5, 3, None), torch.nn.Linear)
    h, (a, b, c) = torch.randn(4, 5), linear
    def gelu(v): return v*.5*(1+torch.erf(v/2**.5))
    with torch.no_grad():
        want = gelu(gelu(h@a.weight.T+a.bias)@b.weight.T+b.bias)@c.weight.T+c.bias
        if bn: want = (want-want.mean(0))/(want.var(0, unbiased=False)+1e-5).sqrt()
        torch.testing.assert_close(layers(h), want)


def test_models_end_in_logits():
    bodies = ('small_cnn', 8, 1), ('resnet18_64', 64, 3), ('vit_tiny', 64, 3), ('resnet10t', 32, 3)
    for name, size, channels in bodies:
        model = make_model(name, 6, size, channels, hidden=16)
        assert model(torch.rand(2, channels, size, size)).shape == (2, 6)
    linear = make_model('vit_tiny', 6, 64, hidden=None)
    assert isinstance(linear.head, torch.nn.Linear) and linear.head.out_features == 6
    linear = make_model('convnext_atto', 6, 64, hidden=None)
    assert isinstance(linear.head.fc, torch.nn.Linear) and linear.head.fc.out_features == 6


def test_weights_from_a_local_checkpoint_with_other_position_embeddings(tmp_path):
    """A made-up MAE-like checkpoint of another size: blocks are copied, position embeddings interpolated, decoder and
    head left out."""
    import timm
    other = timm.create_model('vit_tiny_patch16_224', img_size=96, num_classes=9, depth=2)
    for p in other.parameters(): torch.nn.init.normal_(p, std=.5)
    state = other.state_dict() | {'mask_token': torch.zeros(1, 1, 4), 'decoder_pred.weight': torch.zeros(2, 2)}
    torch.save(dict(model=state, epoch=3), tmp_path/'mae.pth')
    model = timm.create_model('vit_tiny_patch16_224', img_size=160, num_classes=4, depth=2)
    head = model.head.weight.clone()
    report = load_weights(model, tmp_path/'mae.pth')
    assert report.missing == [] and report.resized == ['pos_embed'] and torch.equal(model.head.weight, head)
    assert sorted(report.left_out) == ['decoder_pred.weight', 'head.bias', 'head.weight', 'mask_token']
    assert sorted(report.loaded) == sorted(k for k in model.state_dict() if not k.startswith('head.'))
    blocks = {k: v for k, v in other.state_dict().items() if k.startswith('blocks')}
    assert blocks and all(torch.equal(model.state_dict()[k], v) for k, v in blocks.items())
    assert model.pos_embed.shape == (1, 101, 192) and torch.equal(model.pos_embed[:, 0], other.pos_embed[:, 0])
    def grid(m, n): return m.pos_embed[:, 1:].reshape(1, n, n, 192).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(grid(other, 6), (10, 10), mode='bicubic', antialias=True)
    torch.testing.assert_close(grid(model, 10), want, rtol=0, atol=1e-5)
    torch.save({'a': torch.zeros(1)}, tmp_path/'other.pth')
    with pytest.raises(ValueError, match="of the model's .* parameters; missing: cls_token"):
        load_weights(model, tmp_path/'other.pth')


def test_published_weights_that_cannot_be_had_say_so(monkeypatch):
    import timm
    def create_model(*a, pretrained, **k):
        if not pretrained: pytest.fail('not asked for weights')
        raise OSError('no network')
    monkeypatch.setattr(timm, 'create_model', create_model)
    message = r'weights of vit_base_patch16_224.mae cannot be had \(no network\): .* pretrained='
    with pytest.raises(FileNotFoundError, match=message): make_model('vit_b16', 5, pretrained=True)


# ---- the model that was asked for

@pytest.mark.parametrize('name', [
    'convnext_atto', 'mobilenetv3_small_050', 'dpn48b', 'efficientvit_b0', 'levit_128s', 'resnet50_clip',
    'deit_tiny_distilled_patch16_224', 'swin_tiny_patch4_window7_224', 'deit_tiny_patch16_224', 'volo_d1_224',
])
def test_heads_of_any_model_are_used_and_trained(name, hidden=8):
    tokens = name in ('volo_d1_224', 'resnet50_clip') # their heads see every patch
    model = make_model(name, 5, size=64, hidden=hidden, logits_bn=not tokens)
    model(torch.rand(4, 3, 64, 64)).square().mean().backward()
    width = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 5]
    assert len(width) in (1, 2) and all(m.weight.grad is not None and m.weight.grad.abs().max() > 0 for m in width)
    assert all(m.in_features == (hidden or m.in_features) for m in width)
    if tokens:
        with pytest.raises(ValueError, match=name): make_model(name, 5, size=64, hidden=hidden, logits_bn=True)
        return
    x = model(torch.rand(64, 3, 64, 64))
    torch.testing.assert_close(x.mean(0), torch.zeros(5), rtol=0, atol=1e-4) # the normalisation is the last layer


def test_two_heads_of_a_distilled_model_are_averaged():
    model = make_model('deit_tiny_distilled_patch16_224', 5, size=32, hidden=8).eval()
    outputs = []
    for head in (model.head, model.head_dist): head.register_forward_hook(lambda m, i, out: outputs.append(out))
    torch.testing.assert_close(model(torch.rand(2, 3, 32, 32)), sum(outputs)/2)


def test_a_model_is_made_as_its_name_says():
    for name, patch in (('vit_small_patch32_224', 32), ('vit_tiny_patch16_224', 16)): # not 8, not another pooling
        model = make_model(name, 3, size=64, hidden=8)
        assert model.patch_embed.patch_size == (patch, patch) and model.global_pool == 'token'
    ours = make_model('vit_tiny', 3, size=64, hidden=8)
    assert ours.patch_embed.patch_size == (8, 8) and ours.global_pool == 'avg'
    dropping = make_model('resnet18', 3, size=32, hidden=8, drop_path=.2)
    rates = [m.drop_prob for m in dropping.modules() if hasattr(m, 'drop_prob')]
    assert rates and max(rates) == pytest.approx(.2)


def test_trying_a_model_leaves_no_trace():
    import timm
    torch.manual_seed(4); ours = make_model('resnet18', 3, size=32, hidden=None); after = torch.rand(1)
    torch.manual_seed(4); plain = timm.create_model('resnet18', num_classes=3); plain.fc = torch.nn.Linear(512, 3)
    assert torch.equal(after, torch.rand(1)) and ours.training
    want = plain.state_dict()
    assert ours.state_dict().keys() == want.keys()
    assert all(torch.equal(v, want[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize('asked,message', [
    (dict(name='inception_v4', size=64), r'inception_v4 does not take images \(3, 64, 64\)'),
    (dict(name='vgg11', size=32, drop_path=.1), 'drop_path must be 0 for vgg11, which has none'),
    (dict(name='small_cnn', drop_path=.1), 'drop_path must be 0 for small_cnn, which has none, got 0.1'),
    (dict(name='small_cnn', pretrained=True), "a checkpoint's file for small_cnn, which has no published weights"),
    (dict(name='selecsls42', size=64, pretrained=True), "file for selecsls42, which has no published weights"),
    (dict(name='resnet18.of_mine', size=64), "one of timm's tags, resnet18.*, got 'resnet18.of_mine'"),
    (dict(name='resnet18', size=64, pretrained=1.5), "pretrained must be True, False or a checkpoint's file, got 1.5"),
    (dict(name='resnet18', size=64, pretrained=''), "pretrained must be True, False or a checkpoint's file, got ''"),
    (dict(name='crossvit_9_240', size=64), r'crossvit_9_240 does not take images \(3, 64, 64\)'),
])
def test_another_model_than_asked_for_is_an_error(asked, message):
    with pytest.raises(ValueError, match=message): make_model(num_classes=3, hidden=8, **asked)


# ---- checkpoints

def filled(name='test_resnet'):
    "A model of timm's with values of its own, and their names without the head."
    import timm
    model = timm.create_model(name, num_classes=9)
    for i, p in enumerate(model.parameters()): torch.nn.init.normal_(p, i, .1)
    return model, {k: v.clone() for k, v in model.state_dict().items() if not k.startswith('fc.')}


def below(prefix, state): return {prefix+k: v for k, v in state.items()}


FORMS = {
    'a state dict': lambda s: s, 'model': lambda s: dict(model=s, epoch=3), 'state_dict': lambda s: dict(state_dict=s),
    'module.': lambda s: dict(state_dict=below('module.', s)), '_orig_mod.': lambda s: below('_orig_mod.', s),
    'both wrappers': lambda s: dict(model=below('module._orig_mod.', s)),
    'Lightning': lambda s: dict(state_dict=below('model.', s)),
    'a backbone': lambda s: dict(state_dict=below('backbone.', s) | dict(neck=torch.zeros(2))),
    'MoCo': lambda s: dict(state_dict=below('module.encoder_q.', s) | {'module.queue': torch.zeros(2, 2)}),
    'another key': lambda s: dict(net=s, optimizer=dict(state={0: dict(exp_avg=torch.zeros(2))})),
    'two levels': lambda s: dict(state=dict(params=s)),
    'settings beside it': lambda s: dict(model=s, args=Namespace(lr=.1)),
    'numpy scores': lambda s: dict(model=s, best=np.float64(.5), hits=np.float32(1), history=np.zeros(3)),
    'averaged': lambda s: dict(model={k: v+1 for k, v in s.items()}, model_ema=s),
    'our own': lambda s: dict(model={k: v+1 for k, v in s.items()}, optimizer={}, scaler=None, ema=s, history=[.5]),
    'our own without average': lambda s: dict(model=s, optimizer={}, scaler=None, ema=None, history=[]),
    'half precision': lambda s: {k: v.bfloat16() if v.is_floating_point() else v for k, v in s.items()},
}


@pytest.mark.parametrize('form', FORMS)
def test_checkpoints_in_every_usual_form(form, tmp_path):
    source, state = filled()
    torch.save(FORMS[form](source.state_dict()), tmp_path/'w.pth')
    model = make_model('test_resnet', 4, size=32, hidden=8, pretrained=tmp_path/'w.pth')
    for k, v in state.items():
        got = model.state_dict()[k]
        assert torch.equal(got, v.to(got.dtype) if form != 'half precision' else v.bfloat16().to(got.dtype)), k
    assert model.loaded.missing == [] and len(model.loaded.loaded) == sum(not k.endswith('tracked') for k in state)
    assert any(k.endswith('fc.weight') for k in model.loaded.left_out)


def test_safetensors_and_folders_as_hugging_face_lays_them(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    source, state = filled()
    save_file(source.state_dict(), tmp_path/'model.safetensors')
    monkeypatch.setenv('HOME', str(tmp_path))
    for path in (tmp_path/'model.safetensors', tmp_path, '~/model.safetensors'):
        model = make_model('test_resnet', 4, size=32, hidden=8, pretrained=str(path) if path != tmp_path else path)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_what_a_checkpoint_gave_is_said(tmp_path):
    source, state = filled('resnet18')
    state = source.state_dict() | {'decoder.weight': torch.zeros(2)}
    del state['bn1.weight']
    torch.save(dict(model=below('module.', state)), tmp_path/'w.pth')
    report = make_model('resnet18_64', 4, size=32, hidden=8, pretrained=str(tmp_path/'w.pth')).loaded
    assert report.missing == ['conv1.weight', 'bn1.weight']
    conv = 'conv1.weight (64, 3, 7, 7), not (64, 3, 3, 3)'
    assert sorted(report.left_out) == [conv, 'decoder.weight', 'fc.bias', 'fc.weight']
    text = str(report)
    assert text.startswith(f"{tmp_path}/w.pth['model'], below 'module.': ")
    assert 'missing: conv1.weight, bn1.weight (2)' in text


def test_a_checkpoint_of_a_small_network_is_read_too(tmp_path):
    source = SmallCNN(7, 1, 4, 8)
    torch.save(source.state_dict(), tmp_path/'w.pth')
    model = make_model('small_cnn', 3, 8, 1, hidden=16, width=4, pretrained=str(tmp_path/'w.pth'))
    assert all(torch.equal(a, b) for a, b in zip(source.body.state_dict().values(), model.body.state_dict().values()))
    with pytest.raises(ValueError, match="has 0 of the model's|has . of the model's"):
        make_model('small_cnn', 3, 8, 1, hidden=16, width=5, pretrained=str(tmp_path/'w.pth'))


def test_a_transformer_of_another_size_is_resized_by_timm(tmp_path):
    import timm
    source = timm.create_model('swin_tiny_patch4_window7_224', img_size=224, num_classes=0)
    torch.save(source.state_dict(), tmp_path/'w.pth')
    model = make_model('swin_tiny_patch4_window7_224', 3, size=128, hidden=8, pretrained=str(tmp_path/'w.pth'))
    assert torch.equal(model.layers[2].blocks[3].mlp.fc1.weight, source.layers[2].blocks[3].mlp.fc1.weight)
    assert not model.loaded.missing


def broken(tmp_path):
    "Files that are no checkpoint of a small residual network, and what is said of them."
    source, state = filled()
    whole = tmp_path/'whole.pth'
    torch.save(source.state_dict(), whole)
    raw = whole.read_bytes()
    class Evil:
        def __reduce__(self): return print, ('run',)
    makes = {
        'empty': (lambda p: p.write_bytes(b''), 'is empty, perhaps a download that stopped'),
        'half': (lambda p: p.write_bytes(raw[:len(raw)//2]), 'cannot be read as a checkpoint'),
        'a page': (lambda p: p.write_bytes(b'<html>not found</html>'), 'cannot be read as a checkpoint'),
        'a module': (lambda p: torch.save(source, p), 'cannot be read as a checkpoint .*ResNet.*expected a state dict'),
        'code': (lambda p: torch.save(dict(model=Evil()), p), 'cannot be read as a checkpoint .*print'),
        'a list': (lambda p: torch.save([1, 2], p), "has 0 of the model's"),
        'another': (lambda p: torch.save(filled('resnet10t')[0].state_dict(), p), "has .* of the model's"),
        'a part': (lambda p: torch.save({k: v for k, v in state.items() if not k.startswith('layer4')}, p),
                   "has .* of the model's .*; missing: layer4.0.conv1.weight"),
        'a folder': (lambda p: p.mkdir(), 'is a folder without model.safetensors or pytorch_model.bin'),
    }
    for name, (make, message) in makes.items():
        make(tmp_path/name)
        yield tmp_path/name, message


@pytest.mark.filterwarnings('ignore')
def test_files_that_are_no_checkpoint_of_this_model_are_named(tmp_path, capsys):
    for path, message in broken(tmp_path):
        with pytest.raises(ValueError, match=f'{path.name}.*{message}'):
            make_model('test_resnet', 4, size=32, hidden=8, pretrained=str(path))
    with pytest.raises(FileNotFoundError, match='pretrained: there is no checkpoint .*none.pth'):
        make_model('test_resnet', 4, size=32, hidden=8, pretrained=str(tmp_path/'none.pth'))
    assert 'run' not in capsys.readouterr().out


@pytest.mark.parametrize('call,message', [
    (lambda: make_head(8, 0), 'num_classes must be at least 1, got 0'),
    (lambda: make_head(8, 2, hidden=0), 'hidden must be at least 1, got 0'),
    (lambda: SmallCNN(2)(torch.rand(2, 3, 8, 8)), r'images must be \(N, 1, H, W\), got \(2, 3, 8, 8\)'),
    (lambda: make_model('resnet_9000', 2),
     "name must be small_cnn, vit_b16, vit_tiny, resnet18_64 or a model of timm's, got 'resnet_9000'"),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message): call()
