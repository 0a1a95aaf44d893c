"softnce.vision.splits: shares of every class, and targets that fit the images."
from collections import Counter

import pytest
import torch

from softnce.vision.files import Files
from softnce.vision.splits import ImageSet, Splits, stratified, three_parts


def test_stratified_leaves_something_of_every_class():
    labels = torch.tensor([0]*40 + [1]*2 + [2])
    rest, drawn = stratified(labels, .25, seed=3)
    assert sorted(torch.cat([rest, drawn]).tolist()) == list(range(43))
    assert Counter(labels[drawn].tolist()) == {0: 10, 1: 1} and 2 in labels[rest]
    with pytest.raises(ValueError, match='share must be in'): stratified(labels, 0.)


# ---- the check of every reader

def data(n=9, images=None, classes=3):
    return ImageSet(torch.zeros(n, 1, 2, 2) if images is None else images, torch.arange(n) % classes)


def parts(*rows, classes='abc', of=None):
    of = of or data()
    return Splits(*(of.take(r) for r in rows), list(classes), (0.,), (1.,), source='DIR')


@pytest.mark.parametrize('make,message', [
    (lambda: parts([0, 1], [2], []), r"DIR: no images in test; the parts hold .*'train': 2, 'valid': 1, 'test': 0"),
    (lambda: parts([0, 1], [], []), 'DIR: no images in valid and test'),
    (lambda: parts([0, 1, 2], [3], [2, 4]), 'DIR: 1 images are in train and in test: 2'),
    (lambda: parts([0, 1, 2], [3, 4], [4, 3]), 'DIR: 2 images are in valid and in test: 3, 4'),
    (lambda: parts([0], [3], [6], classes='a'), r"DIR: two classes or more are needed, found 1 \['a'\]"),
    (lambda: parts([0], [1], [2], classes='ab'), r'DIR, test: class ids must be in \[0, 2\), got 2 to 2'),
    (lambda: parts([0, 1], [2], [3]), r"DIR: classes without training images: \['c'\]"),
    (lambda: parts([0], [1], [2], of=ImageSet(torch.zeros(3, 1, 2, 2), torch.ones(3, 2)/2)),
     'DIR, train: targets must have one column per class, 3, got 2'),
])
def test_parts_that_cannot_be_trusted_are_refused(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_the_same_file_is_the_same_image_in_another_set(tmp_path):
    sets = [data(2, Files(tmp_path, names), 2) for names in (['a', 'b'], ['c', 'd'], ['e', 'b'])]
    with pytest.raises(ValueError, match='1 images are in train and in test: b'):
        Splits(*sets, list('ab'), (0.,), (1.,))
    other = data(2, Files(tmp_path/'other', ['e', 'b']), 2)
    assert Splits(*sets[:2], other, list('ab'), (0.,), (1.,)).num_classes == 2


@pytest.mark.parametrize('given,reported,sizes', [
    ('train', 'drawn', (18, 3, 9)), ('train valid', 'valid', (27, 3, 7)), ('train test', 'test', (27, 3, 7)),
    ('train valid test', 'test', (30, 7, 7)),
])
def test_what_is_given_is_reported_and_what_is_missing_is_drawn(given, reported, sizes):
    named = {part: data(30 if part == 'train' else 7) for part in given.split()}
    *got, which = three_parts(named, valid=.1, test=.3)
    assert which == reported and (len(got[0]), len(got[1]), len(got[2])) == sizes
