"softnce.vision.images, softnce.vision.batches, softnce.vision.models and softnce.vision.recipes: layouts as delivered, splits, batches as a function of (seed, epoch, number), mixing, weights."
import csv, io, pickle, zipfile
from collections import Counter
import numpy as np, pytest, torch
pytest.importorskip('sklearn'); pytest.importorskip('timm')
from PIL import Image
from softnce.vision.batches import Batches, Mixing, seeded, transforms
from softnce.vision.images import ImageSet, digits, load, stratified
from softnce.losses import InfoNCE
from softnce.vision.models import SmallCNN, load_weights, make_head, make_model
from softnce.noise import ClosedForm, Fresh, Queue
from softnce.vision.recipes import LOSSES, loaders, make_loss, recipe, settings, train_images
from softnce.targets import SparseTargets, one_hot


def jpeg(seed, size=64, mode='RGB', ending='JPEG'):
    "Bytes of a made-up image; greyscale with mode L."
    g = np.random.default_rng(seed)
    x = np.kron(g.integers(0, 255, (4, 4) if mode == 'L' else (4, 4, 3)), np.ones((size//4, size//4) if mode == 'L' else (size//4, size//4, 1))).astype('uint8')
    out = io.BytesIO()
    Image.fromarray(x, mode).save(out, ending)
    return out.getvalue()


def tiny(root, classes=('n03', 'n01', 'n02'), train=10, val=4):
    "Tiny ImageNet's layout with made-up images: unsorted wnids, some files greyscale, val labels in a text file, boxes and an unlabelled test folder."
    top, said, n = root/'tiny-imagenet-200', [], 0
    def put(name, data): f = top/name; f.parent.mkdir(parents=True, exist_ok=True); f.write_bytes(data if isinstance(data, bytes) else data.encode())
    for k, w in enumerate(classes):
        for i in range(train): put(f'train/{w}/images/{w}_{i}.JPEG', jpeg(100*k+i, mode='L' if i == 3 else 'RGB'))
        put(f'train/{w}/{w}_boxes.txt', '')
        for i in range(val):
            put(f'val/images/val_{n}.JPEG', jpeg(900+n))
            said.append(f'val_{n}.JPEG\t{w}\t0\t0\t63\t63'); n += 1
        put(f'test/images/test_{k}.JPEG', jpeg(k))
    put('val/val_annotations.txt', '\n'.join(said[::-1])+'\n')
    put('wnids.txt', '\n'.join(classes)+'\n')
    put('words.txt', 'n01\tgoldfish, Carassius auratus\nn02\ttoad\n')
    return root


def zipped(folder, path):
    with zipfile.ZipFile(path, 'w') as z:
        for f in sorted(folder.rglob('*')):
            z.write(f, f.relative_to(folder.parent))
    return path


def tree(root, parts, classes='abc', each=6, size=48):
    for p in parts:
        for k, c in enumerate(classes):
            (root/p/c).mkdir(parents=True, exist_ok=True)
            for i in range(each): (root/p/c/f'{i}.png').write_bytes(jpeg(hash((len(p), k, i)) % 2**31, size, ending='PNG'))
    return root


def cifar(root, rows=60, classes=5):
    "Pickles as in cifar-100-python, with class ids that a fifth of the rows share."
    folder, g = root/'cifar-100-python', np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, n in (('train', rows), ('test', rows//3)):
        raw = dict(data=g.integers(0, 255, (n, 3072), dtype=np.uint8), fine_labels=[i % classes for i in range(n)], coarse_labels=[0]*n, filenames=[f'{i}.png' for i in range(n)], batch_label=name)
        (folder/name).write_bytes(pickle.dumps(raw, protocol=2))
    (folder/'meta').write_bytes(pickle.dumps(dict(fine_label_names=[f'class {k}' for k in range(classes)], coarse_label_names=['all'])))
    return root


# ---- splits

@pytest.mark.parametrize('seed', [0, 1])
def test_digits_are_disjoint_complete_and_stratified(seed):
    from sklearn.datasets import load_digits
    data, parts = load_digits(), digits(seed).parts.values()
    rows = torch.cat([p.rows for p in parts])
    assert rows.sort().values.tolist() == list(range(1797))
    for part in parts:
        x = torch.stack([part.image(i) for i in range(len(part))])
        assert x.shape[1:] == (1, 8, 8) and x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
        assert np.array_equal((16*x[:, 0]).numpy(), data.images[part.rows]) and part.labels.tolist() == data.target[part.rows].tolist()
        share = torch.bincount(part.labels, minlength=10)/len(part)
        assert (share - torch.bincount(torch.tensor(data.target))/1797).abs().max() < 1.5/len(part)
    again, other = digits(seed), digits(seed+7)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(parts, again.parts.values())) and not torch.equal(again.test.rows, other.test.rows)


@pytest.mark.parametrize('valid,test', [(0, .4), (.2, 0), (.5, .5), (-.1, .4)])
def test_split_shares_are_checked(valid, test):
    with pytest.raises(ValueError, match='valid and test must be positive'): digits(valid=valid, test=test)


def test_stratified_leaves_something_of_every_class():
    labels = torch.tensor([0]*40 + [1]*2 + [2])
    kept, drawn = stratified(labels, .25, seed=3)
    assert sorted(torch.cat([kept, drawn]).tolist()) == list(range(43))
    assert Counter(labels[drawn].tolist()) == {0: 10, 1: 1} and 2 in labels[kept]
    with pytest.raises(ValueError, match='share must be in'): stratified(labels, 0.)


@pytest.mark.parametrize('form', ['folder', 'folder above', 'zip', 'zip in a folder', 'zip without a top folder'])
def test_tiny_imagenet_as_delivered(form, tmp_path):
    top = tiny(tmp_path/'a')/'tiny-imagenet-200'
    if 'zip' in form: (tmp_path/'z').mkdir(); path = zipped(top, tmp_path/'z'/'tiny-imagenet-200.zip')
    if form == 'zip without a top folder':
        with zipfile.ZipFile(path, 'w') as z:
            for f in top.rglob('*'): z.write(f, f.relative_to(top))
    root = {'folder': top, 'folder above': tmp_path/'a', 'zip in a folder': tmp_path/'z'}.get(form) or path
    s = load('tiny_imagenet', root, valid=.2)
    assert {n: len(p) for n, p in s.parts.items()} == dict(train=24, valid=6, test=12) and s.size == 64
    assert s.classes == ['goldfish, Carassius auratus', 'toad', 'n03'] # the order of the sorted wnids n01, n02, n03
    assert not set(s.train.rows.tolist()) & set(s.valid.rows.tolist()) and torch.bincount(s.valid.labels).tolist() == [2, 2, 2]
    for part in (s.train, s.valid):
        for i in range(len(part)): assert f'n0{part.labels[i]+1}_' in part.name(i)
    truth = dict(line.split('\t')[:2] for line in (top/'val'/'val_annotations.txt').read_text().splitlines())
    for i in range(12):
        assert truth[s.test.name(i).rsplit('/', 1)[1]] == f'n0{s.test.labels[i]+1}'
        assert s.test.image(i).mode == 'RGB' and s.test.image(i).size == (64, 64)
    assert all(s.train.image(i).mode == 'RGB' for i in range(24)) # greyscale files among them
    again = load('tiny_imagenet', root, valid=.2)
    assert torch.equal(again.valid.rows, s.valid.rows) and not torch.equal(load('tiny_imagenet', root, valid=.2, seed=1).valid.rows, s.valid.rows)


def test_imagenet_and_folders(tmp_path):
    both = load('imagenet', tree(tmp_path/'both', ['train', 'val']), valid=.34)
    assert both.classes == list('abc') and {n: len(p) for n, p in both.parts.items()} == dict(train=12, valid=6, test=18)
    assert all(both.test.name(i).startswith('val/') for i in range(18)) and all(both.valid.name(i).startswith('train/') for i in range(6))
    three = load('folder', tree(tmp_path/'three', ['train', 'valid', 'test']))
    assert [{three.parts[n].name(i).split('/')[0] for i in range(18)} for n in ('train', 'valid', 'test')] == [{'train'}, {'valid'}, {'test'}]
    plain = load('folder', tree(tmp_path/'plain', ['.'], each=20))
    assert [len(p) for p in plain.parts.values()] == [48, 6, 6] and sorted(torch.cat([p.rows for p in plain.parts.values()]).tolist()) == list(range(60))
    (tmp_path/'both'/'val'/'d').mkdir(); (tmp_path/'both'/'val'/'d'/'x.png').write_bytes(jpeg(0, 48, ending='PNG'))
    with pytest.raises(ValueError, match=r"classes without training images: \['d'\]"): load('imagenet', tmp_path/'both')


def test_cifar100_folder(tmp_path):
    root = cifar(tmp_path)
    raw = pickle.loads((root/'cifar-100-python'/'train').read_bytes())
    for where in (root, root/'cifar-100-python'):
        s = load('cifar100', where, valid=.25)
        assert [len(p) for p in s.parts.values()] == [45, 15, 20] and s.classes == [f'class {k}' for k in range(5)]
        i, row = 7, int(s.train.rows[7])
        assert np.array_equal(np.asarray(s.train.image(i)).transpose(2, 0, 1).reshape(-1), raw['data'][row]) and s.train.labels[i] == raw['fine_labels'][row]
    class Evil:
        def __reduce__(self): return print, ('run',)
    (root/'cifar-100-python'/'meta').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match='builtins.print is not allowed'): load('cifar100', root)


def test_soft_labels(tmp_path):
    root, g = tree(tmp_path/'images', ['.'], each=10), np.random.default_rng(0)
    names = sorted(str(p.relative_to(root)) for p in root.rglob('*.png'))
    probs = g.dirichlet([1, 1, 1, 1], 30)
    np.save(tmp_path/'p.npy', probs)
    s = load('soft_labels', root, tmp_path/'p.npy')
    assert s.num_classes == 4 and sum(len(p) for p in s.parts.values()) == 30
    for part in s.parts.values():
        for i in range(len(part)): np.testing.assert_allclose(part.target(i), probs[names.index(part.name(i))], rtol=1e-6)
    def table(rows, header=('file', 'split', 'cat', 'dog', 'cow', 'pig')):
        with open(tmp_path/'p.csv', 'w', newline='') as f: csv.writer(f).writerows([header, *rows])
        return tmp_path/'p.csv'
    part = ['train']*20+['valid']*4+['test']*6
    s = load('soft_labels', root, table([[n, w, *p] for n, w, p in zip(names, part, probs)]))
    assert s.classes == ['cat', 'dog', 'cow', 'pig'] and [len(p) for p in s.parts.values()] == [20, 4, 6] and s.test.name(0) == names[24]
    x, t = next(iter(Batches(s.train, 6, True, transforms(32, True), s.mean, s.std, mixing=Mixing(4, smoothing=.2))))
    assert x.shape == (6, 3, 32, 32) and t.shape == (6, 4) and t.min() >= .05 - 1e-6
    torch.testing.assert_close(t.sum(1), torch.ones(6))
    probs[3] *= 2
    np.save(tmp_path/'p.npy', probs)
    with pytest.raises(ValueError, match=r'sum to 1: row 3 \(a/3.png\) sums to 2; 1 such rows'): load('soft_labels', root, tmp_path/'p.npy')
    with pytest.raises(ValueError, match='one row per image, 30, got 29'): np.save(tmp_path/'p.npy', probs[1:]), load('soft_labels', root, tmp_path/'p.npy')
    with pytest.raises(ValueError, match='name files that are not below .*: nope.png'): load('soft_labels', root, table([['nope.png', 'train', 1, 0, 0, 0]]))


def test_reduced_sets_keep_the_reported_part():
    s, full = load('digits', classes=4, limit=5), load('digits')
    assert s.num_classes == 4 and torch.bincount(s.train.labels).tolist() == [5]*4
    assert torch.equal(s.test.rows, full.test.rows[full.test.labels < 4]) and set(s.train.rows.tolist()) < set(full.train.rows.tolist())
    for bad in (1, 11):
        with pytest.raises(ValueError, match=rf'classes must be in \[2, 10\], got {bad}'): load('digits', classes=bad)


@pytest.mark.parametrize('name,words', [('imagenet', 'ImageNet-1k is not at .*145 GB; .*image-net.org'), ('tiny_imagenet', 'Tiny ImageNet is not at .*237 MB; .*cs231n'),
                                        ('cifar100', 'CIFAR-100 is not at .*161 MB; .*toronto'), ('folder', 'a folder of images is not at')])
def test_missing_data_says_what_and_where_from(name, words, tmp_path):
    with pytest.raises(FileNotFoundError, match=words): load(name, tmp_path/'nothing')


def test_unknown_names():
    with pytest.raises(ValueError, match="name must be digits, cifar100, tiny_imagenet, imagenet, folder or soft_labels, got 'mnist'"): load('mnist')
    with pytest.raises(ValueError, match='targets must have one row per image, 3, got 2'): ImageSet(torch.rand(3, 1, 2, 2), torch.zeros(2))


def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch):
    import torchvision.datasets.utils as utils
    def fake(url, root, filename=None, md5=None):
        import hashlib, pathlib
        p = pathlib.Path(root); p.mkdir(exist_ok=True, parents=True); (p/'tiny-imagenet-200.zip').write_bytes(b'half a file')
        if hashlib.md5(b'half a file').hexdigest() != md5: raise RuntimeError('File not found or corrupted.')
    monkeypatch.setattr(utils, 'download_url', fake)
    with pytest.raises(RuntimeError, match='corrupted'): load('tiny_imagenet', tmp_path/'new', download=True)


# ---- batches

@pytest.fixture(scope='module')
def small(tmp_path_factory): return load('tiny_imagenet', tiny(tmp_path_factory.mktemp('tiny'), train=14))


def made(data, **kw): return Batches(data.train, kw.pop('batch_size', 8), True, transforms(32, True), data.mean, data.std, .5, Mixing(3), **kw)


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
    import random
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    next(iter(made(small)))
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1] and torch.equal(torch.get_rng_state(), before[2])
    with seeded(1, 2): a = torch.rand(2), np.random.rand(), random.random()
    with seeded(1, 2): b = torch.rand(2), np.random.rand(), random.random()
    with seeded(2, 1): c = torch.rand(2)
    assert torch.equal(a[0], b[0]) and a[1:] == b[1:] and not torch.equal(a[0], c)


def test_training_is_whole_batches_and_evaluation_all_rows_in_order():
    s = digits()
    epoch = lambda n: (b.seek(n), list(b))[1]
    b = Batches(s.train, 100, True)
    rows = lambda batches: Counter((bytes((16*v).to(torch.uint8).numpy()), int(k)) for x, y in batches for v, k in zip(x, y))
    mine = rows([(torch.stack([s.train.image(i) for i in range(len(s.train))]), s.train.labels)])
    assert [len(y) for _, y in epoch(0)] == [100]*7 and not rows(epoch(0)) - mine
    assert not torch.equal(epoch(0)[0][1], epoch(1)[0][1])
    assert torch.equal(torch.cat([y for _, y in Batches(s.valid, 100)]), s.valid.labels)


def test_ranks_share_each_batch(small):
    whole = Batches(small.train, 8, True, transforms(32, True), small.mean, small.std)
    halves = [Batches(small.train, 8, True, transforms(32, True), small.mean, small.std, rank=r, world=2) for r in (0, 1)]
    for (x, y), (a, i), (b, j) in zip(whole, *halves):
        assert torch.equal(x[0::2], a) and torch.equal(x[1::2], b) and torch.equal(y[0::2], i) and torch.equal(y[1::2], j)
    lams = [next(iter(made(small, rank=r, world=2)))[1].weights[0, 0] for r in (0, 1)]
    assert lams[0] == lams[1] and 0 < lams[0] < 1 # one lam for the global batch


def test_normalisation_and_evaluation_transform(small):
    x, y = next(iter(Batches(small.test, 12, transform=transforms(64), mean=small.mean, std=small.std)))
    for i in range(12):
        want = (torch.tensor(np.asarray(small.test.image(i))).permute(2, 0, 1)/255-torch.tensor(small.mean)[:, None, None])/torch.tensor(small.std)[:, None, None]
        torch.testing.assert_close(x[i], want, rtol=0, atol=1e-5)
    assert torch.equal(y, small.test.labels)


def test_unreadable_images_are_named_counted_and_bounded(tmp_path):
    root = tree(tmp_path, ['train', 'val'], each=20)
    bad = [root/'train'/'a'/'3.png', root/'train'/'b'/'4.png', root/'val'/'c'/'5.png']
    for p, data in zip(bad, (b'', b'not an image', bad[2].read_bytes()[:200])): p.write_bytes(data)
    s = load('imagenet', root)
    batches = Batches(s.train, 10, True, transforms(32, True), s.mean, s.std, max_corrupt=.1)
    with pytest.warns(UserWarning, match=r'cannot be read, replaced: train/a/3.png \(UnidentifiedImageError\)'): epoch = list(batches)
    assert all(len(y) == 10 for _, y in epoch)
    batches.seek(1); list(batches)
    held = [n for n in (s.train.name(i) for i in range(len(s.train))) if n in ('train/a/3.png', 'train/b/4.png')]
    assert sorted(n.split(' ')[0] for n in batches.corrupt) == sorted(held) and held
    with pytest.warns(UserWarning, match='left out: val/c/5.png'): test = list(Batches(s.test, 20, transform=transforms(32), mean=s.mean, std=s.std, max_corrupt=.1))
    assert sum(len(y) for _, y in test) == 59
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r'1 of 60 images cannot be read, more than max_corrupt=0.01: val/c/5.png'):
        list(Batches(s.test, 20, transform=transforms(32), mean=s.mean, std=s.std))
    for p in (root/'train').rglob('*.png'): p.write_bytes(b'')
    with pytest.raises(ValueError, match='images in a row cannot be read'): next(iter(batches))


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
    for seed in range(6):
        with seeded(seed): theirs, dense = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=7)(images.clone(), labels.clone())
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
    mixing = Mixing(3, .8, 0., 0.)
    with seeded(0): lams = torch.stack([mixing(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]))[1].weights[0, 0] for _ in range(2000)])
    assert abs(lams.mean()-.5) < .04 and abs(lams.var()-1/(4*(2*.8+1))) < .01  # Beta(a, a): mean 1/2, variance 1/(4(2a+1))


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
    (lambda: Mixing(10)(torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])), 'batch_size must be even for mixing, got 3'),
    (lambda: Batches(digits().train, 0), 'batch_size must be positive'),
    (lambda: Batches(digits().train, 9, world=2), 'a multiple of the 2 ranks, got 9'),
    (lambda: Batches(digits().train, 4096, train=True), 'batch_size must be at most the 719 rows of the data set, got 4096'),
    (lambda: make_head(8, 0), 'num_classes must be at least 1, got 0'),
    (lambda: make_head(8, 2, hidden=0), 'hidden must be at least 1, got 0'),
    (lambda: SmallCNN(2)(torch.rand(2, 3, 8, 8)), r'images must be \(N, 1, H, W\), got \(2, 3, 8, 8\)'),
    (lambda: make_model('resnet_9000', 2), "name must be small_cnn, vit_b16, vit_tiny, resnet18_64 or a model of timm's, got 'resnet_9000'"),
    (lambda: make_loss('mse'), 'loss must be one of nll, soft_target_cross_entropy'),
    (lambda: make_loss('info_nce', torch.tensor([0, 1]), 2, noise='gauss'), "noise must be one of in_batch, queue, closed_form, fresh, got 'gauss'"),
    (lambda: recipe('mnist', 'nll'), 'recipe must be imagenet, tiny_imagenet, cifar100, small or digits'),
    (lambda: settings(None, 'digits', 'nll', dict(epochs='many')), "epochs must be like 30 of the recipe, got 'many'"),
    (lambda: settings(None, 'digits', 'nll', dict(epochs=True)), 'epochs must be like 30 of the recipe, got True'),
    (lambda: settings(None, 'digits', 'nll', dict(momentum=.9)), 'momentum is no setting of a recipe'),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message): call()


