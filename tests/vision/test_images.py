"softnce.vision.images: layouts as delivered, in three parts."
import csv, hashlib, pickle, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('sklearn')
from pictures import cifar, jpeg, put, tiny, tree, zipped
from softnce.vision.batches import Batches, Mixing, transforms
from softnce.vision.images import digits, load
from softnce.vision.splits import ImageSet


def sizes(splits): return {n: len(p) for n, p in splits.parts.items()}


def names(part): return [part.name(i) for i in range(len(part))]


# ---- digits

@pytest.mark.parametrize('seed', [0, 1])
def test_digits_are_disjoint_complete_and_stratified(seed):
    from sklearn.datasets import load_digits
    data, parts = load_digits(), digits(seed).parts.values()
    rows = torch.cat([p.rows for p in parts])
    assert rows.sort().values.tolist() == list(range(1797))
    for part in parts:
        x = torch.stack([part.image(i) for i in range(len(part))])
        assert x.shape[1:] == (1, 8, 8) and x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
        assert np.array_equal((16*x[:, 0]).numpy(), data.images[part.rows])
        assert part.labels.tolist() == data.target[part.rows].tolist()
        share = torch.bincount(part.labels, minlength=10)/len(part)
        assert (share - torch.bincount(torch.tensor(data.target))/1797).abs().max() < 1.5/len(part)
    again, other = digits(seed), digits(seed+7)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(parts, again.parts.values()))
    assert not torch.equal(again.test.rows, other.test.rows)


@pytest.mark.parametrize('valid,test', [(0, .4), (.2, 0), (.5, .5), (-.1, .4)])
def test_split_shares_are_checked(valid, test):
    with pytest.raises(ValueError, match='valid and test must be positive'): digits(valid=valid, test=test)


# ---- Tiny ImageNet, ImageNet, folders

@pytest.mark.parametrize('form', ['folder', 'folder above', 'zip', 'zip in a folder', 'zip without a top folder'])
def test_tiny_imagenet_as_delivered(form, tmp_path):
    top = tiny(tmp_path/'a')/'tiny-imagenet-200'
    if 'zip' in form:
        (tmp_path/'z').mkdir()
        path = zipped(top, tmp_path/'z'/'tiny-imagenet-200.zip')
    if form == 'zip without a top folder':
        with zipfile.ZipFile(path, 'w') as z:
            for f in top.rglob('*'): z.write(f, f.relative_to(top))
    root = {'folder': top, 'folder above': tmp_path/'a', 'zip in a folder': tmp_path/'z'}.get(form) or path
    s = load('tiny_imagenet', root, valid=.2)
    assert sizes(s) == dict(train=24, valid=6, test=12) and s.size == 64
    assert s.classes == ['goldfish, Carassius auratus', 'toad', 'n03'] # the order of the sorted wnids n01, n02, n03
    assert not set(s.train.rows.tolist()) & set(s.valid.rows.tolist())
    assert torch.bincount(s.valid.labels).tolist() == [2, 2, 2]
    for part in (s.train, s.valid):
        for i in range(len(part)): assert f'n0{part.labels[i]+1}_' in part.name(i)
    truth = dict(line.split('\t')[:2] for line in (top/'val'/'val_annotations.txt').read_text().splitlines())
    for i in range(12):
        assert truth[s.test.name(i).rsplit('/', 1)[1]] == f'n0{s.test.labels[i]+1}'
        assert s.test.image(i).mode == 'RGB' and s.test.image(i).size == (64, 64)
    assert all(s.train.image(i).mode == 'RGB' for i in range(24)) # greyscale files among them
    again, other = (load('tiny_imagenet', root, valid=.2, seed=k) for k in (0, 1))
    assert torch.equal(again.valid.rows, s.valid.rows) and not torch.equal(other.valid.rows, s.valid.rows)


def test_imagenet_and_folders(tmp_path):
    both = load('imagenet', tree(tmp_path/'both', ['train', 'val']), valid=.34)
    assert both.classes == list('abc') and sizes(both) == dict(train=12, valid=6, test=18)
    assert all(n.startswith('val/') for n in names(both.test))
    assert all(n.startswith('train/') for n in names(both.valid))
    three = load('folder', tree(tmp_path/'three', ['train', 'valid', 'test']))
    folders = [{n.split('/')[0] for n in names(three.parts[p])} for p in ('train', 'valid', 'test')]
    assert folders == [{'train'}, {'valid'}, {'test'}] and set(sizes(three).values()) == {18}
    plain = load('folder', tree(tmp_path/'plain', ['.'], each=20))
    assert list(sizes(plain).values()) == [48, 6, 6]
    assert sorted(torch.cat([p.rows for p in plain.parts.values()]).tolist()) == list(range(60))
    put(tmp_path/'both'/'val'/'d'/'x.png', jpeg(0, 48, ending='PNG'))
    with pytest.raises(ValueError, match=r"classes without training images: \['d'\]"):
        load('imagenet', tmp_path/'both')


# ---- CIFAR-100

