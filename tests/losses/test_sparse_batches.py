"""`SparseTargets` as a batch: indexed, moved, collated, pinned, mapped over, saved and joined, by PyTorch and by the
frameworks that walk over batches."""
import copy
import dataclasses
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset, default_collate

import softnce
from softnce import SparseTargets, mix, smooth, soft_target_info_nce
from softnce.sparse import collate

K = 7
KINDS = ['one class', 'smoothed', 'mixed', 'each epsilon']


def batch(kind, rows=6, seed=0):
    "Targets of a kind."
    g = torch.Generator().manual_seed(seed)
    hard = SparseTargets.from_labels(torch.randint(K, (rows,), generator=g), K)
    if kind == 'one class': return hard
    if kind == 'smoothed': return smooth(hard, .1)
    share = torch.rand(rows, 1, generator=g)
    two = SparseTargets(torch.randint(K, (rows, 2), generator=g), torch.cat([share, 1-share], 1), num_classes=K)
    return two if kind == 'mixed' else smooth(two, torch.rand(rows, generator=g))


def same(a, b):
    "The same targets, field by field where epsilon is a number, and written out."
    assert isinstance(a, SparseTargets) and a.num_classes == b.num_classes
    torch.testing.assert_close(a.dense(), b.dense(), rtol=0, atol=0)


@pytest.fixture(params=KINDS)
def t(request): return batch(request.param)


# ---------------------------------------------------------------- as a tensor is
def test_size_and_rows(t):
    assert t.ndim == 2 and t.size() == t.shape == (6, K) and t.size(0) == len(t) == 6 and t.size(1) == K
    dense = t.dense()
    rows = list(t)
    assert len(rows) == 6 and all(r.shape == (1, K) for r in rows)
    for i in (0, 5, -1, -6, torch.tensor(2)): torch.testing.assert_close(t[i].dense(), dense[i][None])
    for i in (slice(1, 4), [0, 2], torch.tensor([3, 3]), dense[:, 0] > .05): same(t[i], t[torch.arange(6)[i]])
    torch.testing.assert_close(torch.cat([r.dense() for r in t]), dense)
    for i in (6, -7):
        with pytest.raises(IndexError, match='6 rows'): t[i]


def test_copies(t):
    for other in (t.clone(), t.detach(), t.cpu(), t.to('cpu'), copy.copy(t), copy.deepcopy(t),
                  pickle.loads(pickle.dumps(t)), dataclasses.replace(t)):
        same(other, t)
        assert type(other.epsilon) is type(t.epsilon)
    w = t.weights.clone().requires_grad_()
    grown = SparseTargets(t.indices, w, t.epsilon, K)
    assert grown.requires_grad and not grown.detach().requires_grad
    kept = grown.clone()
    kept.dense()[0].sum().backward()  # a copy keeps its graph
    assert w.grad is not None
    with torch.no_grad(): w.zero_()
    assert not kept.weights.eq(0).all()  # and its numbers


def test_one_row_of_weights_stays_one():
    t = mix(batch('one class'), .7)
    assert t.weights.stride(0) == 0
    for other in (t.clone(), t.detach(), t.to(torch.float64), t.cpu()): assert other.weights.stride(0) == 0


def test_a_dtype_changes_weights_only(t):
    other = t.to(torch.float64)
    assert other.dtype == torch.float64 and other.indices.dtype == torch.long and type(other.epsilon) is type(t.epsilon)
    moved = t.to('meta', non_blocking=True)
    assert moved.device.type == moved.indices.device.type == 'meta'
    assert t.cuda.__func__ is SparseTargets.cuda  # what it calls is tested where there is a card


def test_every_tensor_is_pinned(t, monkeypatch):
    "By the protocol: a machine without a card has no pinned memory."
    seen = []
    monkeypatch.setattr(Tensor, 'pin_memory', lambda self: seen.append(self.data_ptr()) or self.clone())
    from torch.utils.data._utils.pin_memory import pin_memory
    x, pinned = pin_memory((torch.zeros(2), t))
    same(pinned, t)
    wanted = [t.indices, t.weights] + [t.epsilon]*isinstance(t.epsilon, Tensor)
    assert set(seen[1:]) == {o.data_ptr() for o in wanted}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a card')
def test_pinned_and_moved_on_a_card(t):
    pinned = t.pin_memory()
    assert pinned.indices.is_pinned() and pinned.weights.is_pinned()
    for moved in (pinned.to('cuda', non_blocking=True), t.cuda(), t.cuda(0)):
        assert moved.device.type == moved.indices.device.type == 'cuda'
        same(moved.cpu(), t)
    for x, y in DataLoader(TensorDataset(torch.zeros(6), t), 3, pin_memory=True): assert y.indices.is_pinned()


