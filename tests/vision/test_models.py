"softnce.vision.models: heads, bodies, weights from files."
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
    assert load_weights(model, tmp_path/'mae.pth') == [] and torch.equal(model.head.weight, head)
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


@pytest.mark.parametrize('call,message', [
    (lambda: make_head(8, 0), 'num_classes must be at least 1, got 0'),
    (lambda: make_head(8, 2, hidden=0), 'hidden must be at least 1, got 0'),
    (lambda: SmallCNN(2)(torch.rand(2, 3, 8, 8)), r'images must be \(N, 1, H, W\), got \(2, 3, 8, 8\)'),
    (lambda: make_model('resnet_9000', 2),
     "name must be small_cnn, vit_b16, vit_tiny, resnet18_64 or a model of timm's, got 'resnet_9000'"),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message): call()
