"softnce.vision.images: layouts as delivered, in three parts."
import csv, hashlib, pickle, shutil, warnings, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('sklearn')
from pictures import cifar, jpeg, put, tiny, tree, zipped
from softnce.vision.batches import Batches, Mixing, transforms
from softnce.vision.images import cifar100, digits, folder, load, soft_labels
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


def alike(a, b): # the same images with the same classes in the same order
    def files(part): return [n.split('/')[-1] for n in names(part)]
    pairs = list(zip(a.parts.values(), b.parts.values()))
    return a.classes == b.classes and all(torch.equal(x.labels, y.labels) and files(x) == files(y) for x, y in pairs)


def test_a_zip_file_of_a_mac_and_its_unpacked_folder(tmp_path):
    top = tiny(tmp_path/'a')/'tiny-imagenet-200'
    want = load('tiny_imagenet', tmp_path/'a')
    for f in sorted(top.rglob('*')): # as Archive Utility unpacks and packs them
        double = f.relative_to(tmp_path/'a').with_name(f'._{f.name}')
        if f.is_file(): put(tmp_path/'b'/'__MACOSX'/double, b'\0\5\x16\7\xff\xfe')
    shutil.copytree(top, tmp_path/'b'/'tiny-imagenet-200')
    put(tmp_path/'b'/'tiny-imagenet-200'/'train'/'.DS_Store', b'x')
    with zipfile.ZipFile(tmp_path/'m.zip', 'w') as z:
        for f in sorted((tmp_path/'b').rglob('*')): z.write(f, f.relative_to(tmp_path/'b'))
    for root in (tmp_path/'b', tmp_path/'m.zip'): assert alike(load('tiny_imagenet', root), want)


@pytest.mark.parametrize('change', ['sorted', 'sorted below images', 'no images folders', 'twice', 'no wnids'])
def test_tiny_imagenet_as_it_goes_round(change, tmp_path):
    top = tiny(tmp_path/'a', classes=('n00000003', 'n00000001', 'n00000002'))/'tiny-imagenet-200'
    put(top/'words.txt')
    want, root = load('tiny_imagenet', tmp_path/'a'), tmp_path/'b'
    copy = root/'tiny-imagenet-200'/'tiny-imagenet-200' if change == 'twice' else root/'tiny-imagenet-200'
    shutil.copytree(top, copy)
    if change.startswith('sorted'):
        for line in (copy/'val'/'val_annotations.txt').read_text().splitlines():
            name, wnid = line.split('\t')[:2]
            put(copy/'val'/wnid/('images' if 'below' in change else '.')/name, (copy/'val'/'images'/name).read_bytes())
        shutil.rmtree(copy/'val'/'images'); (copy/'val'/'val_annotations.txt').unlink()
    if change == 'no images folders':
        for f in list((copy/'train').rglob('*.JPEG')): f.rename(f.parent.parent/f.name)
    if change == 'no wnids': (copy/'wnids.txt').unlink()
    got = load('tiny_imagenet', root)
    assert sizes(got) == sizes(want) and got.classes == want.classes and got.note == 'the official validation part'
    if not change.startswith('sorted'): assert alike(got, want)
    def truth(s): return {s.test.name(i).split('/')[-1]: s.classes[s.test.labels[i]] for i in range(12)}
    assert truth(got) == truth(want)


@pytest.mark.parametrize('change,message', [
    ('train/n01', r'the folders of train/ must be the classes of wnids.txt.*differ: n01'),
    ('val', 'no valid part of Tiny ImageNet: found .*; expected .*cs231n'),
    ('val/val_annotations.txt', '12 images without a folder a class: .*val/images/val_0'),
])
def test_half_of_tiny_imagenet_is_refused(change, message, tmp_path):
    path = tiny(tmp_path)/'tiny-imagenet-200'/change
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if change == 'train/n01': # its validation images too, else these are the fault
        lines = (tmp_path/'tiny-imagenet-200'/'val'/'val_annotations.txt')
        lines.write_text(lines.read_text().replace('n01', 'n02'))
    with pytest.raises(ValueError, match=message): load('tiny_imagenet', tmp_path)