# ---------------------------------------------------------------- loaders
def test_default_collate(t):
    loader = DataLoader(TensorDataset(torch.arange(6), t), batch_size=4)
    batches = list(loader)
    assert [len(y) for _, y in batches] == [4, 2]
    same(SparseTargets.cat([y for _, y in batches]), t)
    for make in (default_collate, collate):
        named = make([{'x': i, 'y': (row, 'text')} for i, row in enumerate(t)])
        same(named['y'][0], t)
    same(DataLoader(list(zip(range(6), t)), batch_size=6).__iter__().__next__()[1], t)


def test_rows_of_different_kinds_are_joined():
    rows = [batch(kind)[i] for i, kind in enumerate(KINDS)]
    joined = default_collate(rows)
    torch.testing.assert_close(joined.dense(), torch.cat([r.dense() for r in rows]))


def test_batches_that_are_not_collated_name_the_remedy(t):
    with pytest.raises(TypeError, match='collate_fn=copy.copy'): next(iter(DataLoader([t], batch_size=None)))
    same(next(iter(DataLoader([t], batch_size=None, collate_fn=copy.copy))), t)


SPAWN = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from softnce import SparseTargets, smooth
if __name__ == '__main__':
    t = smooth(SparseTargets(torch.arange(12).reshape(6, 2), torch.tensor([[.7, .3]]*6), num_classes=12), .1)
    loader = DataLoader(TensorDataset(torch.arange(6), t), 2, num_workers=2, multiprocessing_context='spawn')
    got = SparseTargets.cat([y for _, y in loader])
    assert got.epsilon == .1, got
    torch.testing.assert_close(got.dense(), t.dense())
    print('joined', len(got))
