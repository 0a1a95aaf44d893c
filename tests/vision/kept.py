"Models that are kept as a run keeps them, without a training."
import torch
from pictures import tree

from softnce.training import save_checkpoint
from softnce.vision.images import load
from softnce.vision.models import make_model
from softnce.vision.presets import settings
from softnce.vision.use import save_model


def network(s, classes=3, seed=1):
    "A network with random weights, running means among them."
    torch.manual_seed(seed)
    net = make_model(s['model'], classes, s['image_size'], 3, s['hidden'] or None, s['logits_bn'], width=s['width'])
    for b in net.buffers():
        if b.is_floating_point(): b.copy_(torch.rand_like(b)+.5)
    for p in net.parameters(): p.data.add_(.02*torch.randn_like(p))
    return net.eval()


def keep(folder, loss=dict(name='soft_target_info_nce'), used='last', valid=None, data=None, **asked):
    "The folder `model`, with two networks: last (epoch 3) and best (epoch 2), the first of which is averaged."
    asked = dict(model='small_cnn', image_size=32, width=4, hidden=8, mixup=0., cutmix=0.) | asked
    s = settings('small', 'folder', loss['name'], asked)
    data = data or load('folder', tree(folder/'images', ['.'], each=20), valid=.3)
    nets = dict(last=network(s), best=network(s, seed=2), raw=network(s, seed=3))
    history = [dict(nll=v) for v in (.9, .5, .7)]
    save_checkpoint(dict(model=nets['raw'].state_dict(), ema=nets['last'].state_dict(), history=history),
                    folder/'checkpoint'/'last.pt')
    save_checkpoint(dict(model=nets['best'].state_dict(), epoch=2), folder/'checkpoint'/'best.pt')
    if valid is None: valid = 3*torch.randn(40, 3, generator=torch.Generator().manual_seed(4)), torch.arange(40) % 3
    save_model(folder/'model', folder/'checkpoint', data, s, loss, valid, used, rows=36, dataset='folder', note='drawn')
    return data, s, nets, valid


def finished(folder, metrics='[{"split": "test", "rows": 30, "top1": 0.9, "nll": 0.5}]'):
    "Make it look like a finished run."
    (folder/'params.yaml').write_text('dataset: folder\n')
    (folder/'metrics.json').write_text(metrics)
    return folder
