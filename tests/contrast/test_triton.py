"""Triton kernels: against loops, by the interpreter (on a card, where there is one, by the card); and compiled for two
compute capabilities without one."""
import csv
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('triton')
if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'

import triton
import triton.language as tl

import literal_sums as o
import test_scores
import test_sums
from literal_sums import F64, INF
from softnce import soft_target_info_nce
from softnce.losses import expected_info_nce
from softnce.contrast import set_backend, triton_candidates, triton_common, triton_pairs, triton_products, triton_sums
from softnce.contrast.expected_sums import expected_sums, expected_sums_torch
from softnce.contrast.layout import by_class
from softnce.contrast.sums import class_sums, product_sums, sparse_sums

F32, BF16 = torch.float32, torch.bfloat16
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
needs_interpreter = pytest.mark.skipif(DEVICE == 'cuda', reason='looks into the interpreter')
TOLERANCE = {F64: dict(rtol=1e-12, atol=1e-12), F32: dict(rtol=2e-5, atol=2e-5), BF16: dict(rtol=2**-7, atol=2**-9)}


def full(dtype): return torch.promote_types(dtype, F32)


def to(x, dtype):
    "Where the kernels run; numbers in a precision."
    if not isinstance(x, torch.Tensor): return x
    return x.to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE)


def assert_same(fast, literal, *inputs, dtype=F64, **tolerance):
    "Value and gradient of a kernel from inputs in `dtype`, against loops in float64 from the same numbers."
    low = [to(x, dtype) for x in inputs]
    with set_backend('triton'): found = o.value_and_gradients(fast, *low)
    wanted = o.value_and_gradients(literal, *(x.cpu().double() for x in low))
    assert found[0].dtype == full(dtype) and all(g.dtype == dtype for g in found[1:])
    for i, (a, b) in enumerate(zip(found, wanted)):
        limits = TOLERANCE[full(dtype) if i == 0 else dtype] | tolerance
        torch.testing.assert_close(a.cpu().double(), b, **limits)


# ---------------------------------------------------------------- sums over classes
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('N, K, S', [(1, 2, 1), (3, 7, 2), (2, 40, 3)])
@pytest.mark.parametrize('exponents', [(1.,), (.3, .6)])
@pytest.mark.parametrize('kind', ['classes', 'share', 'probs'])
def test_class_sums(dtype, N, K, S, exponents, kind):
    x, (own, literal) = o.normal(N, K), test_sums.class_case(N, K, S, kind)
    own = {name: to(v, full(dtype)) for name, v in own.items()}
    offset, eta = o.normal(len(exponents), K, seed=3), o.normal(K, seed=4)
    offset[:, -1] = -INF
    for offsets, log_eta, scale in ((None, None, 1.), (offset[:1], eta, .7), (offset, None, 1.)):
        assert_same(lambda x: class_sums(x, **own, offset=to(offsets, full(dtype)), exponents=exponents,
                                         log_eta=to(log_eta, full(dtype)), scale=scale),
                    lambda x: o.sums_over_classes(x, literal, exponents, offsets, log_eta=log_eta, scale=scale), x,
                    dtype=dtype)


@pytest.mark.parametrize('weight', [1., .8])
@pytest.mark.parametrize('with_offset', [False, True])
def test_class_sums_with_an_offset_of_the_own_class(weight, with_offset):
    x, y, own_offset = o.normal(5, 4), o.classes(4, 5), o.normal(5, seed=2)
    own_offset[0] = -INF
    offset, w = o.normal(1, 4, seed=1) if with_offset else None, torch.full((5, 1), weight, dtype=F64)
    literal = [o.target(k[None], v, 0., 4) for k, v in zip(y, w)]
    assert_same(lambda x: class_sums(x, to(y[:, None], F64), to(w, F64), offset=to(offset, F64),
                                     own_offset=to(own_offset, F64), exponents=(.8,)),
                lambda x: o.sums_over_classes(x, literal, (.8,), offset, y, own_offset), x)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('stored_by_class', [False, True])
