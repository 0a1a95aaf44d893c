"The sums against loops, value and gradient; and each way in which they can be called."
import pytest
import torch
import torch.autograd.forward_ad as fwd

import literal_sums as o
from literal_sums import F64, INF
from softnce.contrast import set_backend, sums
from softnce.contrast.sums import (class_sums, class_sums_reference, product_sums, product_sums_reference, sparse_sums,
                                   sparse_sums_reference)
from softnce.experiments.bench_measure import memory

BACKENDS = 'torch', 'reference'


# ---------------------------------------------------------------- sums over classes
def class_case(N, K, S, kind):
    "Own targets of a kind, as the sums take them and as lists of numbers."
    ids, w = o.classes(K, N, S), o.uniform(N, S)
    share = o.normal(N, seed=1) if kind == 'share' else None
    if kind == 'probs':
        probs = o.uniform(N, K, seed=2)
        return dict(ids=None, weights=None, probs=probs), probs.tolist()
    own = [o.target(ids[i], w[i], 0. if share is None else share[i], K) for i in range(N)]
    return dict(ids=ids, weights=w, share=share), own


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('N, K, S', [(1, 2, 1), (4, 3, 2), (3, 7, 3)])
@pytest.mark.parametrize('exponents', [(1.,), (.3, .6)])
@pytest.mark.parametrize('kind', ['classes', 'share', 'probs'])
def test_class_sums(N, K, S, exponents, kind, backend):
    x, (own, literal) = o.normal(N, K), class_case(N, K, S, kind)
    offset, eta = o.normal(len(exponents), K, seed=3), o.normal(K, seed=4)
    offset[:, -1] = -INF  # a class without a candidate
    with set_backend(backend):
        for offsets in (None, offset[:1], offset):
            for log_eta, scale in ((None, 1.), (eta, .7)):
                o.assert_same(
                    lambda x: class_sums(x, **own, offset=offsets, exponents=exponents, log_eta=log_eta, scale=scale),
                    lambda x: o.sums_over_classes(x, literal, exponents, offsets, log_eta=log_eta, scale=scale), x)


@pytest.mark.parametrize('piece', [1, 8, 10**6])
def test_own_scores_of_dense_targets_a_few_rows_at_a_time(piece, monkeypatch):
    "One row, one row of seven classes, all; also with a share of the mean score."
    monkeypatch.setattr(sums, 'PIECE', piece)
    x, probs, share = o.normal(5, 7), o.uniform(5, 7, seed=2), o.normal(5, seed=1)
    literal = (probs + share[:, None]/7).tolist()
    o.assert_same(lambda x: class_sums(x, None, None, probs=probs, share=share),
                  lambda x: o.sums_over_classes(x, literal, (1.,), None), x)


def test_dense_targets_take_no_block_of_their_own():
    "Peak of value and gradient, N x K = 2 MiB of fp32: the gradient, a block at a time, and pieces of the products."
    x, probs = torch.randn(64, 8192, requires_grad=True), torch.full((64, 8192), 1/8192)
    def call(): return torch.autograd.grad(class_sums(x, None, None, probs=probs).sum(), x)
    call()
    assert memory(call)['peak_mib'] < 2.2


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('weight, exponent', [(1., 1.), (.8, .8), (.8, 1.)])
def test_class_sums_with_an_offset_of_the_own_class(weight, exponent, backend):
    "In place of the class's offset; the weight of the own class is not in it."
    x, y, offset, own_offset = o.normal(5, 4), o.classes(4, 5), o.normal(1, 4, seed=1), o.normal(5, seed=2)
    own_offset[0] = -INF
    w = torch.full((5, 1), weight, dtype=F64)
    literal = [o.target(k[None], v, 0., 4) for k, v in zip(y, w)]
    with set_backend(backend):
        for offsets in (None, offset):
            o.assert_same(lambda x: class_sums(x, y[:, None], w, offset=offsets, own_offset=own_offset,
                                               exponents=(exponent,), scale=1.3),
                          lambda x: o.sums_over_classes(x, literal, (exponent,), offsets, y, own_offset, scale=1.3), x)


def test_class_sums_of_logits_stored_by_class():
    x, (own, literal) = o.normal(3, 7).T.contiguous().T, class_case(3, 7, 2, 'classes')
    assert x.stride(0) == 1
    o.assert_same(lambda x: class_sums(x, **own, exponents=(.3, .6)),
                  lambda x: o.sums_over_classes(x, literal, (.3, .6)), x)


