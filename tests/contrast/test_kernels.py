"Fast paths against loops written from the equations, value and gradient; and the losses through every path against the plain formulas."
import itertools
import math

import pytest
import torch

import softnce as S
from softnce.contrast.sums import class_contrast, product_contrast, set_backend, sparse_contrast
from softnce.losses import linear_soft_target_info_nce, soft_target_cross_entropy, soft_target_info_nce
from softnce.targets import SparseTargets

F64 = torch.float64


def lse(values): return torch.stack(values).logsumexp(0)


def literal_class(s, ids, w, background, offset, exponents):
    rows = []
    for i in range(len(s)):
        own = sum(w[i, c]*s[i, ids[i, c]] for c in range(ids.shape[1])) + background[i]*sum(s[i])/s.shape[1]
        offsets = offset if offset.ndim == 2 else [offset]*len(exponents)
        rows.append(sum(lse([t*s[i, k] + o[k] for k in range(s.shape[1])]) for t, o in zip(exponents, offsets)) - own)
    return torch.stack(rows)


def literal_target(ids, w, background, K):
    "A target as a dense vector, entry by entry."
    out = [background/K for _ in range(K)]
    for k, v in zip(ids.tolist(), w): out[k] = out[k] + v
    return torch.stack([torch.as_tensor(v, dtype=F64) for v in out])


def literal_candidates(s, candidates, own):
    return torch.stack([lse([sum(a[k]*s[i, k] for k in range(len(a))) for a in candidates]) - sum(own[i][k]*s[i, k] for k in range(len(own[i])))
                        for i in range(len(s))])


def compare(fast, slow, *inputs, tol=1e-12):
    "Values, and gradients under random row weights."
    results = []
    for f in (fast, slow):
        x = [i.detach().clone().requires_grad_() for i in inputs]
        rows = f(*x)
        weights = torch.linspace(-1, 2, len(rows), dtype=rows.dtype)
        results.append((rows.detach(), *torch.autograd.grad((weights*rows).sum(), x)))
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize('N, K, S_', [(1, 2, 1), (4, 3, 2), (3, 7, 3)])
@pytest.mark.parametrize('exponents', [(1.,), (.3, .6)])
def test_class_contrast(N, K, S_, exponents):
    torch.manual_seed(0)
    s, ids, w = torch.randn(N, K, dtype=F64), torch.randint(K, (N, S_)), torch.rand(N, S_, dtype=F64)
    background, offset = torch.randn(N, dtype=F64), torch.randn(K, dtype=F64)
    offset[-1] = float('-inf')  # a class without a candidate
    compare(lambda s: class_contrast(s, ids, w, background=background, offset=offset, exponents=exponents),
            lambda s: literal_class(s, ids, w, background, offset, exponents), s)
    compare(lambda s: class_contrast(s, ids, w, exponents=exponents),
            lambda s: literal_class(s, ids, w, torch.zeros(N), torch.zeros(K), exponents), s)
    offsets = torch.stack([offset, offset.flip(0)])[:len(exponents)]
    compare(lambda s: class_contrast(s.T.contiguous().T, ids, w, offset=offsets, exponents=exponents),  # stored by class
            lambda s: literal_class(s, ids, w, torch.zeros(N), offsets, exponents), s)


