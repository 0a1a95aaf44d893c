"Clients that leave the loop to their user, plain PyTorch, timm, PyG and Ignite, against a plain loop; and the table."
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from clients import (RAN, WHAT, Whole, batches, closed_form, cross_entropy, in_batch, network, parameters, plain_steps,
                     problem, ran, unsmoothed, with_state, with_temperature)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import softnce

ROOT = Path(__file__).resolve().parents[2]


def same(got, wanted): assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def sgd(whole): return torch.optim.SGD(whole.parameters(), .5)


def fit(step, optimizer, epochs=1, rank=0, world=1):
    "A plain loop; a rank takes every `world`-th row of a batch."
    for points, targets in batches()*epochs:
        optimizer.zero_grad()
        step(points[rank::world], targets[rank::world]).backward()
        optimizer.step()


# ---------------------------------------------------------------- plain PyTorch
@ran('PyTorch', 'single')
def test_plain():
    whole = Whole(softnce.SoftTargetInfoNCE(problem()[2]))
    fit(whole, sgd(whole))
    same(parameters(whole.net), plain_steps(in_batch))
    assert not torch.allclose(parameters(whole.net), plain_steps(cross_entropy), atol=1e-3)  # the oracles differ


def plain_rank(rank, world=2):
    whole = Whole(closed_form())
    fit(DistributedDataParallel(whole), sgd(whole), rank=rank, world=world)
    return parameters(whole.net)


@ran('PyTorch', 'DDP')
def test_plain_in_two_processes(pool):
    for found in pool.run(2, plain_rank): same(found, plain_steps(cross_entropy))


def bf16_and_exact(logits, value, targets):
    "Logits of 16 bits, and a loss that is that of the same numbers in 32 bits."
    assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32
    exact = cross_entropy(logits.double(), targets.double())
    offset = (targets.double() @ problem()[2].double().log()).mean()  # what the closed form adds to it
    assert_close(value.double(), exact + offset, rtol=1e-5, atol=1e-5)


@ran('PyTorch', 'bf16')
def test_plain_bf16():
    loss, net, (points, targets, _) = closed_form(), network(), problem()
    with torch.autocast('cpu', torch.bfloat16):
        logits = net(points)
        value = loss(logits, targets)
    bf16_and_exact(logits, value, targets)


@ran('PyTorch', 'compile')
def test_plain_compiled():
    whole = Whole(closed_form())
    fit(torch.compile(whole, fullgraph=True, backend='aot_eager'), sgd(whole))
    same(parameters(whole.net), plain_steps(cross_entropy))


@ran('PyTorch', 'save/load')
def test_plain_checkpoint(tmp_path):
    straight, first, second = (Whole(with_state()) for _ in range(3))
    fit(straight, sgd(straight), epochs=2)
    fit(first, sgd(first))
    torch.save(first.state_dict(), tmp_path/'model.pt')
    second.load_state_dict(torch.load(tmp_path/'model.pt', weights_only=True))
    fit(second, sgd(second))
    assert_close(second.state_dict(), straight.state_dict(), rtol=0, atol=0)


@ran('PyTorch', 'predict')
def test_plain_probs():
    logits = network()(problem()[0])
    same(closed_form().probs(logits, epsilon=.2, targets='votes'), unsmoothed(logits))


# ---------------------------------------------------------------- timm
def timm_fit(whole, rank=0, world=1, model=None, accumulate=1):
    "The order of timm's script: loss, scaler, EMA."
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3, NativeScaler
    optimizer = create_optimizer_v2(whole, opt='momentum', lr=.5, momentum=0.)  # 'sgd' is Nesterov's
    ema, scaler = ModelEmaV3(whole, decay=0.), NativeScaler(device='cpu')
    for points, targets in batches():
        optimizer.zero_grad()
        for i in range(accumulate):
            part = slice(rank + world*i, None, world*accumulate)
            loss = (model or whole)(points[part], targets[part])/accumulate
            scaler(loss, optimizer, parameters=whole.parameters(), need_update=i + 1 == accumulate)
        ema.update(whole)
    return ema.module, optimizer


@ran('timm', 'single')
def test_timm_mixes_and_accumulates():
    pytest.importorskip('timm')
    from timm.data import Mixup
    images, ids = torch.randn(8, 3, 4, 4), torch.arange(8) % 3
    _, targets = Mixup(mixup_alpha=.8, label_smoothing=.1, num_classes=3)(images, ids)
    logits = torch.randn(8, 3)
    offset = (targets @ problem()[2].log()).mean()
    same(closed_form()(logits, targets), cross_entropy(logits, targets) + offset)
    for accumulate in 1, 2:
        whole = Whole(closed_form())
        timm_fit(whole, accumulate=accumulate)
        same(parameters(whole.net), plain_steps(cross_entropy))