@pytest.mark.parametrize('K', [2**17, 2**18 + 1])
def test_class_sums_of_rows_longer_than_a_block(K):
    x, y = o.normal(5, K), o.classes(K, 5)
    with set_backend('torch'): mine = o.value_and_gradients(
        lambda x: class_sums(x, y[:, None], torch.ones(5, 1, dtype=F64)), x)
    wanted = o.value_and_gradients(lambda x: torch.nn.functional.cross_entropy(x, y, reduction='none'), x)
    for a, b in zip(mine, wanted): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- sums over sparse candidates
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('N, M, K, S', [(1, 1, 2, 1), (1, 4, 2, 1), (3, 3, 4, 2), (2, 11, 3, 2), (5, 7, 6, 3)])
@pytest.mark.parametrize('one_weight', [False, True])
@pytest.mark.parametrize('num_rows', [None, 1, 2])
def test_sparse_sums(N, M, K, S, one_weight, num_rows, backend):
    x, ids, w = o.sparse_case(N, M, K, S, one_weight)
    candidates = [o.target(ids[m], w[m], 0., K) for m in range(M)]
    options = dict(one_weight=one_weight, num_rows=num_rows)
    if M > 1:
        with set_backend(backend):
            for log_eta, scale in ((None, 1.), (o.normal(K, seed=5), .7)):
                o.assert_same(
                    lambda x: sparse_sums(x, ids, w, ids[:N], w[:N], log_eta=log_eta, scale=scale, **options),
                    lambda x: o.sums_over_candidates(x, candidates, candidates, True, log_eta, scale), x)
    own_ids, own_w = o.classes(K, N, 4, seed=6), o.uniform(N, 4, seed=7)
    own = [o.target(own_ids[i], own_w[i], 0., K) for i in range(N)]
    with set_backend(backend):
        o.assert_same(lambda x: sparse_sums(x, ids, w, own_ids, own_w, in_batch=False, **options),
                      lambda x: o.sums_over_candidates(x, candidates, own, False), x)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('N, M, K, S', [(1, 2, 3, 1), (4, 9, 5, 2)])
@pytest.mark.parametrize('in_batch', [False, True])
def test_sparse_sums_with_shares_of_the_mean(N, M, K, S, in_batch, backend):
    x, ids, w = o.sparse_case(N, M, K, S, False)
    share, own_share = o.uniform(M, seed=1), o.uniform(M, seed=1)[:N] if in_batch else o.uniform(N, seed=2)
    own_ids, own_w = (ids[:N], w[:N]) if in_batch else (o.classes(K, N, 2, seed=3), o.uniform(N, 2, seed=4))
    candidates = [o.target(ids[m], w[m], share[m], K) for m in range(M)]
    own = [o.target(own_ids[i], own_w[i], own_share[i], K) for i in range(N)]
    with set_backend(backend):
        o.assert_same(lambda x: sparse_sums(x, ids, w, own_ids, own_w, share=share, own_share=own_share,
                                            in_batch=in_batch, num_rows=2, scale=.7),
                      lambda x: o.sums_over_candidates(x, candidates, own, in_batch, scale=.7), x)


@pytest.mark.parametrize('weights', [(.3, .6), (1., 0.), (.5, .5)])
@pytest.mark.parametrize('in_batch', [False, True])
def test_pairs_and_bags_count_the_same_candidates(weights, in_batch):
    "More candidates than eight times the classes: the pair form."
    x, ids, _ = o.sparse_case(4, 40, 3, 2, True)
    w = torch.tensor(weights, dtype=F64).expand(40, 2)
    candidates = [o.target(ids[m], w[m], 0., 3) for m in range(40)]
    for one_weight in (True, False):
        o.assert_same(lambda x: sparse_sums(x, ids, w, ids[:4], w[:4], one_weight=one_weight, in_batch=in_batch),
                      lambda x: o.sums_over_candidates(x, candidates, candidates, in_batch), x)