def sparse_case(N, M, K, slots, one_weight, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(K, (M, slots), generator=g)
    w = torch.rand(1 if one_weight else M, slots, generator=g, dtype=F64).expand(M, slots)
    return torch.randn(N, K, generator=g, dtype=F64), ids, w


@pytest.mark.parametrize('N, M, K, slots', [(1, 1, 2, 1), (3, 3, 4, 2), (2, 11, 3, 2), (5, 7, 6, 3)])
@pytest.mark.parametrize('one_weight', [False, True])
@pytest.mark.parametrize('num_rows', [None, 1, 2])
def test_sparse_contrast(N, M, K, slots, one_weight, num_rows):
    s, ids, w = sparse_case(N, M, K, slots, one_weight)
    candidates = [literal_target(ids[m], w[m], 0., K) for m in range(M)]
    compare(lambda s: sparse_contrast(s, ids, w, ids[:N], w[:N], one_weight=one_weight, num_rows=num_rows),
            lambda s: literal_candidates(s, candidates, candidates), s)


@pytest.mark.parametrize('N, M, K, slots', [(1, 2, 3, 1), (4, 9, 5, 2)])
def test_sparse_contrast_with_backgrounds(N, M, K, slots):
    s, ids, w = sparse_case(N, M, K, slots, False)
    g = torch.Generator().manual_seed(1)
    background, own_background = torch.rand(M, generator=g, dtype=F64), torch.rand(N, generator=g, dtype=F64)
    own_ids, own_w = torch.randint(K, (N, 2), generator=g), torch.rand(N, 2, generator=g, dtype=F64)
    candidates = [literal_target(ids[m], w[m], background[m], K) for m in range(M)]
    own = [literal_target(own_ids[i], own_w[i], own_background[i], K) for i in range(N)]
    compare(lambda s: sparse_contrast(s, ids, w, own_ids, own_w, background=background, own_background=own_background),
            lambda s: literal_candidates(s, candidates, own), s)


def test_pairs_and_bags_count_the_same_candidates():
    "More candidates than twice the classes: the pair form; and one weight that is zero."
    for weights in ((.3, .6), (1., 0.), (.5, .5)):
        s, ids, _ = sparse_case(4, 40, 3, 2, True)
        w = torch.tensor(weights, dtype=F64).expand(40, 2)
        candidates = [literal_target(ids[m], w[m], 0., 3) for m in range(40)]
        compare(lambda s: sparse_contrast(s, ids, w, ids[:4], w[:4], one_weight=True), lambda s: literal_candidates(s, candidates, candidates), s)


@pytest.mark.parametrize('height', [50., 300., 1e4])
def test_pairs_that_underflow_are_done_again(height):
    s, ids, w = (x.float() if x.is_floating_point() else x for x in sparse_case(6, 40, 5, 2, True))
    ids = ids.clamp(min=1)
    s[[0, 3], 0] = height  # no candidate has class 0
    candidates = [literal_target(ids[m], w[m].double(), 0., 5) for m in range(40)]
    exact = literal_candidates(s.double(), candidates, candidates)
    x = s.clone().requires_grad_()
    rows = sparse_contrast(x, ids, w, ids[:6], w[:6], one_weight=True)
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(rows.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize('num_rows', [None, 1, 2, 5])
@pytest.mark.parametrize('shifted', [False, True])
def test_product_contrast(num_rows, shifted):
    torch.manual_seed(2)
    a, b, shift = torch.randn(5, 3, dtype=F64), torch.randn(8, 3, dtype=F64), torch.randn(8, dtype=F64)
    def literal(a, b, shift=None, in_batch=True):
        u = lambda i, m: sum(a[i, j]*b[m, j] for j in range(3)) + (0. if shift is None else shift[m])
        return torch.stack([lse([u(i, m) for m in range(8)]) - (u(i, i) if in_batch else 0.) for i in range(5)])
    inputs = (a, b, shift) if shifted else (a, b)
    for in_batch in (True, False):
        compare(lambda *x: product_contrast(*x, in_batch=in_batch, num_rows=num_rows), lambda *x: literal(*x, in_batch=in_batch), *inputs)
    compare(lambda a: product_contrast(a, b, num_rows=num_rows), lambda a: literal(a, b), a)  # the gradient made in the forward pass


def test_gradients_of_gradients():
    s, ids, w = sparse_case(3, 9, 4, 2, True)
    s.requires_grad_()
    for one in (True, False):
        assert torch.autograd.gradgradcheck(lambda s: sparse_contrast(s, ids, w, ids[:3], w[:3], one_weight=one), s)
    a, b = torch.randn(3, 2, dtype=F64, requires_grad=True), torch.randn(4, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda a, b: product_contrast(a, b), (a, b))
    assert torch.autograd.gradgradcheck(lambda a: product_contrast(a, b.detach()), a)


def test_same_bits_every_time():
    s, ids, w = sparse_case(64, 64, 10, 2, False)
    def gradient():
        x = s.float().requires_grad_()
        sparse_contrast(x, ids, w.float(), ids, w.float()).sum().backward()
        return x.grad
    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(5))


# ---- the losses through every path

ETA = torch.tensor([.3, .1, .2, .25, .15], dtype=F64)
K, N = 5, 6


def targets(kind):
    g = torch.Generator().manual_seed(3)
    y, lam = torch.randint(K, (N,), generator=g), torch.rand(N, generator=g, dtype=F64)
    hard = SparseTargets(y[:, None], torch.ones(N, 1, dtype=F64), num_classes=K)
    one = S.smooth(S.mix(hard, .3), .1)
    return dict(ids=y, hard=hard, smoothed=S.smooth(hard, .2), one=one, each=S.smooth(S.mix(hard, lam), .1), unsmoothed=S.mix(hard, .3),
                varied=SparseTargets(one.indices, one.weights, lam, K), dense=one.dense())[kind]


KINDS = 'ids', 'hard', 'smoothed', 'one', 'each', 'unsmoothed', 'varied', 'dense'
SOURCES = {'in-batch': lambda kind: None, 'extra': lambda kind: targets(kind)[:4], 'fresh': lambda kind: S.Fresh(7, .4, .1), 'fresh hard': lambda kind: S.Fresh(3),
           'closed': lambda kind: S.ClosedForm(), 'closed mixed': lambda kind: S.ClosedForm(.3, .2)}


def through(backend, loss, x):
    torch.manual_seed(4)
    x = x.clone().requires_grad_()
    with set_backend(backend): out = loss(x)
    return out.detach(), torch.autograd.grad((out*torch.arange(1., out.numel()+1, dtype=F64)).sum() if out.ndim else out, x)[0]


@pytest.mark.parametrize('kind, source', list(itertools.product(KINDS, SOURCES)))
def test_every_path_is_the_loss(kind, source):
    x = torch.randn(N, K, dtype=F64, generator=torch.Generator().manual_seed(5))
    for noise_probs, temperature, reduction in ((None, 1., 'mean'), (ETA, .7, 'none'), (ETA, 2., 'sum')):
        def loss(x): return soft_target_info_nce(x, targets(kind), noise_probs=noise_probs, temperature=temperature, noise_samples=SOURCES[source](kind), reduction=reduction)
        for a, b in zip(through('torch', loss, x), through('plain', loss, x)): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('source', ['in-batch', 'extra', 'fresh'])
def test_every_path_is_the_linear_loss(kind, source):
    g = torch.Generator().manual_seed(6)
    z, W, b = (torch.randn(*shape, dtype=F64, generator=g) for shape in ((N, 3), (K, 3), (K,)))
    for bias, noise_probs in ((None, None), (b, ETA)):
        def loss(x):
            W_, z_ = x[:K], x[K:]
            return linear_soft_target_info_nce(z_, W_, targets(kind), bias=bias, noise_probs=noise_probs, temperature=.7, noise_samples=SOURCES[source](kind), reduction='none')
        for a, e in zip(through('torch', loss, torch.cat([W, z])), through('plain', loss, torch.cat([W, z]))): torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_linear_gradients_of_bias_and_sparse_weight():
    g = torch.Generator().manual_seed(7)
    z, W, b = (torch.randn(*shape, dtype=F64, generator=g) for shape in ((N, 3), (K, 3), (K,)))
    def gradients(backend, **kwargs):
        x = [t.clone().requires_grad_() for t in (z, W, b)]
        with set_backend(backend): return torch.autograd.grad(linear_soft_target_info_nce(x[0], x[1], targets('each'), bias=x[2], noise_probs=ETA, **kwargs), x)
    exact, sparse = gradients('plain'), gradients('torch', sparse_grad=True)
    assert sparse[1].is_sparse
    for a, e in zip(sparse, exact): torch.testing.assert_close(a.to_dense() if a.is_sparse else a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('kind', [k for k in KINDS if k != 'ids'])
def test_soft_target_cross_entropy_by_classes(kind):
    x = torch.randn(N, K, dtype=F64, generator=torch.Generator().manual_seed(8))
    t = targets(kind)
    dense = t if isinstance(t, torch.Tensor) else t.dense()
    def loss(x): return soft_target_cross_entropy(x, t, temperature=.5, reduction='none')
    def literal(x): return torch.stack([-sum(dense[i, k]*(x[i, k]/.5 - lse(list(x[i]/.5))) for k in range(K)) for i in range(N)])
    for a, b in zip(through('torch', loss, x), through(None, literal, x)): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('scale', [.1, 1., 100.])
def test_low_precision_is_no_worse_than_the_plain_form(dtype, kind, scale):
    x = (scale*torch.randn(N, K, dtype=F64, generator=torch.Generator().manual_seed(9))).to(dtype)
    t = targets(kind)
    truth = through('plain', lambda x: soft_target_info_nce(x, t), x.double())
    errors = []
    for backend in ('torch', 'plain'):
        y = x.clone().requires_grad_()
        with set_backend(backend), torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == torch.bfloat16): out = soft_target_info_nce(y, t)
        assert out.dtype == torch.float32
        gradient, = torch.autograd.grad(out, y)
        assert gradient.dtype == dtype
        errors.append([(out.double() - truth[0]).abs(), (gradient.double() - truth[1]).abs().max()])
    for (ours, plain), size in zip(zip(*errors), (1+truth[0].abs(), truth[1].abs().max())): assert ours <= 2*plain + 1e-6*size


@pytest.mark.parametrize('kind', KINDS)
def test_far_out(kind):
    "Logits of 1e4 and a temperature of 1e-3 stay finite, with the plain form's gradient."
    x = 1e4*torch.randn(N, K, generator=torch.Generator().manual_seed(10))
    for temperature in (1., 1e-3):
        def loss(x): return soft_target_info_nce(x, targets(kind), temperature=temperature)
        (ours, gradient), (plain, expected) = through('torch', loss, x), through('plain', loss, x)
        assert ours.isfinite() and gradient.isfinite().all()
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3*float(expected.abs().max()))