def test_cifar100_folder(tmp_path):
    root = cifar(tmp_path)
    raw = pickle.loads((root/'cifar-100-python'/'train').read_bytes())
    for where in (root, root/'cifar-100-python'):
        s = load('cifar100', where, valid=.25)
        assert list(sizes(s).values()) == [45, 15, 20] and s.classes == [f'class {k}' for k in range(5)]
        i, row = 7, int(s.train.rows[7])
        assert np.array_equal(np.asarray(s.train.image(i)).transpose(2, 0, 1).reshape(-1), raw['data'][row])
        assert s.train.labels[i] == raw['fine_labels'][row]
    class Evil:
        def __reduce__(self): return print, ('run',)
    put(root/'cifar-100-python'/'meta', pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match='builtins.print is not allowed'): load('cifar100', root)


# ---- soft labels

def test_soft_labels(tmp_path):
    root, g = tree(tmp_path/'images', ['.'], each=10), np.random.default_rng(0)
    files = sorted(str(p.relative_to(root)) for p in root.rglob('*.png'))
    probs = g.dirichlet([1, 1, 1, 1], 30)
    np.save(tmp_path/'p.npy', probs)
    s = load('soft_labels', root, tmp_path/'p.npy')
    assert s.num_classes == 4 and sum(sizes(s).values()) == 30
    for part in s.parts.values():
        for i in range(len(part)):
            np.testing.assert_allclose(part.target(i), probs[files.index(part.name(i))], rtol=1e-6)
    def table(rows, header=('file', 'split', 'cat', 'dog', 'cow', 'pig')):
        with open(tmp_path/'p.csv', 'w', newline='') as f: csv.writer(f).writerows([header, *rows])
        return tmp_path/'p.csv'
    part = ['train']*20+['valid']*4+['test']*6
    s = load('soft_labels', root, table([[n, w, *p] for n, w, p in zip(files, part, probs)]))
    assert s.classes == ['cat', 'dog', 'cow', 'pig'] and list(sizes(s).values()) == [20, 4, 6]
    assert s.test.name(0) == files[24]
    mixing = Mixing(4, smoothing=.2)
    x, t = next(iter(Batches(s.train, 6, True, transforms(32, True), s.mean, s.std, mixing=mixing)))
    assert x.shape == (6, 3, 32, 32) and t.shape == (6, 4) and t.min() >= .05 - 1e-6
    torch.testing.assert_close(t.sum(1), torch.ones(6))
    probs[3] *= 2
    np.save(tmp_path/'p.npy', probs)
    with pytest.raises(ValueError, match=r'sum to 1: row 3 \(a/3.png\) sums to 2; 1 such rows'):
        load('soft_labels', root, tmp_path/'p.npy')
    np.save(tmp_path/'p.npy', probs[1:])
    with pytest.raises(ValueError, match='one row per image, 30, got 29'): load('soft_labels', root, tmp_path/'p.npy')
    with pytest.raises(ValueError, match='name files that are not below .*: nope.png'):
        load('soft_labels', root, table([['nope.png', 'train', 1, 0, 0, 0]]))


# ---- one call

def test_reduced_sets_keep_the_reported_part():
    s, full = load('digits', classes=4, limit=5), load('digits')
    assert s.num_classes == 4 and torch.bincount(s.train.labels).tolist() == [5]*4
    assert torch.equal(s.test.rows, full.test.rows[full.test.labels < 4])
    assert set(s.train.rows.tolist()) < set(full.train.rows.tolist())
    for bad in (1, 11):
        with pytest.raises(ValueError, match=rf'classes must be in \[2, 10\], got {bad}'): load('digits', classes=bad)


@pytest.mark.parametrize('name,words', [
    ('imagenet', 'ImageNet-1k is not at .*145 GB; .*image-net.org'),
    ('tiny_imagenet', 'Tiny ImageNet is not at .*237 MB; .*cs231n'),
    ('cifar100', 'CIFAR-100 is not at .*161 MB; .*toronto'),
    ('folder', 'a folder of images is not at'),
])
def test_missing_data_says_what_and_where_from(name, words, tmp_path):
    with pytest.raises(FileNotFoundError, match=words): load(name, tmp_path/'nothing')


def test_unknown_names():
    known = 'digits, cifar100, tiny_imagenet, imagenet, folder or soft_labels'
    with pytest.raises(ValueError, match=f"name must be {known}, got 'mnist'"): load('mnist')
    with pytest.raises(ValueError, match='targets must have one row per image, 3, got 2'):
        ImageSet(torch.rand(3, 1, 2, 2), torch.zeros(2))


def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch):
    import torchvision.datasets.utils as utils
    def fake(url, root, filename=None, md5=None):
        put(Path(root)/'tiny-imagenet-200.zip', b'half a file')
        if hashlib.md5(b'half a file').hexdigest() != md5: raise RuntimeError('File not found or corrupted.')
    monkeypatch.setattr(utils, 'download_url', fake)
    with pytest.raises(RuntimeError, match='corrupted'): load('tiny_imagenet', tmp_path/'new', download=True)