@pytest.mark.parametrize('height', [50., 300., 1e4])
def test_pairs_that_underflow_are_done_again(height):
    x, ids, w = o.sparse_case(6, 80, 5, 2, True)
    x, w, ids = x.float(), w.float(), ids.clamp(min=1)
    x[[0, 3], 0] = height  # no candidate has class 0
    candidates = [o.target(ids[m], w[m], 0., 5) for m in range(80)]
    truth, slope = o.value_and_gradients(lambda x: o.sums_over_candidates(x, candidates, candidates, True), x.double())
    rows, gradient = o.value_and_gradients(lambda x: sparse_sums(x, ids, w, ids[:6], w[:6], one_weight=True), x)
    torch.testing.assert_close(rows.double(), truth, rtol=1e-5, atol=1e-6*height)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-6*height)


@pytest.mark.parametrize('height', [10., 30., 90.])
def test_pairs_of_sure_rows_keep_their_digits(height):
    "The own pair is nearly the whole sum; what is left without it is as exact as by bags."
    x, ids, w = o.sparse_case(6, 80, 5, 2, True)
    ids[0] = torch.tensor([0, 4])
    ids[1:] = ids[1:].clamp(1, 3)
    x[0, [0, 4]] = height
    x, w = x.float(), w.float()
    candidates = [o.target(ids[m], w[m], 0., 5) for m in range(80)]
    truth, slope = o.value_and_gradients(lambda x: o.sums_over_candidates(x, candidates, candidates, True), x.double())
    rows, gradient = o.value_and_gradients(lambda x: sparse_sums(x, ids, w, ids[:6], w[:6], one_weight=True), x)
    torch.testing.assert_close(rows.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-5*slope.abs().max().item())


def test_same_bits_every_time():
    x, ids, w = o.sparse_case(64, 64, 10, 2, False)
    def gradient(): return o.value_and_gradients(lambda x: sparse_sums(x, ids, w.float(), ids, w.float()), x.float())[1]
    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(5))


# ---------------------------------------------------------------- sums over products
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('num_rows', [None, 1, 2, 5])
@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize('in_batch', [False, True])
def test_product_sums(num_rows, shifted, in_batch, backend):
    a, b, shift = o.normal(5, 3), o.normal(8, 3, seed=1), o.normal(8, seed=2)
    inputs = (a, b, shift) if shifted else (a, b)
    with set_backend(backend):
        o.assert_same(lambda *x: product_sums(*x, in_batch=in_batch, num_rows=num_rows),
                      lambda *x: o.sums_over_products(*x, in_batch=in_batch), *inputs)
        o.assert_same(lambda a: product_sums(a, b, num_rows=num_rows),  # the gradient made in the forward pass
                      lambda a: o.sums_over_products(a, b), a)
        o.assert_same(lambda b: product_sums(a, b, shift), lambda b: o.sums_over_products(a, b, shift), b)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('in_batch', [False, True])
def test_product_sums_of_logits(in_batch, backend):
    "The own score is subtracted where it is among the candidates."
    x, alpha, eta = o.normal(4, 3), o.uniform(6, 3, seed=1), o.normal(3, seed=2)
    own = alpha.tolist() if in_batch else [[0.]*3]*4
    with set_backend(backend):
        for log_eta, scale in ((None, 1.), (eta, .7)):
            options = dict(log_eta=log_eta, scale=scale, in_batch=in_batch, linear=False, num_rows=3)
            o.assert_same(lambda x: product_sums(x, alpha, **options),
                          lambda x: o.sums_over_candidates(x, alpha.tolist(), own, in_batch, log_eta, scale), x)


# ---------------------------------------------------------------- every sum, called in every way
X, IDS, W = o.sparse_case(4, 30, 3, 2, True)
ALPHA = o.normal(30, 3, seed=8).softmax(1)
SUMS = {
    'classes': lambda x: class_sums(x, *own_of(x), exponents=(.3, .6)),
    'probabilities': lambda x: class_sums(x, None, None, probs=like(x, ALPHA)[:len(x)]),
    'bags': lambda x: sparse_sums(x, like(x, IDS), like(x, W), *own_of(x)),
    'pairs': lambda x: sparse_sums(x, like(x, IDS), like(x, W), *own_of(x), one_weight=True),
    'logits': lambda x: product_sums(x, like(x, ALPHA), linear=False),
    'products': lambda x: product_sums(x, like(x, ALPHA)),
}


def own_of(x): return like(x, IDS)[:len(x)], like(x, W)[:len(x)]


def like(x, given):
    "Where the logits are, in the precision of computation."
    return given.to(x.device, torch.promote_types(x.dtype, torch.float32) if given.is_floating_point() else given.dtype)


def jacobian(call, x, **options): return torch.autograd.functional.jacobian(call, x, **options)