def test_rows_longer_than_a_program(dtype, stored_by_class):
    "Several blocks a row, in most of which no class is counted; the largest logit is in the last."
    K = 20_000
    x, y = o.normal(2, K), torch.tensor([15_000, K-1])
    x[:, -2] = 9.
    offset = torch.full((1, K), -INF, dtype=F64)
    offset[0, [3, 15_000, K-1]] = torch.tensor([0., 1., 2.], dtype=F64)
    probs = torch.zeros(2, K, dtype=F64)
    probs[:, [0, K-1]] = .5
    def literal(x, own):
        s = .5*(x - x.detach().amax(1, keepdim=True))
        return (s + offset).logsumexp(1) - own(s)
    if stored_by_class: x = x.T.contiguous().T
    ones, share = torch.ones(2, 1, dtype=full(dtype), device=DEVICE), torch.ones(2, dtype=full(dtype), device=DEVICE)
    options = dict(offset=to(offset, full(dtype)), scale=.5)
    assert_same(lambda x: class_sums(x, to(y[:, None], dtype), ones, share=share, **options),
                lambda x: literal(x, lambda s: s.gather(1, y[:, None])[:, 0] + s.mean(1)), x, dtype=dtype)
    assert_same(lambda x: class_sums(x, None, None, probs=to(probs, full(dtype)), **options),
                lambda x: literal(x, lambda s: (probs*s).sum(1)), x, dtype=dtype)


# ---------------------------------------------------------------- labels that are drawn
def literal_draw(x, own, counts, label, label_count, log_eta, scale):
    "Of each row: sum_k alpha_k log(1 + Z/exp s_k), Z over the noise labels, the row's own left out."
    rows = []
    for i, s in enumerate(o.scores(x, log_eta, scale)):
        noise = [(label_count[i] if label is not None and k == label[i] else counts[k]) for k in range(len(s))]
        log_z = o.log_sum_exp([s[k] + c.log() for k, c in enumerate(noise) if c > 0])
        terms = [torch.logaddexp(torch.zeros((), dtype=F64), log_z - v) for v in s]
        rows.append(o.energy(own[i], terms))
    return torch.stack(rows)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('N, K, S', [(1, 2, 1), (4, 7, 2)])
@pytest.mark.parametrize('kind', ['classes', 'share', 'probs'])
@pytest.mark.parametrize('in_batch', [True, False])
def test_expected_sums(dtype, N, K, S, kind, in_batch):
    x, (own, literal) = o.normal(N, K), test_sums.class_case(N, K, S, kind)
    if kind == 'share':
        own['share'] = own['share'].abs()
        literal = [o.target(own['ids'][i], own['weights'][i], own['share'][i], K) for i in range(N)]
    counts, label = o.classes(4, K, seed=3).double(), o.classes(K, N, seed=4)
    counts[label] += 1
    eta, label_count = o.normal(K, seed=5), counts[label] - 1 + (K == 2)
    given = dict(label=label, label_offset=label_count.log()) if in_batch else {}
    own, given = ({n: to(v, full(dtype)) for n, v in d.items()} for d in (own, given))
    for log_eta, scale in ((None, 1.), (eta, .7)):
        assert_same(lambda x: expected_sums(x, **own, **given, offset=to(counts.log()[None], full(dtype)), scale=scale,
                                            log_eta=to(log_eta, full(dtype))),
                    lambda x: literal_draw(x, literal, counts, label if in_batch else None, label_count, log_eta,
                                           scale), x, dtype=dtype)


@pytest.mark.parametrize('scale', [1., 30.])
@pytest.mark.parametrize('dtype', [F32, F64])
def test_expected_sums_of_long_rows_masked_classes_and_sure_rows(scale, dtype):
    "Against the form in PyTorch, which is exact for sure rows."
    K = 20_000
    x, y, counts = o.normal(3, K).to(dtype), torch.tensor([5, 17_000, K-1]), torch.zeros(K, dtype=dtype)
    x.scatter_(1, y[:, None], scale)
    x[:, 0] = -INF
    counts[::7] = 1.
    ids, w = torch.stack([y, y-1], 1), torch.tensor([[.9, .1]], dtype=dtype).expand(3, 2)
    args = [to(v, dtype) for v in (x, ids, w, None, None, counts.log().clamp(min=-1e37)[None], None, None, None)]
    total, stats = triton_sums.expected_totals(*args, 1., None, True)
    found = total, triton_sums.expected_gradient(total.new_ones(3), 1., stats, *args, 1., None)
    for a, b in zip(found, expected_sums_torch(*args, 1., None, True)):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype]['rtol'], atol=1e-30)


