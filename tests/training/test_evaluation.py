"softnce.training.evaluation: metrics counted on paper, the loss's own read-out, the model's mode."
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_jobs import weights

from softnce.losses import SoftTargetInfoNCE
from softnce.training.config import TrainConfig
from softnce.training.evaluation import classification_metrics, evaluate, predict, read_out
from softnce.vision.batches import Batches
from softnce.vision.models import SmallCNN


def test_evaluation_by_hand():
    "Three images, two classes, logits chosen: everything counted on paper."
    class Given(nn.Module):
        def forward(self, x): return torch.stack([x[:, 0], torch.zeros(len(x))], -1)
    x, y = torch.tensor([[math.log(3)], [math.log(3)], [-math.log(4)]]), torch.tensor([0, 1, 1])  # P(0) = 3/4, 3/4, 1/5
    got = evaluate(Given(), nn.CrossEntropyLoss(), DataLoader(TensorDataset(x, y), 2), TrainConfig())
    assert got['top1'] == pytest.approx(2/3) and 'top5' not in got
    assert got['nll'] == pytest.approx((math.log(4/3)+math.log(4)+math.log(5/4))/3, rel=1e-6)
    assert got['brier'] == pytest.approx((2*.25**2+2*.75**2+2*.2**2)/3, rel=1e-6)
    assert got['ece'] == pytest.approx((2*.25+.2)/3, rel=1e-6)  # bins: .75 twice (right once), .8 once (right)
    nll = lambda T: sum(math.log(1+math.exp(-v/T)) for v in (math.log(3), -math.log(3), math.log(4)))
    assert nll(got['temperature']) < min(nll(got['temperature']*1.01), nll(got['temperature']/1.01))


def test_top5_by_a_loop(splits):
    torch.manual_seed(0)
    probs, labels = torch.softmax(torch.randn(200, 9), 1), torch.randint(9, (200,))
    got = classification_metrics(probs, labels)
    right = sum(int(y) in sorted(range(9), key=lambda k: -p[k])[:5] for p, y in zip(probs.tolist(), labels))
    assert got['top5'] == right/200


def test_evaluation_uses_the_losses_read_out():
    torch.manual_seed(0)
    eta, eps, logits = torch.tensor([.7, .2, .1]), .1, torch.randn(9, 3)
    s = logits.double() - eta.double().log()
    want = ((1-eps)*s + eta.double().log()).softmax(-1)
    torch.testing.assert_close(read_out(SoftTargetInfoNCE(noise_probs=eta), logits, eps), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(read_out(nn.CrossEntropyLoss(), logits), logits.double().softmax(-1), rtol=0, atol=1e-12)


def test_predict_uses_evaluation_mode_and_puts_the_mode_back(splits):
    model = SmallCNN(10, width=4, hidden=None)
    for mode in (True, False):
        model.train(mode)
        before = weights(model)
        a, b = predict(model, Batches(splits.valid, 50))[0], predict(model, Batches(splits.valid, 359))[0]
        torch.testing.assert_close(a, b)
        assert model.training is mode and torch.equal(before, weights(model))
    double = [(torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.zeros(2))]
    assert predict(model.double(), double)[0].dtype == torch.float64


# ---- several ranks, one of which cannot read some of its images

def pictures(folder, bad, count=10):
    "Flat grey images in a zip file, image i of grey level 20*i; the members `bad` are no pictures."
    import io, zipfile
    import numpy as np
    from PIL import Image
    names = [f'{i}.png' for i in range(count)]
    with zipfile.ZipFile(folder/'z.zip', 'w') as z:
        for i, name in enumerate(names):
            out = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), 20*i, 'uint8')).save(out, 'PNG')
            z.writestr(name, b'no picture' if i in bad else out.getvalue())
    return names


class Grey(nn.Module):  # the grey level of an image as its logit
    def forward(self, x): return x.mean((1, 2, 3))[:, None]*torch.tensor([1., -1.])


def evaluated(folder, bad, count=10, **kw):
    "What this rank gets; the error, where there is one."
    from pathlib import Path
    from softnce.training.nodes import ranks
    from softnce.vision.batches import transforms
    from softnce.vision.files import Files
    from softnce.vision.splits import ImageSet
    rank, world, _ = ranks('cpu')
    folder = Path(folder)/f'{rank}-{len(bad)}-{count}'
    folder.mkdir()
    data = ImageSet(Files(folder/'z.zip', pictures(folder, bad, count)), torch.arange(count))
    loader = Batches(data, 4, transform=transforms(8), mean=(0.,)*3, std=(1.,)*3, rank=rank, world=world, **kw)
    try: logits, labels = predict(Grey(), loader)
    except ValueError as e: return f'{rank}: {e}'
    assert logits.shape == (len(labels), 2)
    assert (logits[:, 0]*255).round().int().tolist() == [20*int(y) for y in labels]  # each label with its own image
    return labels.tolist()


def uneven_job(folder):
    import torch.distributed as dist
    dist.init_process_group('gloo')
    found = [evaluated(folder, bad, count, max_corrupt=1.) for bad, count in (
        ((), 10), ((0,), 10), ((0, 8), 10), ((1, 3, 5, 7, 9), 10), ((0, 1, 2, 3), 10), ((), 1), ((), 5))]
    found += [evaluated(folder, (0, 2), 9, max_corrupt=.1), evaluated(folder, (0, 1, 2), 3, max_corrupt=1.)]
    all_found = [None]*dist.get_world_size()
    dist.all_gather_object(all_found, found)
    return all_found


@pytest.mark.slow
def test_images_that_one_rank_cannot_read_neither_stop_nor_shift_the_others(tmp_path):
    import test_evaluation
    from softnce.training.nodes import launch_nodes
    first, second = launch_nodes(test_evaluation.uneven_job, str(tmp_path), processes=2)
    rest = lambda *bad, count=10: [i for i in range(count) if i not in bad]
    assert first[:7] == second[:7] == [rest(), rest(0), rest(0, 8), rest(1, 3, 5, 7, 9), rest(0, 1, 2, 3), [0],
                                       rest(count=5)]
    assert first[7].startswith('0: 2 of 9 images cannot be read')
    assert 'evaluation on rank 0: ValueError: 2 of 9' in second[7]
    assert first[8].endswith('no row that can be evaluated') and second[8].endswith('no row that can be evaluated')


def test_a_share_of_rows_must_say_which_it_gave():
    "Without ranks a loader's `rows` are not looked at, and one that gives nothing is refused."
    loader = DataLoader(TensorDataset(torch.ones(3, 1), torch.arange(3)), 2)
    loader.rows = [7]
    assert predict(nn.Identity(), loader)[1].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match='the loader gave no row that can be evaluated'): predict(nn.Identity(), [])
