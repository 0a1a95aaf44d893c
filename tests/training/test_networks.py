"What a network's constructor takes shows in what it computes; the table has every public Module beside the losses."
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import softnce
from softnce import calibration
from softnce.losses import ExpectedInfoNCE
from softnce.text import ContextModel, NgramClassifier
from softnce.training import metrics
from softnce.vision.models import SmallCNN
from softnce.vision.use import ReadOut

pytest.importorskip('torch_geometric')
from softnce.graphs.models import GCN, DeeperGCN  # noqa: E402
from torch_geometric.data import Data  # noqa: E402

NGRAMS, GAPS = torch.tensor([[1, 5, 9], [2, 3, 0]]), torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
LOGITS = torch.tensor([[2., 0., -1.], [.5, .2, .1]], dtype=torch.float64)


def graph(nodes=74, edges=11):
    "A ring of six cells."
    g, ring = torch.Generator().manual_seed(0), torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6])
    return Data(x=torch.randn(6, nodes, generator=g), edge_index=ring, edge_attr=torch.randn(6, edges, generator=g))


def images(channels=1): return torch.rand(3, channels, 8, 8, generator=torch.Generator().manual_seed(0))


SMALL = dict(num_classes=9, hidden=8, in_features=74)
NETWORKS = {  # class -> arguments, inputs, others: argument -> (value, inputs for it)
    NgramClassifier: (dict(classes=3, buckets=16, hidden=0), NGRAMS,
                      dict(classes=(4, NGRAMS), buckets=(32, NGRAMS + 16), hidden=(5, NGRAMS))),
    ContextModel: (dict(num_classes=7, dim=4, width=3), GAPS,
                   dict(num_classes=(20, GAPS + 10), dim=(6, GAPS), width=(2, GAPS[:, :4]))),
    GCN: (SMALL | dict(dropout=0.), graph(),
          dict(num_classes=(4, graph()), hidden=(5, graph()), dropout=(.5, graph()), in_features=(7, graph(7)))),
    DeeperGCN: (SMALL | dict(depth=3, dropout=0., checkpointing=False, edge_features=11), graph(),
                dict(num_classes=(4, graph()), hidden=(5, graph()), depth=(1, graph()), dropout=(.5, graph()),
                     in_features=(7, graph(7)), edge_features=(5, graph(74, 5)), checkpointing=(True, graph()))),
    SmallCNN: (dict(num_classes=3, channels=1, width=4, hidden=6, logits_bn=False), images(),
               dict(num_classes=(4, images()), channels=(3, images(3)), width=(6, images()), hidden=(None, images()),
                    logits_bn=(True, images()))),
}
CASES = [(cls, name) for cls, (_, _, others) in NETWORKS.items() for name in others]
ROWS = {'softnce.losses', 'softnce.peers', 'softnce.noise'}  # tests/losses/test_constructors.py


def public_modules():
    for found in pkgutil.walk_packages(softnce.__path__, 'softnce.'):
        module = importlib.import_module(found.name)
        for name in getattr(module, '__all__', ()):
            cls = getattr(module, name)
            if inspect.isclass(cls) and issubclass(cls, nn.Module): yield cls


def test_the_table_has_every_module_and_every_argument():
    found = {c for c in public_modules() if c.__module__ not in ROWS}
    assert found == {*NETWORKS} | {c for c in found if issubclass(c, metrics.Metric)}
    for cls, (given, _, others) in NETWORKS.items(): assert set(inspect.signature(cls).parameters) == {*given, *others}


def run(cls, given, inputs):
    "Output in training mode and the gradients, of a network with a seed of its own."
    torch.manual_seed(0)
    network = cls(**given)
    torch.manual_seed(1)  # of the dropout
    value = network(inputs)
    value.square().sum().backward()
    grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in network.parameters() if p.grad is not None]
    return value.detach(), grads, {name: tuple(v.shape) for name, v in network.state_dict().items()}


@pytest.mark.parametrize('cls, name', CASES)
def test_an_argument_of_a_network_shows(cls, name):
    given, inputs, others = NETWORKS[cls]
    value, its_inputs = others[name]
    usual, usual_grads, usual_shapes = run(cls, given, inputs)
    got, grads, shapes = run(cls, given | {name: value}, its_inputs)
    assert got.isfinite().all()
    if name == 'checkpointing':  # memory for time: nothing else
        torch.testing.assert_close(got, usual)
        for a, b in zip(grads, usual_grads, strict=True): torch.testing.assert_close(a, b)
    elif name in ('dropout', 'logits_bn'): assert (got - usual).abs().max() > 1e-3
    else: assert shapes != usual_shapes  # a width: of the parameter that it names
    if name in ('num_classes', 'classes') and cls is not ContextModel: assert got.shape[1] == value
    if name == 'dim': assert got.shape[1] == value


def test_every_argument_of_a_read_out():
    def loss(): return ExpectedInfoNCE(torch.tensor([.5, .3, .2], dtype=torch.float64))
    for epsilon, targets, T in ((0., None, 1.), (.1, 'votes', 1.), (.1, 'labels', 2.), (0., 'teacher', .5)):
        p = loss().probs(LOGITS, epsilon, targets)
        wanted = torch.tensor([[float(v)**(1/T)/sum(float(u)**(1/T) for u in row) for v in row] for row in p])
        torch.testing.assert_close(ReadOut(loss(), epsilon, targets, T)(LOGITS).float(), wanted)
    with pytest.raises(ValueError, match="targets must be None.*'guesses'"): ReadOut(loss(), 0., 'guesses')(LOGITS)


@pytest.mark.parametrize('bins', [3, 15])
def test_every_argument_of_a_metric(bins):
    g = torch.Generator().manual_seed(0)
    probs = (3*torch.randn(200, 4, generator=g)).softmax(1)
    labels = torch.where(probs.amax(1) > .85, torch.randint(4, (200,), generator=g), probs.argmax(1))
    for metric, function in ((metrics.ExpectedCalibrationError(bins), calibration.expected_calibration_error),
                             (metrics.ClasswiseCalibrationError(4, bins), calibration.classwise_calibration_error)):
        metric.update(probs, labels)
        assert metric.compute().item() == pytest.approx(function(probs, labels, bins))
        assert function(probs, labels, 3) != pytest.approx(function(probs, labels, 15), rel=1e-3)
    for cls in {c for c in public_modules() if issubclass(c, metrics.Metric)}:
        classes = dict(num_classes=4) if cls is metrics.ClasswiseCalibrationError else {}
        assert cls(**classes, sync_on_compute=False).sync_on_compute is False
        with pytest.raises(ValueError, match='weight'): cls(**classes, weight=torch.ones(4))
