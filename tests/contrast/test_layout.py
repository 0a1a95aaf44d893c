"Scores of a block of rows, blocks of rows, and candidates by class, each against a loop."
import pytest
import torch

import literal_sums as o
from literal_sums import F64, INF
from softnce.contrast.layout import (LOW, by_class, centred, empty_gradient, in_full, masked, own_score, partners,
                                     row_blocks, with_mean, without_mean)


@pytest.mark.parametrize('scale', [1., .3, 20.])
@pytest.mark.parametrize('with_eta', [False, True])
def test_centred(scale, with_eta):
    x, eta = o.normal(4, 5), o.uniform(5, seed=1).log() if with_eta else None
    o.assert_same(lambda x: centred(x, eta, scale).flatten(),
                  lambda x: torch.cat(o.scores(x, eta, scale)), x)
    torch.testing.assert_close(centred(x, eta, scale), torch.stack(o.scores(x, eta, scale)), rtol=0, atol=1e-14)


def test_a_shift_changes_no_bit():
    x = (1024*o.normal(3, 7).float()).round()/1024  # so that adding 4096 is exact
    assert torch.equal(centred(x + 4096), centred(x))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, F64])
def test_masked_classes_and_masked_rows(dtype):
    x = torch.tensor([[1., -INF, 0.], [-INF]*3], dtype=dtype)
    s = centred(x)
    assert s.dtype == in_full(dtype) and s.isfinite().all()
    assert s[0, [0, 2]].tolist() == [0., -1.] and (s[x == -INF] == LOW).all()
    assert (s[x == -INF].exp() == 0).all() and (0*s == 0).all() and (3*s).isfinite().all()


def test_what_is_not_a_number_stays_none(): assert centred(torch.tensor([[float('nan'), 1.]])).isnan().any()


def test_centred_leaves_its_input_and_writes_where_told():
    x, before = o.normal(3, 4).bfloat16(), o.normal(3, 4).bfloat16()
    out = torch.empty(3, 4)
    assert centred(x, scale=2., out=out) is out and torch.equal(x, before)
    torch.testing.assert_close(out, torch.stack(o.scores(x.float(), scale=2.)))


def test_own_score():
    s, ids, w = o.normal(3, 4), o.classes(4, 3, 2), o.uniform(3, 2)
    share, probs = o.uniform(3, seed=1), o.uniform(3, 4, seed=2)
    for share_ in (None, share):
        own = [o.target(ids[i], w[i], 0. if share_ is None else share[i], 4) for i in range(3)]
        torch.testing.assert_close(own_score(s, ids, w, share_, None),
                                   torch.stack([o.energy(a, r) for a, r in zip(own, s)]))
        own = [probs[i] + (0. if share_ is None else share[i]/4) for i in range(3)]
        torch.testing.assert_close(own_score(s, None, None, share_, probs),
                                   torch.stack([o.energy(a, r) for a, r in zip(own, s)]))


@pytest.mark.parametrize('weight', [1., .3, 1e-16])
def test_mass_on_a_masked_class(weight):
    s = centred(torch.tensor([[0., -INF]]))
    own = own_score(s, torch.tensor([[0, 1]]), torch.tensor([[1-weight, weight]]), None, None)
    assert masked(own) == -INF and masked(s[:, 0]) == 0.


@pytest.mark.parametrize('num_rows, width, limit', [(0, 3, 10), (1, 100, 10), (7, 3, 10), (10, 0, 5), (12, 4, 8)])
def test_row_blocks(num_rows, width, limit):
    blocks = row_blocks(num_rows, width, limit)
    assert [i for b in blocks for i in range(num_rows)[b]] == list(range(num_rows))
    assert all(b.stop - b.start == 1 or (b.stop - b.start)*width <= limit for b in blocks)


@pytest.mark.parametrize('dtype', [torch.bfloat16, F64])
def test_empty_gradient(dtype):
    x = torch.zeros(3, 5, dtype=dtype)
    for by in (False, True):
        g = empty_gradient(x, by)
        assert g.shape == (3, 5) and g.dtype == dtype and g.stride() == ((1, 3) if by else (5, 1))


@pytest.mark.parametrize('M, S, K', [(1, 1, 1), (5, 2, 3), (40, 3, 7)])
def test_by_class(M, S, K):
    ids = o.classes(K, M, S)
    order, begin = by_class(ids, K)
    flat = ids.flatten().tolist()
    assert order.tolist() == [e for k in range(K) for e in range(M*S) if flat[e] == k]
    assert begin.tolist() == [sum(f < k for f in flat) for k in range(K+1)]


def test_the_mean_as_a_class():
    table, ids, w, share = o.normal(3, 4), o.classes(3, 5, 2), o.uniform(5, 2), o.uniform(5, seed=1)
    assert with_mean(table, ids, w, None)[0] is table
    wide, ids_, w_ = with_mean(table, ids, w, share)
    for m in range(5):
        scores = (w_[m, :, None]*wide[ids_[m]]).sum(0)
        wanted = torch.stack([o.energy(o.target(ids[m], w[m], share[m], 3), column) for column in table.T])
        torch.testing.assert_close(scores, wanted)
    x = table.clone().requires_grad_()
    wide = with_mean(x, ids, w, share)[0]
    weights = o.normal(4, 4, seed=2)
    wanted, = torch.autograd.grad((weights*wide).sum(), x)
    torch.testing.assert_close(without_mean(weights.clone(), share), wanted)
    assert without_mean(weights, None) is weights


def test_partners():
    ids = o.classes(4, 20, 2)
    p1, b1, p2, b2 = partners(ids, 4)
    for k in range(4):
        first = p1[b1[k]:(*b1.tolist(), 20)[k+1]].tolist()
        second = p2[b2[k]:(*b2.tolist(), 20)[k+1]].tolist()
        assert first == [b for a, b in ids.tolist() if a == k]
        assert second == [a for a, b in ids.tolist() if b == k]