@pytest.fixture(params=SUMS)
def call(request): return SUMS[request.param]


def test_gradients_of_gradients(call):
    assert torch.autograd.gradgradcheck(call, X.clone().requires_grad_())


def test_gradients_of_gradients_of_both_factors():
    a, b, shift = (x.requires_grad_() for x in (o.normal(3, 2), o.normal(4, 2, seed=1), o.normal(4, seed=2)))
    assert torch.autograd.gradgradcheck(product_sums, (a, b, shift))
    assert torch.autograd.gradgradcheck(lambda a: product_sums(a, b.detach()), a)


@pytest.mark.parametrize('compiled', [False, True])
def test_a_kept_graph_gives_its_gradient_again(call, compiled):
    "The gradient of the forward pass is weighted in place, but only by the last backward pass."
    x, weights = X.clone().requires_grad_(), torch.arange(1., 5., dtype=F64)
    with set_backend('reference'): expected, = torch.autograd.grad(call(x), x, weights)
    rows = (torch.compile(call, fullgraph=True, backend='aot_eager') if compiled else call)(x)
    for keep in (True, True, False):
        gradient, = torch.autograd.grad(rows, x, weights, retain_graph=keep)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match='second time'): torch.autograd.grad(rows, x, weights)


def test_all_rows_of_a_jacobian_at_once(call):
    with set_backend('reference'): expected = jacobian(call, X)
    torch.testing.assert_close(jacobian(call, X, vectorize=True), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacobian(call, X), expected, rtol=1e-12, atol=1e-12)


def test_transforms_and_dual_numbers(call):
    direction = o.normal(4, 3, seed=9)
    rows, slope = call(X), o.value_and_gradients(call, X)[1]
    weights = torch.linspace(-1, 2, 4, dtype=F64)
    tangent = jacobian(call, X).flatten(1) @ direction.flatten()
    with fwd.dual_level():
        out = fwd.unpack_dual(call(fwd.make_dual(X, direction)))
    torch.testing.assert_close(out.primal, rows)
    torch.testing.assert_close(out.tangent, tangent)
    torch.testing.assert_close(torch.func.jvp(call, (X,), (direction,))[1], tangent)
    torch.testing.assert_close(torch.func.grad(lambda x: (weights*call(x)).sum())(X), slope)
    many = torch.stack([X, X + direction, -X])
    torch.testing.assert_close(torch.vmap(call)(many), torch.stack([call(x) for x in many]))


def test_meta_and_fake_tensors(call):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = call(torch.empty(4, 3, dtype=F64))
        assert rows.shape == (4,) and rows.dtype == F64


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('scale', [.1, 1., 100.])
@pytest.mark.parametrize('name', [n for n in SUMS if n != 'products'])  # which takes embeddings in full precision
def test_sixteen_bits(name, dtype, scale):
    "Computed in fp32 from the 16-bit logits: only the gradient is rounded, to 16 bits."
    call, x = SUMS[name], (scale*X).to(dtype)
    truth, slope = o.value_and_gradients(call, x.double())
    for autocast in (False, True):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
            rows, gradient = o.value_and_gradients(call, x)
        assert rows.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(rows.double(), truth, rtol=1e-6, atol=1e-6*max(1., scale))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.double(), slope, rtol=eps, atol=2*eps**2 + 2e-6*max(1., scale))


def test_autocast_changes_nothing(call):
    wanted = o.value_and_gradients(call, X.float())
    with torch.autocast('cpu', dtype=torch.bfloat16): found = o.value_and_gradients(call, X.float())
    for a, b in zip(found, wanted): assert torch.equal(a, b)


def test_a_row_without_gradient_needs_no_memory_for_one(call):
    with torch.no_grad(): rows = call(X.clone().requires_grad_())
    assert not rows.requires_grad
    torch.testing.assert_close(rows, call(X.clone().requires_grad_()).detach(), rtol=1e-13, atol=1e-13)


def test_what_is_not_a_number_shows(call):
    x = X.clone()
    x[1, 1] = float('nan')
    rows = call(x)
    assert rows[1].isnan() and rows[[0, 2, 3]].isfinite().all()