"""


@pytest.mark.slow
def test_workers_that_are_spawned(tmp_path):
    "Half a minute on a busy machine: each worker imports PyTorch."
    (tmp_path/'job.py').write_text(SPAWN)
    done = subprocess.run([sys.executable, tmp_path/'job.py'], capture_output=True, text=True)
    assert 'joined 6' in done.stdout, done.stderr


def test_workers_that_are_forked(t):
    loader = DataLoader(TensorDataset(torch.arange(6), t), 2, num_workers=1, multiprocessing_context='fork')
    same(SparseTargets.cat([y for _, y in loader]), t)


# ---------------------------------------------------------------- trees and files
def test_trees(t):
    leaves, spec = pytree.tree_flatten({'y': t, 'n': 1})
    assert len(leaves) == 3 + isinstance(t.epsilon, Tensor)
    same(pytree.tree_unflatten(leaves, spec)['y'], t)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(t)[0]]
    assert names == ['.indices', '.weights', '.epsilon'][:len(names)]
    assert isinstance(pytree.tree_map(lambda leaf: None, t), SparseTargets)  # leaves may be anything


def test_gradients_through_a_checkpoint_and_a_tree(t):
    from torch.utils.checkpoint import checkpoint
    x = torch.randn(6, K, requires_grad=True)
    checkpoint(soft_target_info_nce, x, t, use_reentrant=False).backward()
    y = x.detach().requires_grad_()
    soft_target_info_nce(y, t).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_export_takes_them_as_inputs():
    class Loss(nn.Module):
        def forward(self, x, t): return soft_target_info_nce(x, t)
    x, t = torch.randn(6, K), batch('mixed')
    program = torch.export.export(Loss(), (x, t))
    other = batch('mixed', seed=1)
    torch.testing.assert_close(program.module()(x, other), soft_target_info_nce(x, other))
    import io
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x, other), soft_target_info_nce(x, other))


def test_files_of_weights_only(t, tmp_path):
    torch.save({'y': t, 'rows': list(t)}, tmp_path/'t.pt')
    loaded = torch.load(tmp_path/'t.pt', weights_only=True)
    same(loaded['y'], t)
    same(SparseTargets.cat(loaded['rows']), t)


def test_files_from_before_the_class_moved(t, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(SparseTargets, '__module__', 'softnce.targets')
        torch.save(t, tmp_path/'t.pt')
        text = pickle.dumps(t)
    assert b'softnce.targets' in text
    same(pickle.loads(text), t)
    same(torch.load(tmp_path/'t.pt', weights_only=True), t)


def test_one_tensor(t):
    rows = t.packed()
    assert rows.dtype == torch.float64 and len(rows) == 6
    got = SparseTargets.from_packed(rows, K)
    same(got, t)
    assert isinstance(got.epsilon, Tensor) == (isinstance(t.epsilon, Tensor) or t.epsilon > 0)
    with pytest.raises(ValueError, match='indices must be in'): SparseTargets.from_packed(rows, 2)
    with pytest.raises(ValueError, match='rows must be from packed'): SparseTargets.from_packed(rows[:, 0], K)
    big = SparseTargets(torch.tensor([[2**40]]), torch.ones(1, 1), num_classes=2**41)
    assert SparseTargets.from_packed(big.packed(), 2**41).indices.item() == 2**40


# ---------------------------------------------------------------- a mapping, as frameworks walk over one
def test_a_mapping_gives_the_targets_back(t):
    from collections.abc import Mapping
    assert isinstance(t, Mapping) and list(t.keys()) == ['indices', 'weights', 'epsilon']
    assert all(len(v) == 6 for v in t.values()) and torch.equal(t['indices'], t.indices)
    again = type(t)({k: v for k, v in t.items()})
    same(again, t)
    assert type(again.epsilon) is type(t.epsilon)  # a number stays one
    same(type(t)({k: v[2:] for k, v in t.items()}), t[2:])
    same(type(t)({k: v.numpy() for k, v in t.items()}), t)
    same(SparseTargets({**{str(k): v for k, v in t.items()}, 'num_classes': K}), t)
    twice = type(t)({k: torch.cat([v, v]) for k, v in t.items()})
    same(twice, SparseTargets.cat([t, t]))


def test_a_mapping_that_is_none_says_so():
    for wrong in ({}, {'weights': torch.ones(1, 1)}, torch.zeros(2, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match='weights must be given, or a mapping'): SparseTargets(wrong)
    with pytest.raises(ValueError, match='num_classes must be given'):
        SparseTargets({'indices': torch.zeros(2, 1, dtype=torch.long), 'weights': torch.ones(2, 1)})


def test_rows_with_different_epsilons_keep_them_when_joined():
    a, b = smooth(batch('one class'), .1), smooth(batch('one class', seed=1), .3)
    joined = type(a)({k: torch.cat([a[k], b[k]]) for k in a.keys()})
    same(joined, SparseTargets.cat([a, b]))


def test_accelerate(t):
    from accelerate import Accelerator
    from accelerate.utils import concatenate, find_batch_size, send_to_device
    from accelerate.utils.operations import (broadcast, get_data_structure, initialize_tensors, pad_across_processes,
                                             slice_tensors)
    x = torch.zeros(6, 2)
    same(send_to_device({'x': x, 'y': t}, torch.device('cpu'))['y'], t)
    assert find_batch_size(t) == find_batch_size({'y': t, 'x': x}) == 6
    same(concatenate([t, t[:2]]), SparseTargets.cat([t, t[:2]]))
    same(concatenate([(x, t), (x, t)])[1], SparseTargets.cat([t, t]))
    accelerator = Accelerator(cpu=True)
    for got in (accelerator.gather_for_metrics((x, t))[1], accelerator.gather(t), broadcast(t),
                pad_across_processes(t, dim=1, pad_index=-100)): same(got, t)
    same(slice_tensors(t, slice(1, 3)), t[1:3])
    blank = initialize_tensors(get_data_structure(t))
    assert isinstance(blank, SparseTargets) and blank.shape == t.shape and blank.dtype == t.dtype
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.zeros(6, 2), t), 4))
    same(SparseTargets.cat([accelerator.gather_for_metrics(y) for _, y in loader]), t)


RANKS = """
import os, sys, torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, TensorDataset
from softnce import SparseTargets, smooth

def job(rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    t = smooth(SparseTargets(torch.arange(14).reshape(7, 2), torch.tensor([[.7, .3]]*7), num_classes=14), .1)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(7), t), 2))
    got = [accelerator.gather_for_metrics(batch) for batch in loader]
    rows, targets = torch.cat([x for x, _ in got]), SparseTargets.cat([y for _, y in got])
    assert sorted(rows.tolist()) == list(range(7)), rows
    torch.testing.assert_close(targets.dense(), t[rows].dense())
    own = smooth(t[:2], .5*rank)  # another epsilon on each rank
    want = torch.cat([smooth(t[:2], .5*r).dense() for r in range(2)])
    torch.testing.assert_close(accelerator.gather(own).dense(), want)
    print('gathered', len(targets), flush=True)
    torch.distributed.destroy_process_group()