# ---- models

@pytest.mark.parametrize('bn', [False, True])
def test_head_has_three_layers_or_one(bn):
    layers = make_head(5, 3, 7, bn)
    linear = [m for m in layers if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(5, 7), (7, 7), (7, 3)]
    assert isinstance(make_head(5, 3, None), torch.nn.Linear)
    h, (a, b, c), gelu = torch.randn(4, 5), linear, lambda v: v*.5*(1+torch.erf(v/2**.5))
    with torch.no_grad():
        want = gelu(gelu(h@a.weight.T+a.bias)@b.weight.T+b.bias)@c.weight.T+c.bias
        if bn: want = (want-want.mean(0))/(want.var(0, unbiased=False)+1e-5).sqrt()
        torch.testing.assert_close(layers(h), want)


def test_models_end_in_logits():
    for name, size, channels in (('small_cnn', 8, 1), ('resnet18_64', 64, 3), ('vit_tiny', 64, 3), ('resnet10t', 32, 3)):
        model = make_model(name, 6, size, channels, hidden=16)
        assert model(torch.rand(2, channels, size, size)).shape == (2, 6)
    linear = make_model('vit_tiny', 6, 64, hidden=None)
    assert isinstance(linear.head, torch.nn.Linear) and linear.head.out_features == 6


