"softnce.vision.batches: batches as a function of (seed, epoch, number), mixing, files that cannot be read."
import random
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip('sklearn')
pytest.importorskip('timm')
from pictures import jpeg, put, tree
from softnce.targets import SparseTargets, one_hot
from softnce.vision.batches import Batches, Mixing, seeded, transforms
from softnce.vision.files import Files
from softnce.vision.images import digits, load
from softnce.vision.splits import ImageSet


def made(data, **kw):
    "Augmented, erased and mixed batches of a training part."
    size = kw.pop('batch_size', 8)
    return Batches(data.train, size, True, transforms(32, True), data.mean, data.std, .5, Mixing(3), **kw)


def same(a, b): return torch.equal(a[0], b[0]) and torch.equal(a[1].dense(), b[1].dense())


def test_a_batch_is_a_function_of_seed_epoch_and_number(small):
    first = made(small)
    first.seek(2); whole = list(first)
    assert len(whole) == len(first) == len(small.train)//8
    torch.manual_seed(5); np.random.seed(5)
    other = made(small)
    list(other)                                   # another epoch before, and other global states
    other.seek(2, 2); rest = list(other)
    assert len(rest) == len(whole)-2 and all(same(a, b) for a, b in zip(whole[2:], rest))
    workers = made(small, num_workers=2); workers.seek(2)
    assert all(same(a, b) for a, b in zip(whole, workers))
    for change in (made(small, seed=1), made(small)):
        change.seek(2 if change.seed else 3)
        assert not same(next(iter(change)), whole[0])


def test_global_generators_are_left_alone(small):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    next(iter(made(small)))
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    with seeded(1, 2): a = torch.rand(2), np.random.rand(), random.random()
    with seeded(1, 2): b = torch.rand(2), np.random.rand(), random.random()
    with seeded(2, 1): c = torch.rand(2)
    assert torch.equal(a[0], b[0]) and a[1:] == b[1:] and not torch.equal(a[0], c)


def test_training_is_whole_batches_and_evaluation_all_rows_in_order():
    s = digits()
    b = Batches(s.train, 100, True)
    def epoch(n): b.seek(n); return list(b)
    def rows(batches):
        return Counter((bytes((16*v).to(torch.uint8).numpy()), int(k)) for x, y in batches for v, k in zip(x, y))
    mine = rows([(torch.stack([s.train.image(i) for i in range(len(s.train))]), s.train.labels)])
    assert [len(y) for _, y in epoch(0)] == [100]*7 and not rows(epoch(0)) - mine
    assert not torch.equal(epoch(0)[0][1], epoch(1)[0][1])
    assert torch.equal(torch.cat([y for _, y in Batches(s.valid, 100)]), s.valid.labels)


def test_ranks_share_each_batch(small):
    def plain(**kw): return Batches(small.train, 8, True, transforms(32, True), small.mean, small.std, **kw)
    for (x, y), (a, i), (b, j) in zip(plain(), *(plain(rank=r, world=2) for r in (0, 1))):
        assert torch.equal(x[0::2], a) and torch.equal(x[1::2], b)
        assert torch.equal(y[0::2], i) and torch.equal(y[1::2], j)
    lams = [next(iter(made(small, rank=r, world=2)))[1].weights[0, 0] for r in (0, 1)]
    assert lams[0] == lams[1] and 0 < lams[0] < 1 # one lam for the global batch


def test_normalisation_and_evaluation_transform(small):
    x, y = next(iter(Batches(small.test, 12, transform=transforms(64), mean=small.mean, std=small.std)))
    mean, std = (torch.tensor(v)[:, None, None] for v in (small.mean, small.std))
    for i in range(12):
        want = (torch.tensor(np.asarray(small.test.image(i))).permute(2, 0, 1)/255-mean)/std
        torch.testing.assert_close(x[i], want, rtol=0, atol=1e-5)
    assert torch.equal(y, small.test.labels)