# ---------------------------------------------------------------- sums over sparse candidates
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('N, M, K, S', [(1, 2, 2, 1), (3, 70, 4, 2), (35, 40, 3, 2), (5, 7, 40, 3)])
@pytest.mark.parametrize('one_weight', [False, True])
def test_sparse_sums(dtype, N, M, K, S, one_weight):
    "By pairs with one weight and S=2; else by candidates."
    x, ids, w = o.sparse_case(N, M, K, S, one_weight)
    eta = o.normal(K, seed=5)
    candidates = [o.target(ids[m], w[m], 0., K) for m in range(M)]
    rows = to(ids, dtype), to(w, full(dtype))
    rows = (rows[0], rows[1][:1].expand(M, S)) if one_weight else rows
    assert_same(lambda x: sparse_sums(x, *rows, rows[0][:N], rows[1][:N], one_weight=one_weight),
                lambda x: o.sums_over_candidates(x, candidates, candidates, True), x, dtype=dtype)
    own_ids, own_w, own_share = o.classes(K, N, 4, seed=6), o.uniform(N, 4, seed=7), o.uniform(N, seed=8)
    own = [o.target(own_ids[i], own_w[i], own_share[i], K) for i in range(N)]
    assert_same(lambda x: sparse_sums(x, *rows, to(own_ids, dtype), to(own_w, full(dtype)), in_batch=False, scale=.7,
                                      own_share=to(own_share, full(dtype)), log_eta=to(eta, full(dtype)),
                                      one_weight=one_weight),
                lambda x: o.sums_over_candidates(x, candidates, own, False, eta, .7), x, dtype=dtype)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('N, M, K, S', [(2, 5, 3, 1), (4, 9, 5, 2)])
def test_sparse_sums_with_shares_of_the_mean(dtype, N, M, K, S):
    x, ids, w = o.sparse_case(N, M, K, S, False)
    share = o.uniform(M, seed=1)
    candidates = [o.target(ids[m], w[m], share[m], K) for m in range(M)]
    ids, w, share = to(ids, dtype), to(w, full(dtype)), to(share, full(dtype))
    assert_same(lambda x: sparse_sums(x, ids, w, ids[:N], w[:N], share=share, own_share=share[:N], scale=.7),
                lambda x: o.sums_over_candidates(x, candidates, candidates, True, scale=.7), x, dtype=dtype)


@pytest.mark.parametrize('one_weight', [False, True])
def test_many_candidates_of_a_class_and_of_a_row(one_weight):
    "Candidates in parts that are joined, the largest last; a class's entries in blocks."
    x, ids, w = o.sparse_case(2, 600, 4, 2, one_weight)
    x, ids = x + 3*torch.arange(4), ids.sort(0)[0]
    candidates = [o.target(ids[m], w[m], 0., 4) for m in range(600)]
    rows = to(ids, F64), to(w, F64)
    for in_batch in (True, False):
        assert_same(lambda x: sparse_sums(x, *rows, rows[0][:2], rows[1][:2], in_batch=in_batch),
                    lambda x: o.sums_over_candidates(x, candidates, candidates, in_batch), x)


@pytest.mark.parametrize('M, S, K', [(1, 1, 1), (40, 3, 7), (300, 2, 5), (5, 1, 400)])
@pytest.mark.parametrize('N', [0, 3])
@pytest.mark.parametrize('comparisons', [0, 2**25])
def test_entries_are_ordered_beside_the_joined_parts(N, M, S, K, comparisons, monkeypatch):
    monkeypatch.setattr(triton_common, 'COMPARISONS', comparisons)
    ids, own = o.classes(K, M, S).to(DEVICE), to(o.normal(N, seed=1), F64)
    tops, sums = to(o.normal(2, N, seed=2), F64), to(o.uniform(2, N, seed=3), F64)
    entries = triton_common.entries_of(ids, K)
    assert entries.sorted == (comparisons == 0)
    *_, total = triton_common.join_parts(tops.flatten(), sums.flatten(), None, 2, own, entries)
    for a, b in zip(entries[1:3], by_class(ids, K)): assert torch.equal(a, b)
    torch.testing.assert_close(total, (tops + sums.log()).logsumexp(0) - own, rtol=1e-12, atol=1e-12)