def test_another_data_set_is_not_tiny_imagenet(tmp_path):
    with pytest.raises(ValueError, match='must be the classes of wnids.txt, n01443537 and so on; .* differ: a, b, c'):
        load('tiny_imagenet', tree(tmp_path, ['train', 'val']))
    put(tmp_path/'data'/'train-00000-of-00001.parquet', b'PAR1')
    with pytest.raises(FileNotFoundError, match='Tiny ImageNet is not at .*, which holds 1 .parquet'):
        load('tiny_imagenet', tmp_path/'data')


def test_imagenet_of_kaggle(tmp_path):
    top = tmp_path/'ILSVRC'/'Data'/'CLS-LOC'
    tree(top, ['train'], ('n01', 'n02'), each=10)
    for i in range(4): put(top/'val'/f'ILSVRC2012_val_{i:08}.JPEG', jpeg(i))
    put(top/'test'/'ILSVRC2012_test_00000001.JPEG', jpeg(9))
    put(tmp_path/'ILSVRC'/'Annotations'/'CLS-LOC'/'val'/'x.xml', '<a/>')
    with pytest.raises(ValueError, match='4 images without a folder a class: .*ILSVRC2012_val'):
        load('imagenet', tmp_path)
    rows = [f'ILSVRC2012_val_{i:08},n0{1+i % 2} 1 2 3 4 n0{1+i % 2} 5 6 7 8' for i in range(4)]
    put(tmp_path/'LOC_val_solution.csv', 'ImageId,PredictionString\n'+'\n'.join(rows[::-1]))
    with pytest.warns(UserWarning, match='left out: 1 images of the test part, without classes'):
        s = load('imagenet', tmp_path)
    assert sizes(s) == dict(train=18, valid=2, test=4) and s.test.labels.tolist() == [0, 1, 0, 1]
    assert s.note == 'its validation folder' and s.test.image(0).size == (64, 64)


# ---- folders as people have them

@pytest.mark.parametrize('packed', [False, True])
def test_what_a_folder_leaves_out_is_named(packed, tmp_path):
    root = tree(tmp_path/'pets', ['train', 'val'], each=20)
    (root/'train'/'d').mkdir()
    for name in ('train/a/x.heic', 'extra/a/1.png', 'train/y.png', 'train/a/notes.txt', 'README.md',
                 'train/.ipynb_checkpoints/z/1.png'):
        put(root/name, jpeg(1, ending='PNG'))
    where = zipped(root, tmp_path/'pets.zip') if packed else root
    with pytest.warns(UserWarning, match='left out') as caught: s = folder(where)
    top = 'pets/' if packed else ''
    assert s.left_out == ('extra/ (1 images)', f'1 images in no class folder: {top}train/y.png',
                          f'folders without images: {top}train/d', f'1 files that are no images: {top}train/a/x.heic')
    assert len(caught) == 1 and all(words in str(caught[0].message) for words in (str(where), *s.left_out))
    assert s.classes == list('abc') and sizes(s) == dict(train=54, valid=6, test=60)


def test_a_folder_that_is_read_whole_says_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert folder(tree(tmp_path, ['train', 'val'])).left_out == ()


@pytest.mark.parametrize('files,message', [
    (['cat.0.jpg', 'dog.0.jpg'], '2 images without a folder a class'),
    (['pets.zip'], r'has no images: it holds 1 .zip \(pets.zip\)'),
    ([], 'has no images: it holds no file; expected'),
    (['cat/1.npy', 'dog/1.npy'], r'has no images: it holds 2 .npy \(cat/1.npy, dog/1.npy\)'),
    (['cat/1.jpg', 'cat/2.jpg'], 'all 2 images are in one class, cat/|2 images without a folder a class'),
    (['cat/1.jpg', 'dog/1.jpg'], "no images in valid and test; the parts hold .*'train': 2"),
])
def test_folders_that_are_no_data_set_are_refused(files, message, tmp_path):
    (tmp_path/'d').mkdir()
    for f in files: put(tmp_path/'d'/f, jpeg(1))
    with pytest.raises(ValueError, match=message): folder(tmp_path/'d')