def test_unreadable_images_are_named_counted_and_bounded(tmp_path):
    root = tree(tmp_path, ['train', 'val'], each=20)
    bad = [root/'train'/'a'/'3.png', root/'train'/'b'/'4.png', root/'val'/'c'/'5.png']
    for p, data in zip(bad, (b'', b'not an image', bad[2].read_bytes()[:200])): p.write_bytes(data)
    s = load('imagenet', root)
    batches = Batches(s.train, 10, True, transforms(32, True), s.mean, s.std, max_corrupt=.1)
    with pytest.warns(UserWarning, match=r'cannot be read, replaced: train/a/3.png \(UnidentifiedImageError\)'):
        epoch = list(batches)
    assert all(len(y) == 10 for _, y in epoch)
    batches.seek(1); list(batches)
    held = [n for n in (s.train.name(i) for i in range(len(s.train))) if n in ('train/a/3.png', 'train/b/4.png')]
    assert sorted(n.split(' ')[0] for n in batches.corrupt) == sorted(held) and held
    def evaluation(**kw): return Batches(s.test, 20, transform=transforms(32), mean=s.mean, std=s.std, **kw)
    with pytest.warns(UserWarning, match='left out: val/c/5.png'): test = list(evaluation(max_corrupt=.1))
    assert sum(len(y) for _, y in test) == 59
    refusal = r'1 of 60 images cannot be read, more than max_corrupt=0.01: val/c/5.png'
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=refusal): list(evaluation())
    for p in (root/'train').rglob('*.png'): p.write_bytes(b'')
    refusal = 'of 54 images cannot be read, more than max_corrupt=0.1'
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=refusal):
        next(iter(batches))


def evaluation(data, rows, **kw): return Batches(data, rows, transform=transforms(16), mean=[.5]*3, std=[.5]*3, **kw)


def files(root, names): return ImageSet(Files(root, names), torch.arange(len(names)))


@pytest.mark.filterwarnings('ignore:cannot be read')
@pytest.mark.parametrize('workers', [0, 2])
def test_max_corrupt_alone_ends_a_run(workers, tmp_path):
    "A damaged folder: more than a hundred bad files in a row, and in evaluation whole batches of them."
    names, good = [f'{i:03}.png' for i in range(400)], jpeg(1, 16, ending='PNG')
    for i, n in enumerate(names): put(tmp_path/n, b'' if 100 <= i < 250 else good)
    data = files(tmp_path, names)
    b = evaluation(data, 7, max_corrupt=.4, num_workers=workers)
    assert torch.cat([y for _, y in b]).tolist() == [*range(100), *range(250, 400)] and len(b.corrupt) == 150
    train = Batches(data, 40, True, transforms(16), [.5]*3, [.5]*3, max_corrupt=.4, num_workers=workers)
    seen = torch.cat([y for _, y in train])
    assert len(seen) == 400 and not any(100 <= y < 250 for y in seen.tolist()) and len(train.corrupt) == 150
    for cut in (evaluation(data, 7, max_corrupt=.2, num_workers=workers),
                Batches(data, 40, True, transforms(16), [.5]*3, [.5]*3, max_corrupt=.2, num_workers=workers)):
        refusal = r'^\d+ of 400 images cannot be read, more than max_corrupt=0.2: \d\d\d.png'
        with pytest.raises(ValueError, match=refusal): list(cut)


@pytest.mark.filterwarnings('ignore:cannot be read')
def test_one_bad_row_alone_in_the_last_batch_is_left_out(tmp_path):
    for i in range(9): put(tmp_path/f'{i}.png', jpeg(i, 16, ending='PNG') if i < 8 else b'half')
    data = files(tmp_path, [f'{i}.png' for i in range(9)])
    batches = evaluation(data, 4, max_corrupt=.2)
    assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert list(batches.corrupt) == ['8.png (UnidentifiedImageError)']


@pytest.mark.filterwarnings('ignore:cannot be read')
def test_a_bad_file_is_read_once_and_its_replacement_does_not_depend_on_that(tmp_path):
    for i in range(30): put(tmp_path/f'{i:02}.png', jpeg(i, 16, ending='PNG') if i % 5 else b'half')
    class Counted(Files):
        tries = Counter()
        def bytes(self, i): self.tries[i] += 1; return super().bytes(i)
    data = ImageSet(Counted(tmp_path, [f'{i:02}.png' for i in range(30)]), torch.arange(30))
    def batches(): return Batches(data, 10, True, transforms(16, True), [.5]*3, [.5]*3, max_corrupt=.3)
    whole = batches()
    first = [list(whole), list(whole)]
    assert all(Counted.tries[i] == 1 for i in range(0, 30, 5))
    later = batches(); later.seek(1, 2)
    (x, y), = list(later)
    whole.seek(1); want = list(whole)[2]
    assert torch.equal(x, want[0]) and torch.equal(y, want[1])
    assert len(first[0]) == 3 and not any(int(k) % 5 == 0 for _, y in first[0] for k in y)


