"softnce.training.evaluation: metrics counted on paper, the loss's own read-out, the model's mode."
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_jobs import weights

from softnce.losses import ExpectedInfoNCE, SoftTargetCrossEntropy, SoftTargetInfoNCE
from softnce.noise import ClosedForm
from softnce.targets import SparseTargets
from softnce.training.config import TrainConfig
from softnce.training.evaluation import classification_metrics, evaluate, predict, read_out, read_out_caveat
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


# ---- distributions as labels, and kinds of training targets

class Given(nn.Module):
    def forward(self, x): return x


def votes_and_logits(n=40):
    g = torch.Generator().manual_seed(2)
    votes = torch.multinomial(torch.full((n, 3), 1/3), 5, replacement=True, generator=g)
    return nn.functional.one_hot(votes, 3).double().mean(1), 2*torch.randn(n, 3, generator=g, dtype=torch.float64)


@pytest.mark.parametrize('form', ['dense', 'sparse'])
def test_distributions_are_scored_as_such(form):
    "Every score by hand, in batches; the temperature minimises the cross-entropy to the distributions."
    q, logits = votes_and_logits()
    batches = [(l, SparseTargets.from_counts(5*v) if form == 'sparse' else v)
               for l, v in zip(logits.split(7), q.split(7))]
    got, p = evaluate(Given(), nn.CrossEntropyLoss(), batches, TrainConfig()), logits.softmax(1)
    by_hand = dict(cross_entropy=-(q*p.log()).sum(1).mean(), soft_brier=(p-q).square().sum(1).mean(),
                   kl=(torch.xlogy(q, q) - torch.xlogy(q, p)).sum(1).mean(),
                   total_variation=(p-q).abs().sum(1).mean()/2,
                   expected_accuracy=q.gather(1, p.argmax(1, keepdim=True)).mean(),
                   top1=(p.argmax(1) == q.argmax(1)).double().mean(),
                   nll=-p.gather(1, q.argmax(1, keepdim=True)).log().mean())
    for name, value in by_hand.items(): assert got[name] == pytest.approx(value.item(), rel=1e-9), name
    assert {'soft_ece', 'classwise_ece', 'entropy_correlation', 'ece', 'brier'} <= set(got)
    def soft(T): return -(q*(logits/T).log_softmax(1)).sum().item()
    T = got['temperature']
    assert soft(T) < min(soft(1.01*T), soft(T/1.01))


def test_class_ids_have_the_columns_they_had():
    q, logits = votes_and_logits()
    got = evaluate(Given(), nn.CrossEntropyLoss(), [(logits, q.argmax(1))], TrainConfig())
    assert set(got) == {'nll', 'temperature', 'top1', 'ece', 'brier'}


def test_smoothing_is_undone_but_for_the_logarithms():
    "Cross-entropy and KL are those of `probs(logits)`: undoing a smoothing makes zeros."
    q, logits = votes_and_logits()
    got = evaluate(Given(), SoftTargetCrossEntropy(), [(4*logits, q)], TrainConfig(epsilon=.3))
    p = (4*logits).softmax(1)
    assert got['cross_entropy'] == pytest.approx(-(q*p.log()).sum(1).mean().item())
    undone = (p - .1).clamp(min=0)/(p - .1).clamp(min=0).sum(1, keepdim=True)
    assert (undone == 0).any() and got['soft_brier'] == pytest.approx((undone-q).square().sum(1).mean().item())


@pytest.mark.filterwarnings('error:probs reads')
def test_the_kind_of_targets_reaches_the_read_out():
    "What the loss refuses is read as labels, without a warning; why is told in words. What is right is read as it is."
    eta, logits, eps = torch.tensor([.5, .3, .2]), torch.randn(6, 3), .1
    in_batch = SoftTargetInfoNCE(noise_probs=eta)
    in_batch(logits, torch.softmax(torch.randn(6, 3), 1))
    as_labels = in_batch.probs(logits.double(), eps, targets='labels')
    for kind in ('votes', 'teacher', 'mixed'):
        assert torch.equal(read_out(in_batch, logits, eps, kind), as_labels)
        assert f"targets='{kind}' cannot be read from in-batch" in read_out_caveat(in_batch, logits, kind)
        for right in (ExpectedInfoNCE(eta), SoftTargetInfoNCE(eta, noise_samples=ClosedForm())):
            assert read_out_caveat(right, logits, kind) == ''
            assert torch.equal(read_out(right, logits, eps, kind), right.probs(logits.double(), eps, targets=kind))
    assert read_out_caveat(in_batch, logits, 'labels') == read_out_caveat(nn.CrossEntropyLoss(), logits, 'votes') == ''
    config = TrainConfig(targets='mixed', epsilon=eps)
    assert evaluate(Given(), in_batch, [(logits, torch.arange(6) % 3)], config)['brier'] > 0
    with pytest.warns(UserWarning, match='probs reads targets as labels'): read_out(in_batch, logits, eps)
    for call in (lambda: read_out(in_batch, logits, eps, 'vote'), lambda: TrainConfig(targets='vote')):
        with pytest.raises(ValueError, match="targets must be None, 'labels', .* or 'mixed', got 'vote'"): call()
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
