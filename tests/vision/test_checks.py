"softnce.vision.checks, places and presets: what is said before an image training, and what it remembers of its data."
import json, os, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import cifar, jpeg, put, tiny, tree, zipped

from softnce.runs import UsageError, check_run
from softnce.vision import checks
from softnce.vision.checks import check_images, check_model, check_settings, check_sweep, choose_batch, timm_names
from softnce.vision.images import load
from softnce.vision.places import find_data
from softnce.vision.presets import fit_batch, settings


def votes(folder, rows, name='votes.csv', header='file,a,b'):
    (folder/name).write_text('\n'.join([header, *rows])+'\n')
    return folder/name


# ---- models

def test_names_of_models_are_those_of_timm():
    timm = pytest.importorskip('timm')
    assert timm_names() >= set(timm.list_models())
    for name in ('resnet18', 'vit_base_patch16_224.mae', 'vit_b16', 'small_cnn', 'hf-hub:a/b'): check_model(name)


@pytest.mark.parametrize('name, message', [
    ('resnet19', r"model must be small_cnn, .* or a name of timm's, got 'resnet19'; did you mean resnet"),
    ('resnet18.mae', "model resnet18 has no weights 'mae'; it has: .*a1_in1k"), ('', "got ''")])
def test_a_name_that_is_none(name, message):
    with pytest.raises(ValueError, match=message): check_model(name)


def test_a_model_of_timm_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(checks, 'timm_names', lambda: set())
    monkeypatch.setattr(checks.util, 'find_spec', lambda name: None)
    check_model('small_cnn')
    with pytest.raises(ValueError, match=r"'resnet18' is of timm's, which is not installed: pip install"):
        check_model('resnet18')


# ---- settings and batches

@pytest.mark.parametrize('more, world, message', [
    (dict(warmup_epochs=30.), 1, 'warmup_epochs must be below epochs=30, got 30.0'),
    (dict(batch_size=65), 2, 'batch_size must be a multiple of the 2 ranks, got 65'),
    (dict(batch_size=66), 2, 'batch_size must be even on each rank for mixing, got 66 on 2'),
    (dict(accumulate=65), 1, 'accumulate must be at most the 64 rows of a rank, got 65'),
    (dict(pretrained='nope.pth'), 1, 'pretrained must be True, False or a file; there is none at nope.pth')])
def test_settings_that_do_not_fit_together(more, world, message):
    s = settings(None, 'digits', 'nll', {})
    check_settings(s, 1)
    with pytest.raises(ValueError, match=message): check_settings(s | more, world)


def test_the_batch_of_a_small_data_set_by_a_loop():
    for batch, rows, parts in [(256, r, p) for r in (1, 7, 40, 243, 2047, 2048, 10**6) for p in (1, 3)]:
        got = fit_batch(batch, rows, parts)
        if rows >= 8*batch: assert got == batch; continue
        want = max([2*parts*2**k for k in range(12) if 2*parts*2**k <= min(rows/8, batch)], default=2*parts)
        assert got == want and got % parts == 0 and got % 2 == 0, (batch, rows, parts)


def test_a_batch_that_was_asked_for_stays_and_the_rate_goes_with_the_root():
    s = settings(None, 'folder', 'nll', {})
    assert choose_batch(s, dict(batch_size=200), 243) == '' and s['batch_size'] == 256
    said = choose_batch(s, dict(processes=2), 243)
    assert s['batch_size'] == 16 and "batch_size is 16, not the recipe's 256: there are 243 training images" in said
    assert s['base_lr']*16/256 == pytest.approx(1e-3*(16/256)**.5)
    s = settings(None, 'folder', 'nll', dict(base_lr=.02))
    choose_batch(s, dict(base_lr=.02), 243)
    assert s['base_lr'] == .02


# ---- the data: what is found without torch is what the readers make

def layouts(tmp_path):
    yield 'digits', None, None
    yield 'folder', tree(tmp_path/'three', ['train', 'val', 'test'], each=9), None
    yield 'folder', tree(tmp_path/'two', ['Training', 'testing'], each=9), None
    yield 'folder', tree(tmp_path/'none', [''], each=23), None
    yield 'folder', zipped(tmp_path/'two', tmp_path/'two.zip'), None
    yield 'tiny_imagenet', tiny(tmp_path/'tiny'), None
    yield 'soft_labels', tmp_path/'none', votes(tmp_path, [f'{c}/{i}.png,{i%3},2' for c in 'abc' for i in range(23)])
    yield 'soft_labels', tmp_path/'none', votes(tmp_path, [
        f'a/{i}.png,{i%3},2,{"train" if i < 15 else "dev"}' for i in range(23)], 'split.csv', 'file,a,b,set')


def test_rows_and_classes_are_those_of_the_reader(tmp_path):
    for name, root, labels in layouts(tmp_path):
        with pytest.warns(UserWarning) if labels and labels.name == 'split.csv' else torch.no_grad():
            s = load(name, root, labels)
        found = find_data(name, root, labels)
        assert (found.classes, found.rows) == (s.num_classes, len(s.train)), (name, root)
        assert [Path(p) for p in found.at if p == labels] == [p for p in (labels,) if p]