if __name__ == '__main__':
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    mp.spawn(job, (port,), nprocs=2)
"""


@pytest.mark.slow
def test_accelerate_gathers_from_two_ranks(tmp_path):
    "Half a minute on a busy machine: two processes import PyTorch and accelerate."
    (tmp_path/'job.py').write_text(RANKS)
    done = subprocess.run([sys.executable, tmp_path/'job.py'], capture_output=True, text=True)
    assert done.stdout.count('gathered 7') == 2, done.stderr


def test_graphs_carry_one_tensor(t):
    from torch_geometric.data import Batch, Data
    edges = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]])
    data = Data(x=torch.zeros(6, 2), edge_index=edges, y=t.packed())
    kept = torch.tensor([1, 3, 4])
    same(SparseTargets.from_packed(data.subgraph(kept).y, K), t[kept])
    both = Batch.from_data_list([data, data.subgraph(kept)])
    same(SparseTargets.from_packed(both.y, K), SparseTargets.cat([t, t[kept]]))
    same(SparseTargets.from_packed(both[1].y, K), t[kept])
    with pytest.raises(TypeError, match=r'a graph carries data.y = targets.packed\(\)'):
        Data(x=torch.zeros(6, 2), edge_index=edges, y=t).to('cpu')
    four = Data(x=torch.zeros(6, 2), edge_index=edges, y=t).subgraph(kept)
    with pytest.raises(ValueError, match='rows like the logits'): soft_target_info_nce(torch.randn(3, K), four.y)


@pytest.mark.slow
def test_lightning(t):
    "Slow for Lightning's import, ten seconds."
    from lightning.fabric.utilities import move_data_to_device
    from lightning.pytorch.utilities.data import extract_batch_size
    from lightning_utilities.core.apply_func import apply_to_collection
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # "an ambiguous collection"
        assert extract_batch_size(t) == extract_batch_size((torch.zeros(6), {'y': t})) == 6
    same(move_data_to_device([torch.zeros(6), t], torch.device('cpu'))[1], t)
    same(apply_to_collection({'y': t}, Tensor, lambda v: v[2:])['y'], t[2:])


def test_ignite(t):
    from ignite.utils import convert_tensor
    same(convert_tensor((torch.zeros(6), t), device='cpu', non_blocking=True)[1], t)
    assert convert_tensor({'y': t}, device='meta')['y'].device.type == 'meta'


def test_functions_of_the_hugging_face_trainer(t):
    from transformers.trainer_pt_utils import (EvalLoopContainer, find_batch_size, nested_concat, nested_detach,
                                               nested_numpify, nested_truncate)
    assert find_batch_size({'y': t}) == 6
    same(nested_concat(t, t[:2]), SparseTargets.cat([t, t[:2]]))
    same(nested_concat(batch('mixed'), batch('one class')), SparseTargets.cat([batch('mixed'), batch('one class')]))
    same(nested_concat(batch('one class'), batch('mixed')), SparseTargets.cat([batch('one class'), batch('mixed')]))
    same(nested_truncate(t, 3), t[:3])
    same(nested_detach((t,))[0], t)
    same(nested_numpify(t), t)
    container = EvalLoopContainer(do_nested_concat=True)
    for part in (t[:4], t[4:]): container.add(part)
    same(container.get_arrays(), t)


class HeadAndLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.loss = nn.Linear(3, K), softnce.SoftTargetInfoNCE()
    def forward(self, x, labels=None):
        logits = self.head(x)
        return {'loss': self.loss(logits, labels), 'logits': logits}


class Rows(torch.utils.data.Dataset):
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return {'x': self.x[i], 'labels': self.y[i]}


@pytest.mark.slow
def test_the_hugging_face_trainer_trains_and_predicts(t, tmp_path):
    "Slow for the import of its models."
    from transformers import Trainer, TrainingArguments
    args = TrainingArguments(tmp_path, per_device_eval_batch_size=4, per_device_train_batch_size=4, max_steps=2,
                             use_cpu=True, report_to=[], save_strategy='no', remove_unused_columns=False)
    data = Rows(torch.randn(6, 3), t)
    seen = []
    def metrics(p):
        seen.append(p.label_ids)
        return {}
    trainer = Trainer(HeadAndLoss(), args, train_dataset=data, eval_dataset=data, compute_metrics=metrics,
                      data_collator=collate)
    trainer.train()
    out = trainer.predict(data)
    same(out.label_ids, t)
    same(seen[0], t)
    assert out.predictions.shape == (6, K) and out.metrics['test_loss'] > 0
