"Models, losses and batches that the tests of the training loop train, one job a kind of randomness."
import torch
from torch import nn

from softnce.losses import (NLL, ExpectedInfoNCE, InfoNCE, SoftDistributionInfoNCE, SoftTargetCrossEntropy,
                            SoftTargetInfoNCE)
from softnce.noise import Fresh, Queue
from softnce.vision.batches import Batches, Mixing
from softnce.vision.models import SmallCNN

NOISE = torch.full((10,), .1)
NAMES = ['nll on drawn labels', 'cross-entropy', 'queue', 'fresh', 'sampled', 'expected', 'hard']


class Killed(Exception): pass


class Net(SmallCNN): # dropout draws from torch's generator in every step
    def forward(self, x): return super().forward(nn.functional.dropout(x, .1, self.training))


def job(name, splits):
    "A model, its loss and its batches."
    torch.manual_seed(0)
    own = torch.Generator().manual_seed(3)
    loss, mixing = {
        'nll on drawn labels': (NLL(), Mixing(10, draw=True)),
        'cross-entropy': (SoftTargetCrossEntropy(), Mixing(10)),
        'queue': (SoftTargetInfoNCE(noise_probs=NOISE, noise_samples=Queue(300)), Mixing(10)),
        'fresh': (SoftTargetInfoNCE(noise_probs=NOISE, noise_samples=Fresh(40, generator=own)), Mixing(10)),
        'sampled': (SoftDistributionInfoNCE(noise_probs=NOISE, generator=own), Mixing(10)),
        'expected': (ExpectedInfoNCE(noise_probs=NOISE, generator=own), Mixing(10)),
        'hard': (InfoNCE(noise_probs=NOISE), None)}[name]
    train, valid = Batches(splits.train, 120, True, mixing=mixing), Batches(splits.valid, 359)
    return Net(10, width=4, hidden=8), loss, train, valid


def weights(model): return torch.cat([v.double().flatten() for v in model.state_dict().values()])