def test_weights_from_a_local_checkpoint_with_other_position_embeddings(tmp_path):
    "A made-up MAE-like checkpoint of another size: blocks are copied, position embeddings interpolated, decoder and head left out."
    import timm
    other = timm.create_model('vit_tiny_patch16_224', img_size=96, num_classes=9, depth=2)
    for p in other.parameters(): torch.nn.init.normal_(p, std=.5)
    state = other.state_dict() | {'mask_token': torch.zeros(1, 1, 4), 'decoder_pred.weight': torch.zeros(2, 2)}
    torch.save(dict(model=state, epoch=3), tmp_path/'mae.pth')
    model = timm.create_model('vit_tiny_patch16_224', img_size=160, num_classes=4, depth=2)
    head = model.head.weight.clone()
    assert load_weights(model, tmp_path/'mae.pth') == [] and torch.equal(model.head.weight, head)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in other.state_dict().items() if k.startswith('blocks'))
    assert model.pos_embed.shape == (1, 101, 192) and torch.equal(model.pos_embed[:, 0], other.pos_embed[:, 0])
    grid = lambda m, n: m.pos_embed[:, 1:].reshape(1, n, n, 192).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(grid(other, 6), (10, 10), mode='bicubic', antialias=True)
    torch.testing.assert_close(grid(model, 10), want, rtol=0, atol=1e-5)
    torch.save({'a': torch.zeros(1)}, tmp_path/'other.pth')
    with pytest.raises(ValueError, match="of the model's .* parameters; missing: cls_token"): load_weights(model, tmp_path/'other.pth')