def test_one_row(call):
    with set_backend('reference'): wanted = o.value_and_gradients(call, X[:1])
    for a, b in zip(o.value_and_gradients(call, X[:1]), wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_rows(call):
    x = X[:0].clone().requires_grad_()
    rows = call(x)
    assert rows.shape == (0,) and rows.dtype == F64
    assert torch.autograd.grad(rows.sum(), x)[0].shape == (0, 3)


# ---------------------------------------------------------------- masked classes, and targets with a gradient
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('one_weight', [False, True])
def test_masked_classes_cost_nothing_in_empty_slots(one_weight, backend):
    "An empty slot is class 0 with weight 0; class 0 is masked."
    x, ids, _ = o.sparse_case(4, 40, 3, 2, True)
    x, ids = torch.cat([torch.full((4, 1), -INF, dtype=F64), x], 1), ids + 1
    w = o.uniform(40, 2)
    if one_weight: w = torch.tensor([1., 0.], dtype=F64).expand(40, 2)
    else: w[::3, 1] = 0.
    ids[w[:, 1] == 0, 1] = 0
    candidates = [o.target(ids[m], w[m], 0., 4) for m in range(40)]
    with set_backend(backend):
        o.assert_same(lambda x: sparse_sums(x, ids, w, ids[:4], w[:4], one_weight=one_weight),
                      lambda x: o.sums_over_candidates(x, candidates, candidates, True), x)
        o.assert_same(lambda x: class_sums(x, ids[:4], w[:4], exponents=(.3, .6)),
                      lambda x: o.sums_over_classes(x, candidates, (.3, .6)), x)
        dense = torch.tensor([[float(a) for a in row] for row in candidates], dtype=F64)
        o.assert_same(lambda x: product_sums(x, dense, linear=False),
                      lambda x: o.sums_over_candidates(x, candidates, candidates, True), x)


@pytest.mark.parametrize('backend', BACKENDS)
def test_mass_on_a_masked_class_is_an_infinite_loss(backend):
    x = torch.tensor([[-INF, 0., 1.], [0., 1., 2.]], dtype=F64)
    ids, w = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[.5, .5]]*2, dtype=F64)
    dense = torch.tensor([[.5, .5, 0.], [0., .5, .5]], dtype=F64)
    with set_backend(backend):
        for rows in (class_sums(x, ids, w), class_sums(x, None, None, probs=dense), sparse_sums(x, ids, w, ids, w),
                     product_sums(x, dense, linear=False)):
            assert rows[0] == INF and rows[1].isfinite()


@pytest.mark.parametrize('name', ['weights', 'share', 'probs', 'log_eta'])
def test_targets_with_a_gradient(name):
    x, ids, w = o.sparse_case(3, 3, 4, 2, False)
    given = dict(weights=w, share=o.uniform(3), probs=o.uniform(3, 4), log_eta=o.normal(4))
    own = dict(ids=None, weights=None, probs=given['probs']) if name == 'probs' else dict(
        ids=ids, weights=w, share=given['share'])
    def rows(y, x=x): return class_sums(x, **{**own, 'log_eta': given['log_eta'], name: y})
    assert torch.autograd.gradcheck(rows, given[name].clone().requires_grad_())
    target, y = given[name].clone().requires_grad_(), x.clone().requires_grad_()
    slope, = torch.autograd.grad(rows(target, y).sum(), y)
    wanted, = torch.autograd.grad(rows(given[name], y).sum(), y)
    torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- compiled
COMPILED = {
    'classes': lambda x, ids, w, alpha: class_sums(x, ids, w),
    'bags': lambda x, ids, w, alpha: sparse_sums(x, ids, w, ids, w),
    'pairs': lambda x, ids, w, alpha: sparse_sums(x, ids, w, ids, w, one_weight=True),
    'logits': lambda x, ids, w, alpha: product_sums(x, alpha, linear=False),
    'products': lambda x, ids, w, alpha: product_sums(x, alpha),
}


def batch(n):
    x, ids, w = o.sparse_case(n, n, 5, 2, True, seed=n)
    return x.requires_grad_(), ids, w, o.normal(n, 5, seed=n).softmax(1)


@pytest.mark.parametrize('name', COMPILED)
def test_graphs_of_changing_batch_sizes(name):
    "As many as `F.cross_entropy` has: one for the first size, one for all others."
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda *x: COMPILED[name](*x), fullgraph=True, backend='aot_eager')
    for n in (20, 7, 64, 65, 128, 300):
        inputs = batch(n)
        rows, expected = compiled(*inputs), COMPILED[name](*inputs)
        torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(*(torch.autograd.grad(r.sum(), inputs[0]) for r in (rows, expected))):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert counters['stats']['unique_graphs'] <= 2