@pytest.mark.parametrize('kind', ['ids', 'one', 'varied', 'dense'])
def test_one_graph_under_compile(kind):
    x = torch.randn(N, K, generator=torch.Generator().manual_seed(11))
    t = targets(kind)
    t = t.float() if kind == 'dense' else t if kind == 'ids' else t.to(torch.float32)
    with set_backend('torch'):
        run = torch.compile(lambda x: soft_target_info_nce(x, t), fullgraph=True, backend='aot_eager')
        y = x.clone().requires_grad_()
        run(y).backward()
    value, expected = through('plain', lambda x: soft_target_info_nce(x, t), x)
    torch.testing.assert_close(y.grad, expected)


@pytest.mark.parametrize('kind, source', [('ids', 'in-batch'), ('one', 'in-batch'), ('one', 'closed mixed'), ('dense', 'in-batch')])
@pytest.mark.parametrize('compiled', [False, True])
def test_a_kept_graph_gives_its_gradient_again(kind, source, compiled):
    "The gradient of the forward pass is scaled in place, but only by the last backward pass."
    x = torch.randn(N, K, dtype=F64, generator=torch.Generator().manual_seed(12), requires_grad=True)
    t, weights = targets(kind), torch.arange(1., N+1, dtype=F64)
    def loss(x): return soft_target_info_nce(x, t, noise_probs=ETA, noise_samples=SOURCES[source](kind), reduction='none')
    expected = through('plain', loss, x.detach())[1]
    with set_backend('torch'): rows = (torch.compile(loss, fullgraph=True, backend='aot_eager') if compiled else loss)(x)
    for keep in (True, True, False):
        gradient, = torch.autograd.grad(rows, x, weights, retain_graph=keep)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match='second time'): torch.autograd.grad(rows, x, weights)