def test_published_weights_that_cannot_be_had_say_so(monkeypatch):
    import timm
    def refuse(*a, **k): raise OSError('no network')
    monkeypatch.setattr(timm, 'create_model', lambda *a, **k: refuse() if k.get('pretrained') else pytest.fail('not asked for weights'))
    with pytest.raises(FileNotFoundError, match=r'weights of vit_base_patch16_224.mae cannot be had \(no network\): .* pretrained='): make_model('vit_b16', 5, pretrained=True)


# ---- recipes

def test_table_3():
    want = dict(weight_decay=.05, layer_decay=.65, batch_size=1024, warmup_epochs=5, epochs=100, smoothing=.1, mixup=.8, cutmix=1., auto_augment='rand-m9-mstd0.5-inc1', hidden=4096, drop_path=.1)
    rates = dict(imagenet=(.0003, .00055, .00055), tiny_imagenet=(.0003, .00025, .00025), cifar100=(.0003, .0003, .00055))
    for name, (ce, nce, soft) in rates.items():
        s = recipe(name, 'soft_target_info_nce')
        assert {k: s[k] for k in want} == want and s['model'] == 'vit_b16' and s['base_lr'] == soft
        assert recipe(name, 'soft_distribution_info_nce')['base_lr'] == recipe(name, 'info_nce')['base_lr'] == nce
        assert recipe(name, 'nll')['base_lr'] == recipe(name, 'soft_target_cross_entropy')['base_lr'] == ce
        assert [recipe(name, 'nll')[k] for k in ('smoothing', 'mixup', 'cutmix')] == [0, 0, 0]