@pytest.mark.parametrize('name', COMPILED)
def test_a_batch_size_marked_as_dynamic(name):
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda *x: COMPILED[name](*x), fullgraph=True, backend='aot_eager')
    for n in (20, 31):
        inputs = batch(n)
        for x in inputs: torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(*inputs), COMPILED[name](*inputs), rtol=1e-12, atol=1e-12)
    assert counters['stats']['unique_graphs'] == 1


# ---------------------------------------------------------------- references, backends, errors
def test_references_have_the_order_of_the_arguments():
    x, ids, w = o.sparse_case(3, 8, 4, 2, False)
    share, eta = o.uniform(8), o.normal(4)
    by_classes = class_sums_reference(x, ids[:3], w[:3], share[:3], None, eta[None], None, eta, (.3, .6), .7)
    torch.testing.assert_close(by_classes,
                               class_sums(x, ids[:3], w[:3], share=share[:3], offset=eta[None], log_eta=eta,
                                          exponents=(.3, .6), scale=.7))
    torch.testing.assert_close(sparse_sums_reference(x, ids, w, share, ids[:3], w[:3], share[:3], eta, .7, True),
                               sparse_sums(x, ids, w, ids[:3], w[:3], share=share, own_share=share[:3], log_eta=eta,
                                           scale=.7))
    torch.testing.assert_close(product_sums_reference(x, o.uniform(5, 4), None, eta, .7, True, False),
                               product_sums(x, o.uniform(5, 4), log_eta=eta, scale=.7, linear=False))


def test_set_backend_is_for_one_block():
    from softnce.contrast import operators
    with set_backend('reference'):
        with pytest.raises(ValueError, match="backend must be None, 'torch', 'triton' or 'reference', got 'cuda'"):
            set_backend('cuda')
        assert operators._backend.get() == 'reference'
        with set_backend(None): assert operators._backend.get() is None
        assert operators._backend.get() == 'reference'
    assert operators._backend.get() is None


@pytest.mark.parametrize('call, message', [
    (lambda x, i, w: class_sums(x, i, w.float()), "weights must be torch.float64 beside .*, got torch.float32"),
    (lambda x, i, w: class_sums(x.half(), i, w.half()), "weights must be torch.float32 beside .* torch.float16"),
    (lambda x, i, w: class_sums(x, None, None, probs=x.float()), "probs must be torch.float64 .*, got torch.float32"),
    (lambda x, i, w: class_sums(x, i, w, share=x[:, 0].float()), "share must be torch.float64 .*, got torch.float32"),
    (lambda x, i, w: class_sums(x, i, w, log_eta=x[0].float()), "log_eta must be torch.float64 .*, got torch.float32"),
    (lambda x, i, w: class_sums(x, i, w[:, :1]), "ids and weights must have one shape"),
    (lambda x, i, w: class_sums(x, i, w, offset=x[:1, :3]), r"offset must have shape \(1, 4\) or .*, got \(1, 3\)"),
    (lambda x, i, w: class_sums(x, i, w, offset=x[:2], exponents=(.3, .3, .4)),
     r"offset must have shape \(1, 4\) or \(3, 4\), got \(2, 4\)"),
    (lambda x, i, w: class_sums(x, i, w, offset=x[:1].float()), "offset must be torch.float64"),
    (lambda x, i, w: class_sums(x, i, w.to('meta')), "weights must be on cpu like the logits, got meta"),
    (lambda x, i, w: sparse_sums(x, i.to('meta'), w, i, w), "ids must be on cpu like the logits, got meta"),
    (lambda x, i, w: sparse_sums(x, i, w, i, w.float()), "own_weights must be torch.float64"),
    (lambda x, i, w: sparse_sums(x, i, w, i[:2], w[:2]), "own ids must have 3 rows like the logits, got 2"),
    (lambda x, i, w: sparse_sums(x, i[:2], w[:2], i, w), "ids must hold at least the 3 own candidates, got 2"),
    (lambda x, i, w: product_sums(x, w), r"a and b must be \(N, d\) and \(M, d\)"),
    (lambda x, i, w: product_sums(x, x[:1]), "b must hold at least the 3 own candidates, got 1"),
])
def test_errors(call, message):
    x, ids, w = o.sparse_case(3, 3, 4, 2, False)
    with pytest.raises(ValueError, match=message): call(x, ids, w)