def test_one_folder_cannot_be_two_parts(tmp_path):
    root = tree(tmp_path, ['train'], each=10)
    (root/'val').symlink_to(root/'train', target_is_directory=True)
    with pytest.raises(ValueError, match='val/a and train/a are the same folder, in two parts'): folder(root)


def test_a_home_folder_and_a_relative_one(tmp_path, monkeypatch):
    tree(tmp_path/'pets', ['train', 'val'])
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.chdir(tmp_path)
    assert folder('~/pets').test.image(0).size == folder('pets').test.image(0).size == (48, 48)


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
    with pytest.raises(ValueError, match='meta of CIFAR-100 cannot be read .*builtins.print is not allowed'):
        load('cifar100', root)


def as_bytes(value): # keys and names as Python 2 leaves them
    if isinstance(value, dict): return {k.encode(): as_bytes(v) for k, v in value.items()}
    return [v.encode() if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize('dump', [
    lambda v: pickle.dumps(v, protocol=5), lambda v: pickle.dumps(as_bytes(v), protocol=2),
    lambda v: pickle.dumps(as_bytes(v), protocol=4),
    lambda v: pickle.dumps({k: np.array(x) if k == 'fine_labels' else x for k, x in v.items()}),
    lambda v: pickle.dumps({k: x.reshape(-1, 3, 32, 32) if k == 'data' else x for k, x in v.items()}),
])
@pytest.mark.parametrize('packed', [False, True])
def test_cifar100_pickled_again(dump, packed, tmp_path):
    want = load('cifar100', cifar(tmp_path/'a'))
    root = cifar(tmp_path/'b', dump=dump)
    if packed: root = zipped(root/'cifar-100-python', tmp_path/'b.zip')
    got = cifar100(root)
    assert got.classes == want.classes
    for a, b in zip(want.parts.values(), got.parts.values()):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.targets, b.targets) and np.array_equal(a.images, b.images)


@pytest.mark.parametrize('name,raw,message', [
    ('train', b'', r'train of CIFAR-100 cannot be read \(EOFError'),
    ('train', b'\x80\x05\x95half', 'train of CIFAR-100 cannot be read'),
    ('train', [1, 2], 'train of CIFAR-100 must hold a dict, got list'),
    ('test', dict(data=np.zeros((4, 3072), 'u1'), labels=[0]*4), "test of CIFAR-100 has .*, not .*fine_labels"),
    ('train', dict(data=np.zeros((4, 32, 32, 3), 'u1'), fine_labels=[0]*4),
     r'must be bytes \(N, 3072\), got uint8 \(4, 32, 32, 3\)'),
    ('train', dict(data=np.zeros((4, 3072)), fine_labels=[0]*4), 'must be bytes .* got float64'),
    ('train', dict(data=np.zeros((4, 3072), 'u1'), fine_labels=[9]*4), 'fine_labels of train must be class ids'),
    ('train', dict(data=np.zeros((4, 3072), 'u1'), fine_labels=[0]*3), 'fine_labels of train must be .* one a row'),
    ('meta', dict(label_names=['cat']), 'meta of CIFAR-100 has no fine_label_names'),
])
def test_damaged_cifar100_is_named(name, raw, message, tmp_path):
    root = cifar(tmp_path)
    put(root/'cifar-100-python'/name, raw if isinstance(raw, bytes) else pickle.dumps(raw))
    with pytest.raises(ValueError, match=message): cifar100(root)


@pytest.mark.parametrize('files,found', [
    (['cifar-10-batches-py/data_batch_1'], '1 without ending'), (['cifar-100-python.tar.gz'], '1 .gz'),
    (['train/apple/1.png', 'test/apple/2.png'], '2 .png .*, not the pickles .* dataset folder'),
    (['cifar-100-binary/train.bin'], '1 .bin'),
])
def test_other_forms_of_cifar100_are_refused_with_what_was_found(files, found, tmp_path):
    for f in files: put(tmp_path/f, b'x')
    with pytest.raises(FileNotFoundError, match=f'CIFAR-100 is not at .*, which holds {found}.*: root must name it'):
        cifar100(tmp_path)


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


