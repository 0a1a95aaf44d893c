"softnce.vision.recipes: Table 3, losses by name, one training from files."
import numpy as np
import pytest
import torch

pytest.importorskip('sklearn')
pytest.importorskip('timm')
from pictures import cifar, put, tiny, tree
from softnce.losses import InfoNCE
from softnce.noise import ClosedForm, Fresh, Queue
from softnce.targets import SparseTargets
from softnce.vision.images import load
from softnce.vision.models import SmallCNN
from softnce.vision.presets import recipe, settings
from softnce.vision.recipes import LOSSES, loaders, make_loss, train_images


def test_table_3():
    want = dict(weight_decay=.05, layer_decay=.65, batch_size=1024, warmup_epochs=5, epochs=100, smoothing=.1, mixup=.8,
                cutmix=1., auto_augment='rand-m9-mstd0.5-inc1', hidden=4096, drop_path=.1)
    rates = dict(imagenet=(.0003, .00055, .00055), tiny_imagenet=(.0003, .00025, .00025),
                 cifar100=(.0003, .0003, .00055)) # cross-entropy, InfoNCE, soft target InfoNCE
    for name, (ce, nce, soft) in rates.items():
        s = recipe(name, 'soft_target_info_nce')
        assert {k: s[k] for k in want} == want and s['model'] == 'vit_b16' and s['base_lr'] == soft
        assert recipe(name, 'soft_distribution_info_nce')['base_lr'] == recipe(name, 'info_nce')['base_lr'] == nce
        assert recipe(name, 'nll')['base_lr'] == recipe(name, 'soft_target_cross_entropy')['base_lr'] == ce
        assert [recipe(name, 'nll')[k] for k in ('smoothing', 'mixup', 'cutmix')] == [0, 0, 0]


def test_explicit_settings_come_before_the_recipes():
    asked = dict(mixup=1, epochs=None, layer_decay='none', hidden=0, pretrained='weights.pth')
    s = settings('tiny_imagenet', 'digits', 'nll', asked)
    assert s['mixup'] == 1. and isinstance(s['mixup'], float) and s['epochs'] == 100 and s['layer_decay'] is None
    assert s['hidden'] == 0 and s['pretrained'] == 'weights.pth'
    assert settings(None, 'folder', 'nll', {})['model'] == 'resnet18_64'
    assert settings(None, 'digits', 'nll', {})['model'] == 'small_cnn'


def test_losses_by_name():
    labels = torch.tensor([0, 0, 0, 1])
    for name, kind in LOSSES.items():
        loss = make_loss(name, labels, 2)
        assert type(loss) is kind
        if isinstance(loss, InfoNCE): torch.testing.assert_close(loss.noise_probs, torch.tensor([.75, .25]))
    def source(noise): return make_loss('soft_target_info_nce', labels, 2, noise, 17, .8, .1).noise_samples
    assert source('in_batch') is None and isinstance(source('closed_form'), ClosedForm)
    queue, fresh = source('queue'), source('fresh')
    assert isinstance(queue, Queue) and queue.size == 17
    assert isinstance(fresh, Fresh) and (fresh.size, fresh.lam, fresh.epsilon) == (17, .8, .1)


def test_noise_of_soft_targets_is_their_mean():
    targets = torch.tensor([[.5, .3, .2], [.3, .5, .2]]) # a class that is never the largest
    for name in ('info_nce', 'soft_distribution_info_nce', 'soft_target_info_nce'):
        torch.testing.assert_close(make_loss(name, targets, 3).noise_probs, torch.tensor([.4, .4, .2]))
    with pytest.raises(ValueError, match=r'labels must contain every class unless floor is given; absent: \[1\]'):
        make_loss('info_nce', torch.tensor([[.5, 0., .5]]), 3)


def test_every_loss_sees_the_same_images():
    data = load('digits')
    first = {}
    for loss in LOSSES:
        x, t = next(iter(loaders(data, settings(None, 'digits', loss, {}), loss, seed=4)['train']))
        first[loss] = x
        hard = loss in ('nll', 'info_nce')
        assert (t.ndim == 1 and not t.is_floating_point()) if hard else isinstance(t, SparseTargets)
    assert all(torch.equal(x, first['nll']) for x in first.values())