def test_images_that_are_all_unreadable_are_an_error_whatever_is_allowed(tmp_path):
    for i in range(4): put(tmp_path/f'{i}.png', b'')
    data = files(tmp_path, [f'{i}.png' for i in range(4)])
    b = Batches(data, 2, True, transforms(16), [.5]*3, [.5]*3, max_corrupt=1.)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='none of 4 images can be read: '): list(b)


def test_randaugment_survives_every_policy(small):
    "Magnitudes above ten ask timm's posterise for no bits at all."
    view = transforms(32, True, 'rand-m10-n4-mstd3-inc1')
    for i in range(150):
        with seeded(i): assert view(small.train.image(i % len(small.train))).shape == (3, 32, 32)


# ---- mixing

@pytest.mark.parametrize('mixup,cutmix', [(.8, 0.), (0., 1.), (.8, 1.)])
@pytest.mark.parametrize('smoothing', [0., .1])
def test_mixing_is_timms(mixup, cutmix, smoothing):
    from timm.data import Mixup
    images, labels = torch.rand(8, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 5, 1, 2])
    timms = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=7)
    for seed in range(6):
        with seeded(seed): theirs, dense = timms(images.clone(), labels.clone())
        with seeded(seed): ours, sparse = Mixing(7, mixup, cutmix, smoothing)(images.clone(), labels)
        assert isinstance(sparse, SparseTargets) and sparse.indices.shape == (8, 2) and torch.equal(ours, theirs)
        torch.testing.assert_close(sparse.dense(), dense, rtol=0, atol=1e-6)


def test_mixing_of_soft_targets_is_mixing_of_rows():
    soft = torch.softmax(torch.randn(6, 4, dtype=torch.float64), 1)
    images = torch.eye(6, dtype=torch.float64).reshape(6, 1, 1, 6).clone()
    with seeded(3): mixed, targets = Mixing(4, cutmix=0., smoothing=.2)(images, soft)
    lam = mixed[0, 0, 0, 0]
    torch.testing.assert_close(targets, .8*(lam*soft+(1-lam)*soft.flip(0))+.05, rtol=0, atol=1e-7)


def test_lam_follows_its_beta_law():
    mixing, lams = Mixing(3, .8, 0., 0.), []
    with seeded(0):
        for _ in range(2000): lams.append(mixing(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]))[1].weights[0, 0])
    lams = torch.stack(lams)
    # Beta(a, a): mean 1/2, variance 1/(4(2a+1))
    assert abs(lams.mean()-.5) < .04 and abs(lams.var()-1/(4*(2*.8+1))) < .01


def test_drawn_labels_follow_the_soft_target():
    "Over many batches, a hard loss sees each class as often as the mixed and smoothed targets say."
    labels, mixing = torch.tensor([0, 1, 1, 2]), Mixing(4, .8, 0., .1, draw=True)
    soft = Mixing(4, .8, 0., .1)
    count, want = torch.zeros(4, 4), torch.zeros(4, 4)
    for seed in range(400):
        with seeded(seed): ids = mixing(torch.zeros(4, 1, 2, 2), labels)[1]
        with seeded(seed): want += soft(torch.zeros(4, 1, 2, 2), labels)[1].dense()
        count += one_hot(ids, 4)
    assert ((count-want).abs() < 5*(want*(1-want/400)).sqrt()+1).all()


@pytest.mark.parametrize('call,message', [
    (lambda: Mixing(10, mixup=-1.), 'mixup must not be negative, got -1'),
    (lambda: Mixing(10, cutmix=-1.), 'cutmix must not be negative, got -1'),
    (lambda: Mixing(10, smoothing=1.), r'smoothing must be in \[0, 1\), got 1.0'),
    (lambda: Mixing(10)(torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])),
     'batch_size must be even for mixing, got 3'),
    (lambda: Batches(digits().train, 0), 'batch_size must be positive'),
    (lambda: Batches(digits().train, 9, world=2), 'a multiple of the 2 ranks, got 9'),
    (lambda: Batches(digits().train, 4096, train=True),
     'batch_size must be at most the 719 rows of the data set, got 4096'),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message): call()