def timm_rank(rank):
    whole = Whole(closed_form())
    timm_fit(whole, rank, 2, DistributedDataParallel(whole))
    return parameters(whole.net)


@ran('timm', 'DDP')
def test_timm_in_two_processes(pool):
    pytest.importorskip('timm')
    for found in pool.run(2, timm_rank): same(found, plain_steps(cross_entropy))


@ran('timm', 'bf16')
def test_timm_bf16():
    pytest.importorskip('timm')
    from timm.utils import NativeScaler
    whole, (points, targets, _) = Whole(closed_form()), problem()
    with torch.autocast('cpu', torch.bfloat16):
        logits = whole.net(points)
        value = whole.loss(logits, targets)
    bf16_and_exact(logits, value.detach(), targets)
    before = parameters(whole)
    NativeScaler(device='cpu')(value, sgd(whole), parameters=whole.parameters())
    assert parameters(whole).isfinite().all() and not torch.equal(parameters(whole), before)


@ran('timm', 'save/load')
def test_timm_checkpoint(tmp_path):
    pytest.importorskip('timm')
    from timm.models import resume_checkpoint
    from timm.utils import CheckpointSaver
    first, second, straight = (Whole(with_temperature()) for _ in range(3))
    _, optimizer = timm_fit(first)
    CheckpointSaver(first, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)).save_checkpoint(0)
    resume_checkpoint(second, str(tmp_path/'last.pth.tar'), log_info=False)
    for whole in straight, straight, second: timm_fit(whole)
    assert straight.loss.temperature != 1
    assert_close(second.state_dict(), straight.state_dict(), rtol=0, atol=0)


@ran('timm', 'predict')
def test_timm_reads_the_ema_model():
    pytest.importorskip('timm')
    whole, points = Whole(closed_form()), problem()[0]
    ema, _ = timm_fit(whole)
    logits = whole.net(points).detach()  # with decay 0 the average is the last model
    same(ema.loss.probs(ema.net(points), epsilon=.2, targets='mixed').detach(), unsmoothed(logits))


# ---------------------------------------------------------------- PyG
class OnGraph(nn.Module):
    "A node is what its neighbours are, with the loss of the nodes of the mask."
    def __init__(self, loss):
        super().__init__()
        from torch_geometric.nn import SimpleConv
        self.net, self.conv, self.loss = network(), SimpleConv('mean'), loss
    def logits(self, graph): return self.net(self.conv(graph.x, graph.edge_index))
    def forward(self, graph): return self.loss(self.logits(graph)[graph.mask], graph.y[graph.mask])


def graph_of(points, targets):
    "A graph whose every node has one neighbour, in which the features of the plain problem stand."
    from torch_geometric.data import Data
    n = len(points)
    edges = torch.stack([torch.arange(n, 2*n), torch.arange(n)])
    other = torch.full_like(targets, 1/3)
    return Data(x=torch.cat([torch.zeros_like(points), points]), edge_index=edges, y=torch.cat([targets, other]),
                mask=torch.arange(2*n) < n)


def graph_fit(whole, model=None, rank=0, world=1):
    from torch_geometric.data import Batch
    optimizer = sgd(whole)
    for points, targets in batches():
        points, targets = points[rank::world], targets[rank::world]
        half = len(points)//2
        graphs = [graph_of(points[:half], targets[:half]), graph_of(points[half:], targets[half:])]
        optimizer.zero_grad()
        (model or whole)(Batch.from_data_list(graphs)).backward()
        optimizer.step()
    return parameters(whole.net)


@ran('PyG', 'single')
def test_graphs():
    pytest.importorskip('torch_geometric')
    same(graph_fit(OnGraph(softnce.SoftTargetInfoNCE(problem()[2]))), plain_steps(in_batch))


@ran('PyG', 'predict')
def test_subgraphs_are_read():
    pytest.importorskip('torch_geometric')
    points, targets, _ = problem()
    graph, keep = graph_of(points, targets), torch.cat([torch.arange(5), torch.arange(32, 37)])
    part, whole = graph.subgraph(keep), OnGraph(closed_form())
    assert_close(part.y, graph.y[keep])
    probs = whole.loss.probs(whole.logits(part)[part.mask], epsilon=.2, targets='votes')
    same(probs, unsmoothed(whole.net(points[:5])))


def graph_rank(rank):
    whole = OnGraph(closed_form())
    return graph_fit(whole, DistributedDataParallel(whole), rank, 2)


@ran('PyG', 'DDP')
def test_graphs_in_two_processes(pool):
    pytest.importorskip('torch_geometric')
    for found in pool.run(2, graph_rank): same(found, plain_steps(cross_entropy))


@ran('PyG', 'bf16')
def test_graphs_bf16():
    pytest.importorskip('torch_geometric')
    whole, (points, targets, _) = OnGraph(closed_form()), problem()
    graph = graph_of(points, targets)
    with torch.autocast('cpu', torch.bfloat16):
        logits = whole.logits(graph)[graph.mask]
        value = whole.loss(logits, graph.y[graph.mask])
    bf16_and_exact(logits, value, targets)