@pytest.mark.parametrize('kind', ['ids', 'one', 'dense'])
def test_all_rows_of_a_jacobian_at_once(kind):
    x, t = torch.randn(N, K, dtype=F64, generator=torch.Generator().manual_seed(13)), targets(kind)
    def jacobian(backend, **kwargs):
        with set_backend(backend): return torch.autograd.functional.jacobian(lambda x: soft_target_info_nce(x, t, reduction='none'), x, **kwargs)
    torch.testing.assert_close(jacobian('torch', vectorize=True), jacobian('plain'), rtol=1e-12, atol=1e-12)


def test_a_target_with_a_gradient_takes_the_plain_formulas():
    x, logits = torch.randn(N, K, dtype=F64), torch.randn(N, K, dtype=F64, requires_grad=True)
    with set_backend('torch'): loss = soft_target_info_nce(x, logits.softmax(1))
    assert torch.autograd.grad(loss, logits)[0].abs().sum() > 0


def test_one_weight_is_kept_where_it_is_known():
    hard = SparseTargets(torch.arange(4)[:, None], torch.ones(4, 1), num_classes=5)
    assert hard.one_weight() and S.mix(hard, .3).one_weight() and S.mix(S.mix(hard, .3), .2).weights.stride(0) == 0
    assert S.mix(hard, .3).to(torch.float64).weights.stride(0) == 0
    assert not S.mix(hard, torch.tensor([.1, .2, .3, .4])).one_weight()


