"softnce.training.config: settings that cannot be meant, the schedule by hand, layer decay by depth."
import pytest

from softnce.training.config import TrainConfig, cosine_lr, param_groups, scaled_lr

@pytest.mark.parametrize('change,message', [
    (dict(epochs=0), 'epochs must be at least 1, got 0$'),
    (dict(lr=0.), 'lr must be positive'),
    (dict(weight_decay=-1.), 'weight_decay must not be negative'),
    (dict(epsilon=1.), 'epsilon must be in'),
    (dict(epochs=3, warmup_epochs=3), r'warmup_epochs must be in \[0, epochs\), got 3 of 3$'),
    (dict(min_lr=1.), 'min_lr must be in'),
    (dict(accumulate=0), 'accumulate must be at least 1'),
    (dict(layer_decay=0.), 'layer_decay must be in'),
    (dict(ema=1.), 'ema must be in'),
    (dict(clip_norm=0.), 'clip_norm must be positive'),
    (dict(schedule='linear'), "schedule must be one of step, epoch, got 'linear'"),
    (dict(ranks='local'), "ranks must be one of own, all, got 'local'"),
    (dict(precision='fp8'), "precision must be one of fp32, bf16, fp16, got 'fp8'"),
])
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message): TrainConfig(**change)


def test_schedule():
    lrs = [cosine_lr(t, 20, 5, 2.) for t in range(20)]
    assert lrs[:5] == pytest.approx([.4, .8, 1.2, 1.6, 2.]) and lrs[5] == 2 and 0 < lrs[-1] < .05
    assert all(a >= b for a, b in zip(lrs[5:], lrs[6:]))
    assert cosine_lr(0, 10, 0, 1.) == 1 and cosine_lr(5, 10, 0, 1.) == pytest.approx(.5)
    assert cosine_lr(10, 10, 0, 1., .2) == .2
    assert scaled_lr(3e-4, 1024) == pytest.approx(.0012)


def test_layer_decay_is_a_power_of_the_depth():
    pytest.importorskip('timm')
    from softnce.vision.models import make_model
    model = make_model('vit_tiny', 4, 64, hidden=8)
    groups, config = param_groups(model, TrainConfig(layer_decay=.65)), TrainConfig(layer_decay=.65)
    scale = {id(p): (g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']}
    assert len(scale) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        token = name in ('cls_token', 'pos_embed')
        depth = 0 if token or name.startswith('patch_embed') else 13
        if name.startswith('blocks'): depth = 1+int(name.split('.')[1])
        assert scale[id(p)][0] == pytest.approx(.65**(13-depth)), name
        assert scale[id(p)][1] == (0. if p.ndim == 1 or token else config.weight_decay), name
