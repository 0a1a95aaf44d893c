"softnce.vision.splits: shares of every class, and targets that fit the images."
from collections import Counter

import pytest
import torch

from softnce.vision.splits import stratified


def test_stratified_leaves_something_of_every_class():
    labels = torch.tensor([0]*40 + [1]*2 + [2])
    rest, drawn = stratified(labels, .25, seed=3)
    assert sorted(torch.cat([rest, drawn]).tolist()) == list(range(43))
    assert Counter(labels[drawn].tolist()) == {0: 10, 1: 1} and 2 in labels[rest]
    with pytest.raises(ValueError, match='share must be in'): stratified(labels, 0.)