def test_tables_in_every_form_give_the_same_parts(tmp_path):
    root = tree(tmp_path/'images', ['.'], each=10)
    files = sorted(str(p.relative_to(root)) for p in root.rglob('*.png'))
    part = ['train']*20 + ['val']*4 + ['TEST']*6
    rows = [(n, (2*i) % 7, 1+i % 3, s) for i, (n, s) in enumerate(zip(files, part))]
    counts = 'file,x,y,split\n'+''.join(f'{n},{a},{b},{s}\n' for n, a, b, s in rows)
    votes = soft_labels(root, put(tmp_path/'v.csv', counts))
    percent = 'file;x;y;split\n'+''.join(f'{n};{100*a/(a+b):.3f};{100*b/(a+b):.3f};{s}\n' for n, a, b, s in rows)
    path = put(tmp_path/'p.csv', percent)
    with pytest.raises(ValueError, match='sums to 100; 30 such rows; rescale=True'): load('soft_labels', root, path)
    for s in (votes, load('rescaled_labels', root, path)):
        assert sizes(s) == dict(train=20, valid=4, test=6) and names(s.test) == files[24:] and s.note == 'its own split'
        torch.testing.assert_close(s.train.part_targets, votes.train.part_targets, rtol=0, atol=2e-5)
    torch.testing.assert_close(votes.train.target(3), torch.tensor([6/7, 1/7]))
    named = ''.join(f'{n},{"xy"[i % 2]},{s}\n' for i, (n, _, _, s) in enumerate(rows) if s != 'val')
    with pytest.warns(UserWarning, match='t.csv: left out: 4 images without a row'):
        one = soft_labels(root, put(tmp_path/'t.csv', f'file,label,split\n{named}'))
    assert one.train.labels.tolist() == [files.index(n) % 2 for n in names(one.train)] and one.train.targets.ndim == 1
    assert sizes(one) == dict(train=18, valid=2, test=6) and one.left_out[0].startswith('4 images without a row: ')


def test_missing_label_files_and_images_are_named(tmp_path):
    root = tree(tmp_path/'images', ['.'])
    with pytest.raises(FileNotFoundError, match='the label file is not at .*none.csv: labels must name it'):
        load('soft_labels', root, tmp_path/'none.csv')
    with pytest.raises(FileNotFoundError, match='the label file is not given: labels must name it'):
        load('soft_labels', root)
    with pytest.raises(FileNotFoundError, match='the data of soft_labels is not at .*: root must name it'):
        load('soft_labels', tmp_path/'none', tmp_path/'x.csv')


# ---- one call

def test_reduced_sets_keep_the_reported_part():
    s, full = load('digits', classes=4, limit=5), load('digits')
    assert s.num_classes == 4 and torch.bincount(s.train.labels).tolist() == [5]*4
    assert torch.equal(s.test.rows, full.test.rows[full.test.labels < 4])
    assert set(s.train.rows.tolist()) < set(full.train.rows.tolist())
    for bad in (1, 11):
        with pytest.raises(ValueError, match=rf'classes must be in \[2, 10\], got {bad}'): load('digits', classes=bad)
    with pytest.raises(ValueError, match='limit must be at least 1, got 0'): load('digits', limit=0)


@pytest.mark.parametrize('name,words', [
    ('imagenet', 'ImageNet-1k is not at .*145 GB; .*image-net.org'),
    ('tiny_imagenet', 'Tiny ImageNet is not at .*237 MB; .*cs231n'),
    ('cifar100', 'CIFAR-100 is not at .*161 MB; .*toronto'),
    ('folder', 'a folder of images is not at'),
])
def test_missing_data_says_what_and_where_from(name, words, tmp_path):
    with pytest.raises(FileNotFoundError, match=words): load(name, tmp_path/'nothing')


def test_unknown_names():
    known = 'digits, cifar100, tiny_imagenet, imagenet, folder, soft_labels or rescaled_labels'
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