@pytest.mark.slow
def test_imagenet_recipe_takes_a_step(tmp_path):
    """ViT-B/16 at 224 pixels with every setting of Table 3 but the batch, the weights and the precision, on three
    made-up classes."""
    data = dict(name='imagenet', root=tree(tmp_path/'data', ['train', 'val'], each=4, size=256), valid=.25)
    asked = dict(batch_size=8, epochs=1, warmup_epochs=0, pretrained=False, precision='fp32', compile=False)
    s = settings(None, 'imagenet', 'soft_target_info_nce', asked) | dict(lr=1e-5)
    out = train_images(data, s, dict(name='soft_target_info_nce'), tmp_path/'run', device='cpu')
    assert out['weights'] > 100e6 and out['test'][0].shape == (12, 3)
    assert np.isfinite(out['last']['train_loss']) and out['last']['epoch'] == 1


@pytest.mark.parametrize('kind', ['cifar100', 'tiny_imagenet'])
def test_a_small_training_from_files(kind, tmp_path):
    root = cifar(tmp_path/'d') if kind == 'cifar100' else tiny(tmp_path/'d')
    asked = dict(model='small_cnn', image_size=32, batch_size=8, epochs=1, warmup_epochs=0, precision='fp32', erase=.25)
    s, loss = settings('small', kind, 'soft_target_info_nce', asked) | dict(lr=1e-3), dict(name='soft_target_info_nce')
    out = train_images(dict(name=kind, root=root, valid=.2), s, loss, tmp_path/'run', device='cpu')
    assert out['test'][0].shape == ((20, 5) if kind == 'cifar100' else (12, 3)) and not out['corrupt']
    again = train_images(dict(name='nothing'), s, loss, tmp_path/'run', device='cpu')  # finished: read back
    assert torch.equal(again['test'][0], out['test'][0])


@pytest.mark.filterwarnings('ignore')
def test_a_training_from_votes_with_bad_files(tmp_path, capsys):
    "One class is never the largest; bad files in training and evaluation are named; weights come from a file."
    root = tree(tmp_path/'images', ['.'], each=110)
    files = sorted(str(p.relative_to(root)) for p in root.rglob('*.png'))
    part = ['train']*220 + ['val']*50 + ['test']*60
    rows = [f'{n};{3 if i % 2 else 2};{2 if i % 2 else 3};1;{s}' for i, (n, s) in enumerate(zip(files, part))]
    put(tmp_path/'votes.csv', 'file;x;y;z;split\n'+'\n'.join(rows))
    bad = [files[i] for i in (20, 220, 300)] # 3 of 330, but 1 of 50 in the validation part
    for name in bad: put(root/name, b'half')
    torch.save(SmallCNN(5, 3, 4, 8).state_dict(), tmp_path/'w.pth')
    asked = dict(model='small_cnn', image_size=32, width=4, hidden=8, batch_size=10, epochs=1, warmup_epochs=0,
                 precision='fp32', auto_augment='none', pretrained=str(tmp_path/'w.pth'))
    s = settings(None, 'soft_labels', 'soft_target_info_nce', asked) | dict(lr=1e-3)
    data, loss = dict(name='soft_labels', root=root, labels=tmp_path/'votes.csv'), dict(name='soft_target_info_nce')
    out = train_images(data, s, loss, tmp_path/'run', device='cpu')
    assert sorted(c.split(' ')[0] for c in out['corrupt']) == bad
    assert len(out['valid'][0]) == 49 and len(out['test'][0]) == 59 and out['test'][0].isfinite().all()
    assert f'{tmp_path}/w.pth: ' in capsys.readouterr().out
    put(root/files[221], b'half') # the parts count together: 4 of 330
    with pytest.raises(ValueError, match='4 of 330 images cannot be read, more than max_corrupt=0.01'):
        train_images(data, s, loss, tmp_path/'again', device='cpu')


@pytest.mark.parametrize('call,message', [
    (lambda: make_loss('mse'), 'loss must be one of nll, soft_target_cross_entropy'),
    (lambda: make_loss('info_nce', torch.tensor([0, 1]), 2, noise='gauss'),
     "noise must be one of in_batch, queue, closed_form, fresh, got 'gauss'"),
    (lambda: recipe('mnist', 'nll'), 'recipe must be imagenet, tiny_imagenet, cifar100, small or digits'),
    (lambda: settings(None, 'digits', 'nll', dict(epochs='many')), "epochs must be like 30 of the recipe, got 'many'"),
    (lambda: settings(None, 'digits', 'nll', dict(epochs=True)), 'epochs must be like 30 of the recipe, got True'),
    (lambda: settings(None, 'digits', 'nll', dict(momentum=.9)), 'momentum is no setting of a recipe'),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message): call()