# ---------------------------------------------------------------- Ignite
def ignite_fit(whole, epochs=1, model=None, rank=0, world=1):
    from ignite.engine import create_supervised_trainer
    rows = [(points[rank::world], targets[rank::world]) for points, targets in batches()]
    engine = create_supervised_trainer(model or whole.net, sgd(whole), whole.loss)
    engine.run(rows, max_epochs=epochs)
    return parameters(whole.net)


@ran('Ignite', 'single')
def test_ignite():
    pytest.importorskip('ignite')
    same(ignite_fit(Whole(softnce.SoftTargetInfoNCE(problem()[2]))), plain_steps(in_batch))


def ignite_rank(rank):
    import ignite.distributed as idist
    idist.sync()
    whole = Whole(closed_form())
    return ignite_fit(whole, 1, idist.auto_model(whole.net), idist.get_rank(), idist.get_world_size())


@ran('Ignite', 'DDP')
def test_ignite_in_two_processes(pool):
    pytest.importorskip('ignite')
    for found in pool.run(2, ignite_rank): same(found, plain_steps(cross_entropy))


@ran('Ignite', 'save/load')
def test_ignite_checkpoint(tmp_path):
    pytest.importorskip('ignite')
    from ignite.handlers import Checkpoint, DiskSaver
    straight, first, second = (Whole(with_state()) for _ in range(3))
    ignite_fit(straight, epochs=2)
    ignite_fit(first)
    saver = Checkpoint({'net': first.net, 'loss': first.loss}, DiskSaver(str(tmp_path)))
    from ignite.engine import Engine
    saver(Engine(lambda engine, batch: None))
    Checkpoint.load_objects({'net': second.net, 'loss': second.loss}, saver.last_checkpoint)
    ignite_fit(second)
    assert_close(second.state_dict(), straight.state_dict(), rtol=0, atol=0)


@ran('Ignite', 'predict')
def test_ignite_evaluates_probabilities():
    pytest.importorskip('ignite')
    from ignite.engine import create_supervised_evaluator
    loss, net, seen = closed_form(), network(), []
    def read(x, y, logits): seen.append(loss.probs(logits, epsilon=.2, targets='votes'))
    create_supervised_evaluator(net, output_transform=read).run(batches())
    same(torch.cat(seen), unsmoothed(net(problem()[0])).detach())


# ---------------------------------------------------------------- the table of the guide
def table():
    "Rows of the guide's table: client, version, and its ticks."
    cells = json.loads((ROOT/'nbs'/'guides'/'frameworks.ipynb').read_text(encoding='utf-8'))['cells']
    text = next(s for c in cells if (s := ''.join(c['source'])).startswith('| client'))
    rows = [[o.strip() for o in line.strip('|').split('|')] for line in text.splitlines()]
    assert tuple(rows[0]) == ('client', 'version', *WHAT, 'run by')
    return [(re.sub(r'\[([^]]+)\].*', r'\1', name), version, ticks, by) for name, version, *ticks, by in rows[2:]]


@pytest.fixture(scope='module')
def registered():
    "The tests of all clients, by client and tick."
    importlib.import_module('test_trainers')
    return RAN


def test_a_tick_is_a_test_and_a_test_is_a_tick(registered):
    ticked = {(name, what) for name, _, ticks, _ in table() for what, tick in zip(WHAT, ticks, strict=True) if tick}
    assert ticked == registered.keys()
    assert {o for _, _, ticks, _ in table() for o in ticks} == {'✓', ''}
    assert len(set(registered.values())) == len(registered)


def slow(test): return any(mark.name == 'slow' for mark in getattr(test, 'pytestmark', []))


def test_the_page_says_what_runs_the_tests(registered):
    found = {**globals(), **vars(importlib.import_module('test_trainers'))}
    for name, _, _, by in table():
        tests = [found[test] for (client, _), test in registered.items() if client == name]
        assert by in ('`make test`', '`make test-all`', 'hand')
        assert all(map(slow, tests)) if by != '`make test`' else not any(map(slow, tests)), name


PACKAGES = {'PyTorch': 'torch', 'timm': 'timm', 'PyG': 'torch-geometric', 'Ignite': 'pytorch-ignite',
            'Lightning': 'lightning', 'Hugging Face Trainer': 'transformers', 'Keras': 'keras', 'fastai': 'fastai'}


def test_the_versions_are_those_of_the_constraints():
    pins = dict(line.split('==') for line in (ROOT/'constraints.txt').read_text().splitlines() if '==' in line)
    for name, version, _, by in table():
        pinned = pins.get(PACKAGES[name])
        assert pinned in (None, version), f'{name} is {version} on the page and {pinned} in constraints.txt'