def test_explicit_settings_come_before_the_recipes():
    s = settings('tiny_imagenet', 'digits', 'nll', dict(mixup=1, epochs=None, layer_decay='none', hidden=0, pretrained='weights.pth'))
    assert s['mixup'] == 1. and isinstance(s['mixup'], float) and s['epochs'] == 100 and s['layer_decay'] is None and s['hidden'] == 0 and s['pretrained'] == 'weights.pth'
    assert settings(None, 'folder', 'nll', {})['model'] == 'resnet18_64' and settings(None, 'digits', 'nll', {})['model'] == 'small_cnn'


def test_losses_by_name():
    labels = torch.tensor([0, 0, 0, 1])
    for name, kind in LOSSES.items():
        loss = make_loss(name, labels, 2)
        assert type(loss) is kind
        if isinstance(loss, InfoNCE): torch.testing.assert_close(loss.noise_probs, torch.tensor([.75, .25]))
    sources = {n: make_loss('soft_target_info_nce', labels, 2, n, 17, .8, .1).noise_samples for n in ('in_batch', 'queue', 'fresh', 'closed_form')}
    assert sources['in_batch'] is None and isinstance(sources['queue'], Queue) and sources['queue'].size == 17
    assert isinstance(sources['fresh'], Fresh) and (sources['fresh'].size, sources['fresh'].lam, sources['fresh'].epsilon) == (17, .8, .1) and isinstance(sources['closed_form'], ClosedForm)