@pytest.mark.parametrize('call, message', [
    (lambda s, i, w: class_contrast(s, i, w.float()), "weights must be float32 or float64 like the first argument, got torch.float32"),
    (lambda s, i, w: class_contrast(s.half(), i, w.half()), "scores must be float32 or float64"),
    (lambda s, i, w: class_contrast(s, i, w[:, :1]), "ids and weights must have one shape"),
    (lambda s, i, w: class_contrast(s, i, w, offset=s[0, :3]), r"offset must have shape \(4,\) or \(1, 4\), got \(3,\)"),
    (lambda s, i, w: class_contrast(s, i, w, offset=s[:2], exponents=(.3, .3, .4)), r"offset must have shape \(4,\) or \(3, 4\), got \(2, 4\)"),
    (lambda s, i, w: class_contrast(s, i, w, offset=s[0].float()), "offset must be float32 or float64 like the first argument"),
    (lambda s, i, w: class_contrast(s, i, w.to('meta')), "weights must be on cpu like the first argument, got meta"),
    (lambda s, i, w: sparse_contrast(s, i.to('meta'), w, i, w), "ids must be on cpu like the scores, got meta"),
    (lambda s, i, w: product_contrast(s, w), r"a and b must be \(N, d\) and \(M, d\)"),
    (lambda s, i, w: product_contrast(s, s[:1]), "b must hold at least the 3 own candidates, got 1"),
    (lambda s, i, w: soft_target_info_nce(s, i[:, 0].to('meta')), "targets must be on cpu like the logits, got meta"),
    (lambda s, i, w: soft_target_info_nce(s, torch.tensor([0, 1, 4])), r"targets must be in \[0, 4\), got values from 0 to 4"),
])
def test_errors(call, message):
    s, ids, w = sparse_case(3, 3, 4, 2, False)
    with pytest.raises(ValueError, match=message): call(s, ids, w)


def test_large_blocks_of_rows_change_nothing():
    "N x K above the threshold, without naming a backend."
    torch.manual_seed(12)
    y = torch.randint(300, (256,))
    t = S.smooth(S.mix(SparseTargets(y[:, None], torch.ones(256, 1, dtype=F64), num_classes=300), .3), .1)
    x = torch.randn(256, 300, dtype=F64)
    u = x @ t.dense().T
    expected = torch.nn.functional.cross_entropy(u, torch.arange(256))
    for chunk in (None, 1, 100, 256): torch.testing.assert_close(soft_target_info_nce(x, t, chunk_size=chunk), expected, rtol=1e-12, atol=1e-12)
    assert math.isfinite(float(expected))
