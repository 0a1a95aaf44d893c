"""What is recommended for votes and teachers, from training to read-out: a linear model that can represent the truth,
2,000 points, three classes. The recommended losses read p(k|x); in-batch soft target InfoNCE refuses, rightly."""
import math

import pytest
import torch

from softnce.losses import ExpectedInfoNCE, SoftTargetCrossEntropy, SoftTargetInfoNCE
from softnce.noise import ClosedForm, empirical_noise

ROWS, K, STEPS = 2000, 3, 1000
RECOMMENDED = dict(expected=lambda eta: ExpectedInfoNCE(eta), cross_entropy=lambda eta: SoftTargetCrossEntropy(),
                   closed_form=lambda eta: SoftTargetInfoNCE(eta, noise_samples=ClosedForm()))


@pytest.fixture(scope='module')
def points():
    "Inputs, the truth p(k|x), and targets: the truth itself, and averages of five votes."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 2, generator=g)
    x = torch.cat([x, torch.ones(ROWS, 1)], 1)  # with a bias
    p = (x @ torch.tensor([[1.5, -.5, -1.], [0., 1., -1.], [.5, 0., -.5]])).softmax(1)
    votes = torch.multinomial(p, 5, replacement=True, generator=g)
    return x, p, dict(teacher=p, votes=torch.nn.functional.one_hot(votes, K).float().mean(1))


def trained(loss, x, targets, batch, seed=0):
    "Logits of all points, after Adam with a rate that falls to zero."
    torch.manual_seed(seed)
    w = torch.zeros(x.shape[1], K, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=.05)
    for step in range(STEPS):
        optimizer.param_groups[0]['lr'] = .05*(1 + math.cos(math.pi*step/STEPS))/2
        rows = torch.randint(ROWS, (batch,))
        optimizer.zero_grad()
        loss(x[rows] @ w, targets[rows]).backward()
        optimizer.step()
    return (x @ w).detach().double()


def kl(p, probs): return (p*(p/probs).log()).sum(1).mean().item()


@pytest.mark.parametrize('kind', ['teacher', 'votes'])
@pytest.mark.parametrize('name, batch', [('expected', 16), ('expected', 64), ('cross_entropy', 16),
                                         ('closed_form', 16)])
def test_recommended_losses_read_the_truth(name, kind, batch, points):
    x, p, targets = points
    loss = RECOMMENDED[name](empirical_noise(targets[kind]))
    logits = trained(loss, x, targets[kind], batch)
    assert kl(p, loss.probs(logits, targets=kind)) < .002


@pytest.mark.parametrize('kind', ['teacher', 'votes'])
@pytest.mark.filterwarnings('error')
def test_in_batch_says_that_it_cannot_be_read(kind, points):
    "It refuses; read as labels all the same, it is a hundred times further off."
    x, p, targets = points
    loss = SoftTargetInfoNCE(empirical_noise(targets[kind]))
    logits = trained(loss, x, targets[kind], 64)
    with pytest.raises(ValueError, match=f"targets='{kind}' cannot be read from in-batch"):
        loss.probs(logits, targets=kind)
    assert kl(p, loss.probs(logits, targets='labels')) > .1
