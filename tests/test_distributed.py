"Candidates of all ranks: gloo processes against the global batch in one process, value and gradient, float64."
import functools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from softnce.distributed import targets_of_others
from softnce.losses import (info_nce, linear_soft_target_info_nce, soft_distribution_info_nce, soft_target_info_nce)
from softnce.noise import InBatch, Queue
from softnce.targets import SparseTargets, mix, one_hot, smooth

K, D, N = 5, 3, 6
PARTS = {'2 ranks': (3, 3), '2 uneven ranks': (4, 2), '3 uneven ranks': (2, 3, 1)}


def batch(seed):
    "Inputs, ids, soft and sparse targets of one global batch, and extra noise."
    g = torch.Generator().manual_seed(seed)
    x, ids = torch.randn(N, D, generator=g, dtype=torch.float64), torch.randint(K, (N,), generator=g)
    lam = torch.rand(N, generator=g, dtype=torch.float64)
    partner = torch.randperm(N, generator=g)
    hard = SparseTargets(ids[:, None], torch.ones(N, 1, dtype=torch.float64), num_classes=K)
    sparse = smooth(mix(hard, lam, partner), .1)
    varied = SparseTargets(sparse.indices, sparse.weights, torch.rand(N, generator=g, dtype=torch.float64), K)
    extra = torch.softmax(torch.randn(2, K, generator=g, dtype=torch.float64), 1)
    return dict(x=x, ids=ids, dense=sparse.dense(), sparse=sparse, varied=varied, one_hot=one_hot(ids, K).double(), extra=extra)


ETA = torch.tensor([.3, .1, .2, .25, .15], dtype=torch.float64)


def through_logits(loss, targets, **kwargs):
    return lambda w, b, rows: loss(b['x'][rows] @ w, b[targets][rows], noise_probs=ETA, temperature=.7, reduction='sum', **kwargs)


def linear(w, b, rows):
    return linear_soft_target_info_nce(b['x'][rows], w.T, b['sparse'][rows], noise_probs=ETA, temperature=.7, reduction='sum')


def with_extra(w, b, rows):
    return soft_target_info_nce(b['x'][rows] @ w, b['sparse'][rows], noise_samples=b['extra'], reduction='sum')


def with_queue(w, b, rows):
    "The second call sees the first batch of all ranks."
    source, before = Queue(N), batch(99)
    soft_target_info_nce(before['x'][rows] @ w, before['dense'][rows], noise_samples=source)
    return soft_target_info_nce(b['x'][rows] @ w, b['dense'][rows], noise_samples=source, reduction='sum')


CASES = {
    'info_nce': through_logits(info_nce, 'ids'),
    'soft distribution': through_logits(soft_distribution_info_nce, 'one_hot'),
    'dense': through_logits(soft_target_info_nce, 'dense'),
    'sparse': through_logits(soft_target_info_nce, 'sparse'),
    'epsilon per row': through_logits(soft_target_info_nce, 'varied'),
    'chunks': through_logits(soft_target_info_nce, 'dense', chunk_size=1),
    'linear': linear, 'extra': with_extra, 'queue': with_queue,
}


def value_and_grad(case, rows):
    w = torch.randn(D, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    value = CASES[case](w, batch(0), rows)
    return value.detach(), torch.autograd.grad(value, w)[0]


def worker(rank, parts, port, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=len(parts))
    rows, results = slice(sum(parts[:rank]), sum(parts[:rank+1])), {}
    for case in CASES:
        value, grad = value_and_grad(case, rows)
        dist.all_reduce(value)
        dist.all_reduce(grad)
        results[case] = value, grad
    b, w = batch(0), torch.ones(D, K, dtype=torch.float64)
    with torch.no_grad(): results['no_grad'] = soft_target_info_nce(b['x'][rows] @ w, b['dense'][rows])
    results['local'] = soft_target_info_nce(b['x'][rows] @ w, b['dense'][rows], noise_samples=InBatch(local=True))
    results['others'] = targets_of_others(b['ids'][rows])
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "What every rank of a world found; each world is started once."
    @functools.cache
    def run(name):
        folder, parts = tmp_path_factory.mktemp('ranks'), PARTS[name]
        mp.spawn(worker, (parts, free_port(), str(folder)), nprocs=len(parts))
        return [torch.load(folder/f'{r}.pt') for r in range(len(parts))]
    return run


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('world', PARTS)
def test_ranks_together_are_the_global_batch(ranks, world, case):
    value, grad = value_and_grad(case, slice(None))
    for found in ranks(world):
        torch.testing.assert_close(found[case][0], value, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[case][1], grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize('world', PARTS)
def test_without_gradients_and_on_request_a_rank_is_alone(ranks, world):
    b, w, start = batch(0), torch.ones(D, K, dtype=torch.float64), 0
    for found, n in zip(ranks(world), PARTS[world]):
        rows, start = slice(start, start+n), start+n
        alone = soft_target_info_nce(b['x'][rows] @ w, b['dense'][rows])
        torch.testing.assert_close(found['no_grad'], alone, rtol=0, atol=1e-14)
        torch.testing.assert_close(found['local'], alone, rtol=0, atol=1e-14)
        together = soft_target_info_nce(b['x'][rows] @ w, b['dense'][rows], noise_samples=torch.cat([b['dense'][:rows.start], b['dense'][rows.stop:]]))
        assert (together - alone).abs() > 1e-3


@pytest.mark.parametrize('world', PARTS)
def test_the_others_come_in_the_order_of_ranks(ranks, world):
    ids, start = batch(0)['ids'], 0
    for found, n in zip(ranks(world), PARTS[world]):
        assert found['others'].tolist() == torch.cat([ids[:start], ids[start+n:]]).tolist()
        start += n