def test_every_loss_sees_the_same_images():
    data = load('digits')
    first = {}
    for loss in LOSSES:
        x, t = next(iter(loaders(data, settings(None, 'digits', loss, {}), loss, seed=4)['train']))
        first[loss] = x
        assert (t.ndim == 1 and not t.is_floating_point()) if loss in ('nll', 'info_nce') else isinstance(t, SparseTargets)
    assert all(torch.equal(x, first['nll']) for x in first.values())


@pytest.mark.slow
def test_imagenet_recipe_takes_a_step(tmp_path):
    "ViT-B/16 at 224 pixels with every setting of Table 3 but the batch, the weights and the precision, on three made-up classes."
    data = dict(name='imagenet', root=tree(tmp_path/'data', ['train', 'val'], each=4, size=256), valid=.25)
    s = settings(None, 'imagenet', 'soft_target_info_nce', dict(batch_size=8, epochs=1, warmup_epochs=0, pretrained=False, precision='fp32', compile=False)) | dict(lr=1e-5)
    out = train_images(data, s, dict(name='soft_target_info_nce'), tmp_path/'run', device='cpu')
    assert out['weights'] > 100e6 and out['test'][0].shape == (12, 3) and np.isfinite(out['last']['train_loss']) and out['last']['epoch'] == 1


@pytest.mark.parametrize('kind', ['cifar100', 'tiny_imagenet'])
def test_a_small_training_from_files(kind, tmp_path):
    root = cifar(tmp_path/'d') if kind == 'cifar100' else tiny(tmp_path/'d')
    s = settings('small', kind, 'soft_target_info_nce', dict(model='small_cnn', image_size=32, batch_size=8, epochs=1, warmup_epochs=0, precision='fp32', erase=.25)) | dict(lr=1e-3)
    out = train_images(dict(name=kind, root=root, valid=.2), s, dict(name='soft_target_info_nce'), tmp_path/'run', device='cpu')
    assert out['test'][0].shape == ((20, 5) if kind == 'cifar100' else (12, 3)) and not out['corrupt']
    again = train_images(dict(name='nothing'), s, dict(name='soft_target_info_nce'), tmp_path/'run', device='cpu')  # finished: read back
    assert torch.equal(again['test'][0], out['test'][0])