FREQUENT = [300, 0, 64, 65, 1, 128, 129, 200, 3]  # entries of each class


def frequent_classes(S=2):
    "Candidates that name some classes often; logits in which each class counts."
    ids = torch.cat([torch.full((n,), k) for k, n in enumerate(FREQUENT)])
    ids = ids[torch.randperm(len(ids), generator=o.generator(3))]
    ids = ids[:len(ids)//S*S].reshape(-1, S)
    return o.normal(3, len(FREQUENT)), ids, o.uniform(len(ids), S, seed=2)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('programs', [1, 4, 2**14])  # one piece; some classes cut and others long without a cut; 64
@pytest.mark.parametrize('in_batch, with_share', [(True, False), (False, True)])
def test_pieces_of_frequent_classes(dtype, programs, in_batch, with_share, monkeypatch):
    monkeypatch.setattr(triton_candidates, 'PIECE_PROGRAMS', programs)
    x, ids, w = frequent_classes()
    share = o.uniform(len(ids), seed=4) if with_share else None
    candidates = [o.target(ids[m], w[m], share[m] if with_share else 0., len(FREQUENT)) for m in range(len(ids))]
    ids, w, share = to(ids, dtype), to(w, full(dtype)), None if share is None else to(share, full(dtype))
    own = ids[:3], w[:3]
    assert_same(lambda x: sparse_sums(x, ids, w, *own, share=share, own_share=share[:3] if with_share else None,
                                      in_batch=in_batch, scale=.7),
                lambda x: o.sums_over_candidates(x, candidates, candidates[:3], in_batch, scale=.7), x, dtype=dtype)


@pytest.mark.parametrize('programs, piece, cuts', [(1, 1024, 0), (4, 256, 3), (2**14, 64, 13)])
def test_no_program_adds_up_more_than_a_piece(programs, piece, cuts, monkeypatch):
    "Each class with a cut inside is in pieces of at most twice the length, of which nothing is left out."
    monkeypatch.setattr(triton_candidates, 'PIECE_PROGRAMS', programs)
    E = sum(FREQUENT)
    assert triton_candidates.piece_size(E, 1) == piece and (E - 1)//piece == cuts
    begin = torch.tensor([0, *FREQUENT]).cumsum(0).tolist()
    for first, last in zip(begin, begin[1:]):
        inside = [c for c in range(piece, E, piece) if first < c < last]
        long_without = last - first > 64 and not inside
        assert not long_without or last - first <= piece


def test_pieces_give_the_same_bits_every_time_and_have_a_gradient_to_check():
    x, ids, w = frequent_classes()
    ids, w = to(ids, F64), to(w/w.sum(1, keepdim=True), F64)  # else the row's largest does not cancel
    def rows(x): return sparse_sums(x, ids, w, ids[:3], w[:3])
    with set_backend('triton'):
        assert torch.equal(o.value_and_gradients(rows, to(x, F64))[1], o.value_and_gradients(rows, to(x, F64))[1])
        assert torch.autograd.gradcheck(rows, to(x, F64).requires_grad_())


@pytest.mark.parametrize('M', [1, 130, 1000])
@pytest.mark.parametrize('cache', [2**6, 2**30])
def test_parts_of_candidates_fit_the_cache(M, cache, monkeypatch):
    "More parts, so that fewer rows are worked on at once; the sums stay what they are."
    monkeypatch.setattr(triton_candidates, 'cache_bytes', lambda x: cache)
    x, ids, w = o.sparse_case(1, M, 5, 2, False)
    size = triton_candidates.candidates_of_part(to(torch.zeros(5, 32), F32), M)
    assert size % 64 == 0 and (size == 128 if cache == 2**6 and M > 128 else size >= min(M, 64))
    candidates = [o.target(ids[m], w[m], 0., 5) for m in range(M)]
    rows = to(ids, F64), to(w, F64)
    assert_same(lambda x: sparse_sums(x, *rows, rows[0][:1], rows[1][:1], in_batch=False),
                lambda x: o.sums_over_candidates(x, candidates, candidates, False), x)


@pytest.mark.filterwarnings('ignore:.* encountered in .*:RuntimeWarning')  # NumPy's, of the sums that are done again
@pytest.mark.parametrize('dtype', [F32, BF16])
@pytest.mark.parametrize('height', [70., 500.])
@pytest.mark.parametrize('in_batch', [True, False])
def test_rows_that_underflow_in_the_pair_form(dtype, height, in_batch):
    x, ids, w = o.sparse_case(6, 40, 5, 2, True)
    ids, w = ids.clamp(min=1), torch.tensor([[.25, .5]], dtype=F64).expand(40, 2)
    x[[0, 3], 0] = height
    candidates = [o.target(ids[m], w[m], 0., 5) for m in range(40)]
    ids, w = to(ids, dtype), to(w[:1], F32).expand(40, 2)
    assert_same(lambda x: sparse_sums(x, ids, w, ids[:6], w[:6], in_batch=in_batch, one_weight=True, scale=.9),
                lambda x: o.sums_over_candidates(x, candidates, candidates, in_batch, scale=.9), x, dtype=dtype,
                atol=2e-6*height if dtype == F32 else 2**-7)


@pytest.mark.parametrize('height', [10., 30., 60.])
def test_pairs_of_sure_rows_keep_their_digits(height):
    "What is left of the sum without the own pair, however little: no difference is taken."
    x, ids, _ = o.sparse_case(6, 80, 5, 2, True)
    ids[0], w = torch.tensor([0, 4]), torch.tensor([[.25, .75]], dtype=F64).expand(80, 2)
    ids[1:] = ids[1:].clamp(1, 3)
    x[0, [0, 4]] = height
    x = x.float().double()
    candidates = [o.target(ids[m], w[m], 0., 5) for m in range(80)]
    ids, w = to(ids, F32), to(w[:1], F32).expand(80, 2)
    assert_same(lambda x: sparse_sums(x, ids, w, ids[:6], w[:6], one_weight=True)[:1],
                lambda x: o.sums_over_candidates(x[:1], candidates, candidates, True), x, dtype=F32, rtol=2e-6,
                atol=1e-9)


@pytest.mark.parametrize('weights', [(1., 0.), (0., 1.), (.5, .5)])
def test_pairs_with_a_weight_of_zero(weights):
    x, ids, _ = o.sparse_case(4, 40, 3, 2, True)
    x, ids = torch.cat([torch.full((4, 1), -INF, dtype=F64), x], 1), ids + 1
    ids[::3, weights.index(min(weights))] = 0 if min(weights) == 0 else 1  # an empty slot names a masked class
    w = torch.tensor([weights], dtype=F64).expand(40, 2)
    candidates = [o.target(ids[m], w[m], 0., 4) for m in range(40)]
    ids, w = to(ids, F32), to(w[:1], F32).expand(40, 2)
    assert_same(lambda x: sparse_sums(x, ids, w, ids[:4], w[:4], one_weight=True),
                lambda x: o.sums_over_candidates(x, candidates, candidates, True), x, dtype=F32)


def test_same_bits_every_time():
    x, ids, w = o.sparse_case(6, 40, 5, 2, True)
    for one_weight in (True, False):
        def gradient():
            rows = to(ids, F32), to(w, F32)
            with set_backend('triton'): return o.value_and_gradients(
                lambda x: sparse_sums(x, *rows, rows[0][:6], rows[1][:6], one_weight=one_weight), to(x, F32))[1]
        assert torch.equal(gradient(), gradient())


# ---------------------------------------------------------------- products, losses, and what holds for all
@pytest.mark.parametrize('dtype', [F64, F32])
@pytest.mark.parametrize('num_rows', [None, 2])
@pytest.mark.parametrize('in_batch', [True, False])
def test_product_sums(dtype, num_rows, in_batch):
    a, b, shift = o.normal(5, 3), o.normal(8, 3, seed=1), o.normal(8, seed=2)
    assert_same(lambda *x: product_sums(*x, num_rows=num_rows, in_batch=in_batch),
                lambda *x: o.sums_over_products(*x, in_batch=in_batch), a, b, shift, dtype=dtype)


def test_products_longer_than_a_program():
    u = o.normal(2, 20_000)
    for start in (None, 17_000):
        mine, wanted = to(u, F64).clone(), u.clone()
        total = triton_sums.softmax_without_own(mine, start)
        own = 0. if start is None else u.diagonal(start)
        if start is not None: wanted.diagonal(start).fill_(-INF)
        torch.testing.assert_close(total.cpu(), wanted.logsumexp(1) - own, rtol=1e-12, atol=1e-12)
        wanted = wanted.softmax(1)
        if start is not None: wanted.diagonal(start).fill_(-1.)
        torch.testing.assert_close(mine.cpu(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('kind', test_scores.KINDS)
@pytest.mark.parametrize('source', test_scores.SOURCES)
def test_losses(source, kind):
    "The whole loss through the kernels, against the plain formulas."
    def loss(x):
        noise, t = test_scores.SOURCES[source](kind), test_scores.targets(kind).to(DEVICE)
        if isinstance(noise, torch.Tensor): noise = noise.to(DEVICE)
        return soft_target_info_nce(x, t, noise_samples=noise, noise_probs=test_scores.ETA.to(DEVICE), temperature=.7,
                                    reduction='none')
    if DEVICE == 'cuda' and source.startswith('fresh'): pytest.skip('generators differ between devices')
    results = []
    for backend in ('triton', 'reference'):
        with set_backend(backend): results.append(o.value_and_gradients(loss, test_scores.X.to(DEVICE)))
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('kind', test_scores.KINDS)
def test_losses_over_the_draw(kind):
    results = []
    for backend in ('triton', 'reference'):
        torch.manual_seed(0)
        def loss(x):
            torch.manual_seed(0)
            return expected_info_nce(x, test_scores.targets(kind).to(DEVICE), temperature=.7, reduction='none')
        with set_backend(backend): results.append(o.value_and_gradients(loss, test_scores.X.to(DEVICE)))
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', [n for n in test_sums.SUMS if n != 'products'])  # whose scores are not centred
def test_a_shift_changes_nothing(name):
    "fp32 logits near 4096, a shift that is exact."
    x = (1024*test_sums.X.float()).round().to(DEVICE)/1024
    with set_backend('triton'): found = [o.value_and_gradients(test_sums.SUMS[name], y) for y in (x, x + 4096)]
    for a, b in zip(*found): assert torch.equal(a, b)


@pytest.mark.parametrize('name', test_sums.SUMS)
def test_not_a_number_masked_and_empty(name):
    x, call = test_sums.X.to(DEVICE, copy=True), test_sums.SUMS[name]
    x[1, 1] = float('nan')
    with set_backend('triton'):
        rows, gradient = o.value_and_gradients(call, x)
        assert rows[1].isnan() and rows[[0, 2, 3]].isfinite().all() and gradient[[0, 2, 3]].isfinite().all()
        if name == 'products': return
        x[1] = -INF  # a row without a possible class
        rows, gradient = o.value_and_gradients(call, x)
        assert rows[1] == INF and gradient.isfinite().all()
        rows, gradient = o.value_and_gradients(call, x[:0])
        assert rows.shape == (0,) and gradient.shape == (0, 3)


@pytest.mark.parametrize('name', ['classes', 'bags', 'pairs', 'logits'])
def test_compiled_and_differentiated_twice(name):
    call, inputs = test_sums.COMPILED[name], [to(x.detach(), F64) for x in test_sums.batch(5)]
    x = inputs.pop(0).requires_grad_()
    with set_backend('triton'):
        rows = torch.compile(call, fullgraph=True, backend='aot_eager')(x, *inputs)
        torch.testing.assert_close(rows, call(x, *inputs), rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradgradcheck(lambda x: call(x, *inputs), x)


def test_more_than_two_exponents_are_refused():
    x, ids, w = to(o.normal(2, 3), F64), to(o.classes(3, 2, 1), F64), to(o.uniform(2, 1), F64)
    with set_backend('triton'), pytest.raises(ValueError, match='exponents must be one or two, got 3'):
        class_sums(x, ids, w, exponents=(.3, .3, .4))


# ---------------------------------------------------------------- what only a card would show
@triton.jit
def scaled(X, OUT, scale): tl.store(OUT, scale*tl.load(X))


@triton.jit
def scaled_exactly(X, OUT, scale:tl.float64): tl.store(OUT, scale*tl.load(X))


@pytest.fixture
def floats_of_a_card(monkeypatch):
    "The interpreter with numbers of the host rounded to fp32, as in a launch those that are not declared as fp64."
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import _normalize_ty
    call = GridExecutor.__call__
    def rounded(self, *args, **kwargs):
        declared = {n for n, a in inspect.get_annotations(self.fn).items() if _normalize_ty(a) == 'fp64'}
        bound = inspect.signature(self.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
        undeclared = [n for n, v in bound.arguments.items() if type(v) is float and n not in declared]
        bound.arguments.update({name: float(np.float32(bound.arguments[name])) for name in undeclared})
        return call(self, *bound.args, **bound.kwargs)
    monkeypatch.setattr(GridExecutor, '__call__', rounded)


@needs_interpreter
def test_the_rounding_of_numbers_of_the_host_would_show(floats_of_a_card):
    x = torch.ones(1, dtype=F64)
    for kernel, exact in ((scaled, False), (scaled_exactly, True)):
        out = torch.zeros(1, dtype=F64)
        kernel[(1,)](x, out, .3)
        assert (out == .3).item() == exact


@needs_interpreter
@pytest.mark.parametrize('kind', ['hard', 'one lam', 'each epsilon', 'dense'])
@pytest.mark.parametrize('source', ['in batch', 'closed form mixed'])
def test_float64_keeps_its_digits_on_a_card(source, kind, floats_of_a_card): test_losses(source, kind)


@needs_interpreter
def test_offsets_beyond_two_to_the_31(monkeypatch, tmp_path):
    "Rows 2**30 numbers apart, in a file of which only what is written takes place."
    from triton.runtime.interpreter import GridExecutor
    monkeypatch.setattr(GridExecutor, '_restore_args_dev', lambda *args: None)  # which copies all memory on itself
    x, ids, w = o.sparse_case(3, 9, 6, 2, True)
    x, rows = x.float(), (ids, w[:1].float().expand(9, 2))
    memory = torch.from_file(str(tmp_path/'far'), shared=True, size=2**31 + 6)
    far = memory.as_strided((3, 6), (2**30, 1)).copy_(x)
    def everything(x, one_weight):
        own = rows[0][:3], rows[1][:3]
        classes = x, *own, None, None, None, None, None, [1.], 1.
        total, stats = triton_sums.class_totals(*classes, True)
        return (total, triton_sums.class_gradient(torch.ones(3), 1., stats, *classes),
                *triton_sums.sparse_sums(x, *rows, None, *own, None, None, 1., True, one_weight, 0, True))
    for one_weight in (False, True):  # by candidates, and by pairs
        for a, b in zip(everything(x, one_weight), everything(far, one_weight)): assert torch.equal(a, b)


def test_launches_go_to_the_device_of_the_tensors(monkeypatch):
    entered = []
    class Recorder:
        def __init__(self, x): self.x = x
        def __enter__(self): entered.append(self.x)
        def __exit__(self, *exc): pass
    monkeypatch.setattr(torch.cuda, 'device_of', Recorder)
    x, ids, w = (to(v, F64) for v in o.sparse_case(2, 5, 3, 2, False))
    triton_sums.class_totals(x, ids[:2], w[:2], None, None, None, None, None, [1.], 1., False)
    triton_sums.sparse_sums(x, ids, w, None, ids[:2], w[:2], None, None, 1., True, False, 0, True)
    triton_sums.softmax_without_own(x, None)
    assert len(entered) == 4 and all(e is x for e in entered)


# ---------------------------------------------------------------- compiled without a card
def compiled(which, tmp_path):
    "In a process of its own: under the interpreter nothing is compiled."
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'} | {'TRITON_CACHE_DIR': str(tmp_path)}
    script = Path(__file__).with_name('compile_kernels.py')
    done = subprocess.run([sys.executable, script, which], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


KERNELS = {name for module in (triton_common, triton_sums, triton_candidates, triton_pairs, triton_products)
           for name in vars(module) if name.endswith('_kernel')}
SHARED = {80: 163*1024, 90: 227*1024, 100: 227*1024}  # bytes of a program, by compute capability
LEDGER = Path(__file__).parents[2]/'results'/'kernels.csv'


def check_launches(rows, capability):
    "No spills, shared memory within a card's, indices within 32 bits, numbers of the host in fp64, wide loads."
    ours = [row for row in rows if not row['kernel'].startswith('torch:')]
    assert {row['kernel'] for row in ours} == KERNELS
    assert [row for row in ours if row['spilled'] or row['shared'] > SHARED[capability] or row['overflows']] == []
    assert all(row['floats'] in ('', 'fp64') for row in ours)
    assert all(row['tensor_cores'] for row in ours if row['kernel'] == 'pair_kernel')
    readers = ('class_kernel', 'class_gradient_kernel', 'expected_kernel', 'expected_gradient_kernel', 'rows_kernel',
               'lse_kernel', 'softmax_kernel', 'centre_kernel')
    narrow = [row['case'] for row in ours if row['kernel'] in readers and not row['wide'] and 'fp64' not in row['case']]
    assert set(narrow) <= {'classes, bf16, K=10'}, narrow  # 20 bytes a row
    launches = Counter(row['case'] for row in rows)
    assert all(n <= 2 for case, n in launches.items() if re.match('(far: )?(classes|drawn|product)', case))
    def most(case): return 6 if 'N=64' in case else 8 if 'pairs' in case else 7
    assert all(n <= most(case) for case, n in launches.items())  # many entries: PyTorch's sort; pairs: two passes


def check_bytes(rows, capability):
    """Of arrays as large as the logits: a row of any length is read once in each pass.

    Forward reads the logits, backward reads them and writes the gradient: half a floor, and a floor."""
    once = re.compile(r'(far: )?(classes|hard labels), .*K=\d{3,}(, N=\d+)?|drawn labels, .*, counts')
    for row in rows:
        if not once.fullmatch(row['case']): continue
        if 'K=21841' in row['case'] and capability >= 90: continue  # a cluster, a third of which is beyond the row
        assert row['mib'] <= 1.05*row['floor_mib']*row['launch']/2 + 1, row


@pytest.mark.parametrize('capability', SHARED)
def test_every_kernel_compiles_for_a_card(capability, tmp_path):
    "At every launched configuration; and the committed table says what this compiler says."
    rows = compiled(str(capability), tmp_path)
    check_launches(rows, capability)
    check_bytes(rows, capability)
    with open(LEDGER, newline='', encoding='utf-8') as f:
        kept = [row for row in csv.DictReader(f) if row['capability'] == str(capability)]
    assert [(r['case'], r['kernel']) for r in kept] == [(r['case'], r['kernel']) for r in rows]
    if kept[0]['triton'] == rows[0]['triton']:  # another compiler gives other registers, within the same limits
        assert [{k: str(v) for k, v in row.items()} for row in rows] == kept


def test_no_batch_size_is_compiled_for_anew(tmp_path):
    "But for where a launcher chooses otherwise: by pairs a kernel is used in two ways, and so are some others."
    binaries, = compiled('sizes', tmp_path)
    twice = 'pair_kernel', 'again_kernel', 'rows_kernel', 'join_kernel', 'softmax_kernel'
    assert binaries == {name: 2 if name in twice else 1 for name in KERNELS}


# ---------------------------------------------------------------- the intervals of the compile check
def test_an_index_that_leaves_32_bits_is_found():
    "In a process of its own, as above: a product, the same in 64 bits, and a sum over the rounds of a loop."
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import compile_kernels as c, index_kernels as t, index_ranges as r
from triton.runtime import driver
driver.set_active(c.NamesACard(90))
for kernel, K in ((t.narrow_kernel, 2**10), (t.narrow_kernel, 2**8), (t.wide_kernel, 2**10), (t.looped_kernel, 2**8),
                  (t.looped_kernel, 2**11)):
    binary = kernel.warmup(torch.float32, 2**20, K, grid=(2**22,))
    found, moved = r.ranges(binary.asm['ttir'], dict(N=2**20, K=K), (2**22,), {})
    print(len(found), moved['X'])
"""
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'} | {'TRITON_INTERPRET': '0'}
    done = subprocess.run([sys.executable, '-c', script, str(Path(__file__).parent)], env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split('\n')[:5] == [f'{n} {2**24}' for n in (1, 0, 0, 0, 1)]
