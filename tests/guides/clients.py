"""What the tests of the clients share: a small problem, its steps by plain loops, and the register of what ran.

The oracles are F.cross_entropy, whose gradient is that of the closed form at class frequencies of any kind, and the
in-batch formula written out; neither calls softnce.
"""
import torch
import torch.nn.functional as F
from torch import nn

import softnce

WHAT = 'single', 'DDP', 'bf16', 'compile', 'save/load', 'predict'  # the columns of the table
RAN = {}   # (client, what): the test


def ran(client, what):
    "Marks the test of one tick of the table."
    def mark(test):
        if what not in WHAT: raise ValueError(f"what must be one of {WHAT}, got {what!r}")
        RAN[client, what] = test.__name__
        return test
    return mark


# ---------------------------------------------------------------- the problem
def problem(rows=32):
    "Points, smoothed soft targets and their mean before smoothing."
    g = torch.Generator().manual_seed(3)
    points, votes = torch.randn(rows, 2, generator=g), torch.randn(rows, 3, generator=g).mul(2).softmax(1)
    return points, .8*votes + .2/3, votes.mean(0)


def network():
    torch.manual_seed(5)
    return nn.Linear(2, 3)


def closed_form(reduction='mean'):
    return softnce.SoftTargetInfoNCE(problem()[2], noise_samples=softnce.ClosedForm(), reduction=reduction)


def with_state(): return softnce.SoftTargetInfoNCE(problem()[2], nn.Parameter(torch.tensor(1.)), softnce.Queue(16))


def with_temperature():
    return softnce.SoftTargetInfoNCE(problem()[2], nn.Parameter(torch.tensor(1.)), softnce.ClosedForm())


class Whole(nn.Module):
    "A network that holds its loss."
    def __init__(self, loss):
        super().__init__()
        self.net, self.loss = network(), loss
    def forward(self, points, targets): return self.loss(self.net(points), targets)


# ---------------------------------------------------------------- plain loops
def cross_entropy(logits, targets): return F.cross_entropy(logits, targets)


def in_batch(logits, targets):
    "Every row's scores against every row's target; the sum over candidates is their mean up to a constant."
    together = (logits - problem()[2].log()) @ targets.T
    return (together.logsumexp(1) - together.diagonal()).mean()


def batches(rows=8):
    points, targets, _ = problem()
    return list(zip(points.split(rows), targets.split(rows)))


def parameters(model): return nn.utils.parameters_to_vector(model.parameters()).detach()


def plain_steps(value, epochs=1, rows=8, rate=.5):
    "The parameters after epochs of SGD, batch for batch."
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for points, targets in batches(rows)*epochs:
        optimizer.zero_grad()
        value(model(points), targets).backward()
        optimizer.step()
    return parameters(model)


def unsmoothed(logits):
    "What a network means that was trained on these targets with a loss right for them."
    p = (logits.softmax(1) - .2/3).clamp(min=0)
    return p/p.sum(1, keepdim=True)
