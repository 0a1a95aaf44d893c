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