@pytest.mark.parametrize('p, message', [
    (dict(dataset='folder'), 'a folder of images is not given: root must name it'),
    (dict(dataset='folder', root='nowhere'), 'a folder of images is not at .*/nowhere'),
    (dict(dataset='cifar100'), "CIFAR-100 is not at .*/data"),
    (dict(dataset='soft_labels', root='none'), 'the label file is not given: labels must name it'),
    (dict(dataset='folder', root='none', labels='x.csv'), 'labels are of dataset soft_labels'),
    (dict(dataset='folder', root='none', classes=9), r'classes must be in \[2, 3\], got 9'),
    (dict(dataset='folder', root='none', batch_size=100), 'batch_size must be at most the 57 training images, got 100'),
    (dict(dataset='folder', root='none', loss='nl'), "loss must be one of nll, .*, got 'nl'"),
    (dict(dataset='folder', root='none', epochs=1), 'warmup_epochs must be below epochs=1, got 2'),
    (dict(dataset='folder', root='none', trackers=['comet']), 'trackers must be of tensorboard, wandb, mlflow'),
    (dict(dataset='folder', root='lfs'), r'none of 5 images can be read, of 20: a/0.png \(UnidentifiedImageError\)')])
def test_what_a_training_would_fail_by_is_said_before(p, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, ['none'], each=23)
    for c in 'ab':
        for i in range(10): put(tmp_path/'lfs'/c/f'{i}.png', 'version https://git-lfs.github.com/spec/v1')
    with pytest.raises((ValueError, FileNotFoundError), match=message): check_images(p)


def test_a_download_is_no_missing_data_and_a_cut_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_images(dict(dataset='cifar100', download=True))['data'] == {}
    root = cifar(tmp_path/'c')
    train = root/'cifar-100-python'/'train'
    assert list(check_images(dict(dataset='cifar100', root='c'))['data']) == [str(train.parent)]
    train.write_bytes(train.read_bytes()[:-100])
    with pytest.raises(ValueError, match='train of CIFAR-100 was cut short'): find_data('cifar100', root)


def test_a_sweep_must_not_be_empty(tmp_path):
    with pytest.raises(ValueError, match='seeds must not be empty'):
        check_sweep(dict(dataset='digits', seeds=[]), 'seeds')
    root = tree(tmp_path, [''], each=5)
    assert list(check_sweep(dict(dataset='folder', root=root, seeds=[0]), 'seeds')['data']) == [str(root)]


# ---- nothing stale

def remember(checked):
    "As a run that was begun remembers what it is made of."
    checked.changes.refuse()
    checked.run.dir.mkdir(parents=True, exist_ok=True)
    (checked.run.dir/'env.json').write_text(json.dumps(checked.now))


def touched(path, data):
    put(path, data)
    os.utime(path, (0, 0))


@pytest.mark.parametrize('kind', ['folder', 'zip', 'labels', 'graphs'])
def test_a_run_remembers_its_data(kind, tmp_path):
    name, p, out = 'images', dict(dataset='folder', batch_size=8), tmp_path/'runs'
    root = tree(tmp_path/'pets', [''], each=9)
    if kind == 'folder': p, what, change = p | dict(root=str(root)), 'pets', lambda: touched(root/'a'/'0.png', jpeg(5))
    elif kind == 'zip':
        what = zipped(root, tmp_path/'pets.zip')
        p |= dict(root=str(what))
        put(root/'b'/'9.png', jpeg(5))
        change = lambda: zipped(root, what)
    elif kind == 'labels':
        rows = [f'{c}/{i}.png,1,2' for c in 'abc' for i in range(9)]
        p |= dict(dataset='soft_labels', root=str(root), labels=str(votes(tmp_path, rows)))
        what, change = 'votes.csv', lambda: votes(tmp_path, [rows[0].replace('1,2', '2,1'), *rows[1:]])
    else:
        from softnce.graphs.files import RAW
        name, what = 'graphs', 'label_grs_surface'
        p, file = dict(data_root=str(tmp_path)), tmp_path/RAW/'2-V'/'419.h5'
        put(file, b'\x89HDF\r\n\x1a\n....')
        change = lambda: touched(file, b'\x89HDF\r\n\x1a\n....more')
    remember(check_run(name, p, out))
    remember(check_run(name, p, out))  # nothing has changed
    change()
    changes = check_run(name, p, out).changes
    assert str(what) in changes.data
    with pytest.raises(UsageError, match='^the data of .* has changed: .*; --restart makes the run again'):
        changes.refuse()


def test_a_wrong_request_costs_a_second_and_leaves_no_folder(tmp_path):
    start = time.monotonic()
    command = [sys.executable, '-c', 'from softnce.runs.cli import main; main()', 'run', 'images', '-p',
               'dataset=folder', '-p', 'root=~/no such folder']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and time.monotonic()-start < 30  # 1 s on a quiet machine
    assert 'a folder of images is not at '+str(Path.home()/'no such folder') in done.stderr
    assert len(done.stderr.splitlines()) <= 2 and not list(tmp_path.iterdir())


def test_ids_of_runs_are_what_they_were(tmp_path):
    "Of the defaults, by hand from a checkout before there were cells for the checks."
    known = dict(gmm='0650a9e1', digits='9414530b', imbalance='b9faec6b', cell_types='0d6cc104', tables='e82c05bc',
                 heads='64c4c69b', calibration='c01b61d6', label_smoothing='c575ae3a', noise_samples='e6b75407',
                 graphs='ca2ca3ef', images='3ae231c4')
    assert {name: check_run(name, {}, tmp_path).run.dir.name for name in known} == known
    assert np.all([len(check_run(name, {}, tmp_path).experiment.tagged('preflight')) == 1 for name in known])
