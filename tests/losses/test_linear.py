"""Cross-entropy and closed-form noise of a linear head, without its logits: `F.linear` and `F.cross_entropy` tell."""
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import oracles as o
from softnce.contrast import set_backend
from softnce.contrast.scores import linear_inputs
from softnce.losses import (expected_info_nce, linear_expected_info_nce, linear_soft_target_cross_entropy,
                            linear_soft_target_info_nce, soft_target_info_nce)
from softnce.noise import ClosedForm
from softnce.targets import SparseTargets

sums = importlib.import_module('softnce.contrast.linear_sums')  # its folder has the function of that name
N = 11


@pytest.fixture(params=['one block', 'blocks of rows', 'blocks of classes'])
def blocks(request, monkeypatch):
    "The ways through the sum, at sizes of a test."
    if request.param == 'one block': return
    monkeypatch.setattr(sums, 'MIN_ROWS', 1 if request.param == 'blocks of rows' else 10**9)
    monkeypatch.setattr(sums, 'BLOCK', 64)
    monkeypatch.setattr(sums, 'MAX_ROWS', 3)


def problem(K, d=4, seed=0):
    g = o.generator(seed)
    z, W, b = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((N, d), (K, d), (K,)))
    return z, W, b


def targets_of(kind, K):
    "The targets, and the same as rows."
    if kind == 'ids': t = o.ids(N, K, 1)
    elif kind == 'dense': t = o.simplex(N, K, 2)
    else:
        g = o.generator(3)
        epsilon = {'sparse': 0., 'smoothed': .2, 'varied': torch.rand(N, generator=g, dtype=torch.float64)}[kind]
        ids = torch.randint(K, (N, 3), generator=g)
        ids[0] = ids[0, 0]  # a class three times
        t = SparseTargets(ids, o.simplex(N, 3, 4), epsilon, K)
    return t, o.dense(t, K) if kind in ('ids', 'dense') else o.dense_sparse(t.indices, t.weights, t.epsilon, K)


KINDS = 'ids', 'dense', 'sparse', 'smoothed', 'varied'


def test_the_weight_of_a_loss_reaches_its_gradients():
    "Gradients are made with the value: weight 1 leaves them, another scales them, a graph that is kept has them again."
    (t, _), (z, W, _) = targets_of('ids', 37), problem(37)
    def backward(factor, times=1):
        leaves = z.clone().requires_grad_(), W.clone().requires_grad_()
        loss = factor*linear_soft_target_cross_entropy(*leaves, t)
        for i in range(times): loss.backward(retain_graph=i < times - 1)
        return [x.grad for x in leaves]
    one = backward(1.)
    for found, factor in ((backward(3.), 3), (backward(1., times=2), 2), (backward(2., times=3), 6), (backward(0.), 0)):
        for f, g in zip(found, one): torch.testing.assert_close(f, factor*g, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
@pytest.mark.parametrize('K', [2, 37])
def test_value_and_gradients(blocks, kind, reduction, K):
    (t, dense), inputs = targets_of(kind, K), problem(K)
    loss = lambda z, w, b: linear_soft_target_cross_entropy(z, w, t, bias=b, reduction=reduction)
    o.same_value_and_grad(loss, lambda z, w, b: F.cross_entropy(F.linear(z, w, b), dense, reduction=reduction), *inputs)
    with set_backend('reference'): o.same(o.value_and_grad(loss, *inputs), o.value_and_grad(loss, *inputs))
    loss = lambda z, w: linear_soft_target_cross_entropy(z, w, t, reduction=reduction)
    o.same_value_and_grad(loss, lambda z, w: F.cross_entropy(F.linear(z, w), dense, reduction=reduction), *inputs[:2])


@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
@pytest.mark.parametrize('as_tensor', [False, True])
def test_temperature(blocks, reduction, as_tensor):
    (t, dense), (z, w, b), tau = targets_of('smoothed', 37), problem(37), torch.tensor(.7, dtype=torch.float64)
    plain = lambda z, w, b, tau: F.cross_entropy(F.linear(z, w, b)/tau, dense, reduction=reduction)
    loss = lambda z, w, b, tau: linear_soft_target_cross_entropy(z, w, t, bias=b, temperature=tau, reduction=reduction)
    if as_tensor: o.same_value_and_grad(loss, plain, z, w, b, tau)
    else: o.same_value_and_grad(lambda *x: loss(*x, .7), lambda *x: plain(*x, .7), z, w, b)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('lam, epsilon', [(1., 0.), (.3, 0.), (.3, .1), (1., .4), (.3, 1.)])
@pytest.mark.parametrize('uniform', [False, True])
def test_closed_form(blocks, kind, lam, epsilon, uniform):
    (t, dense), (z, w, b), eta = targets_of(kind, 13), problem(13), o.noise(13)
    kw = dict(noise_probs=None if uniform else eta, temperature=.7)
    for reduction in ('none', 'mean', 'sum'):
        loss = lambda z, w, b: linear_soft_target_info_nce(z, w, t, bias=b, noise_samples=ClosedForm(lam, epsilon),
                                                           reduction=reduction, **kw)
        plain = lambda z, w, b: soft_target_info_nce(F.linear(z, w, b), t, noise_samples=ClosedForm(lam, epsilon),
                                                     reduction=reduction, **kw)
        o.same_value_and_grad(loss, plain, z, w, b)
    if kind != 'dense': return
    options = dict(kw, lam=lam, epsilon=epsilon)
    oracle = lambda z, w, b: o.closed_form(F.linear(z, w, b), dense, **options)
    kw |= dict(noise_samples=ClosedForm(lam, epsilon), reduction='none')
    o.same_value_and_grad(lambda z, w, b: linear_soft_target_info_nce(z, w, t, bias=b, **kw), oracle, z, w, b)


def test_uniform_closed_form_is_cross_entropy_less_log_k(blocks):
    t, inputs = targets_of('sparse', 37)[0], problem(37)
    a = o.value_and_grad(lambda z, w: linear_soft_target_info_nce(z, w, t, noise_samples=ClosedForm()), *inputs[:2])
    b = o.value_and_grad(lambda z, w: linear_soft_target_cross_entropy(z, w, t) - math.log(37), *inputs[:2])
    o.same(a, b, 1e-14)
    o.same_value_and_grad(lambda z, w: linear_expected_info_nce(z, w, t, noise_samples=ClosedForm()),
                          lambda z, w: expected_info_nce(z @ w.T, t, noise_samples=ClosedForm()), *inputs[:2])


@pytest.mark.parametrize('needs', [(True, False, False), (False, True, False), (False, False, True),
                                   (True, False, True)])
@pytest.mark.parametrize('reduction', ['none', 'mean'])
def test_some_gradients(blocks, needs, reduction):
    t, inputs = targets_of('sparse', 37)[0], problem(37)
    def found(f):
        x = [x.clone().requires_grad_(n) for x, n in zip(inputs, needs)]
        return torch.autograd.grad(f(*x).sum()*3, [v for v, n in zip(x, needs) if n])
    ours = found(lambda z, w, b: linear_soft_target_cross_entropy(z, w, t, bias=b, reduction=reduction))
    o.same(ours, found(lambda z, w, b: F.cross_entropy(F.linear(z, w, b), t.dense(), reduction=reduction)))


@pytest.mark.parametrize('reduction', ['none', 'sum'])
def test_derivatives_of_every_kind(blocks, reduction):
    (t, dense), inputs = targets_of('smoothed', 13), [x.requires_grad_() for x in problem(13, 2)]
    loss = lambda z, w, b: linear_soft_target_cross_entropy(z, w, t, bias=b, reduction=reduction)
    assert torch.autograd.gradcheck(loss, inputs) and torch.autograd.gradgradcheck(loss, inputs)
    z, w, b = (x.detach() for x in inputs)
    plain = lambda z, w, b: F.cross_entropy(F.linear(z, w, b), dense, reduction='sum')
    o.same(torch.func.grad(lambda *x: loss(*x).sum(), (0, 1, 2))(z, w, b), torch.func.grad(plain, (0, 1, 2))(z, w, b))
    o.same(torch.func.jvp(lambda z: loss(z, w, b).sum(), (z,), (z,)),
           torch.func.jvp(lambda z: plain(z, w, b), (z,), (z,)))
    value = loss(*inputs).sum()
    first, again = (torch.autograd.grad(value, inputs, retain_graph=True) for _ in range(2))
    o.same(first, again, 0.)


def test_targets_with_a_gradient():
    (z, w, b), x = problem(7), o.logits(N, 7)
    o.same_value_and_grad(lambda z, x: linear_soft_target_cross_entropy(z, w, x.softmax(1), bias=b),
                          lambda z, x: F.cross_entropy(F.linear(z, w, b), x.softmax(1)), z, x)


@pytest.mark.parametrize('kind', ['ids', 'dense', 'sparse'])
def test_masked_classes(blocks, kind):
    "A class of bias -inf costs nothing where no target has mass on it; with mass the loss is infinite."
    (t, dense), (z, w, b) = targets_of(kind, 37), problem(37)
    free = (dense == 0).all(0) if kind != 'dense' else torch.arange(37) == 5
    if kind == 'dense': t = dense = F.normalize(dense.masked_fill(free, 0.), p=1, dim=1)
    assert free.any()
    b[free] = -math.inf
    loss = lambda z, w: linear_soft_target_cross_entropy(z, w, t, bias=b, reduction='none')
    possible = ~free
    plain = lambda z, w: F.cross_entropy(F.linear(z, w[possible], b[possible]), dense[:, possible], reduction='none')
    o.same_value_and_grad(loss, plain, z, w)
    b[dense[4].argmax()] = -math.inf
    assert loss(z, w)[4] == math.inf and loss(z, w).isfinite().any() == (kind != 'dense')


def test_masked_classes_and_rows_of_their_own_epsilon(blocks):
    "In fp32 a sum over masked classes overflows; a row without smoothing does not see it."
    t = SparseTargets(torch.tensor([[0], [1]]), torch.ones(2, 1), torch.tensor([0., .5]), 100)
    bias = torch.zeros(100).masked_fill(torch.arange(100) >= 3, -math.inf)
    found = linear_soft_target_cross_entropy(torch.ones(2, 2), torch.zeros(100, 2), t, bias=bias, reduction='none')
    torch.testing.assert_close(found, torch.tensor([math.log(3), math.inf]))


def test_a_shift_of_all_scores_keeps_the_digits(blocks):
    (t, dense), (z, w, b) = targets_of('sparse', 37), problem(37)
    z, w, b = z.float(), (w*8).round()/8, b.float()
    t = t.to(torch.float32)
    value = lambda b: linear_soft_target_cross_entropy((z*8).round()/8, w.float(), t, bias=(b*8).round()/8,
                                                       reduction='none')
    torch.testing.assert_close(value(b + 4096.), value(b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(blocks, dtype):
    (t, dense), inputs = targets_of('ids', 37), [x.to(dtype) for x in problem(37)]
    loss = lambda z, w, b: linear_soft_target_cross_entropy(z, w, t, bias=b)
    (v1, g1), (v2, g2) = o.value_and_grad(loss, *inputs), o.value_and_grad(loss, *(x.float() for x in inputs))
    assert v1.dtype == torch.float32 and v1 == v2
    for a, b in zip(g1, g2): assert a.dtype == dtype and torch.equal(a, b.to(dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16): assert loss(*(x.float() for x in inputs)) == v2


@pytest.mark.parametrize('reduction', ['none', 'mean'])
def test_compiled(blocks, reduction):
    t, inputs = targets_of('sparse', 37)[0], problem(37)
    loss = lambda z, w, b: linear_soft_target_cross_entropy(z, w, t, bias=b, reduction=reduction)
    o.same_value_and_grad(torch.compile(loss, backend='aot_eager', fullgraph=True), loss, *inputs)
    torch.compiler.reset()


def test_empty_batch():
    z, w = torch.zeros(0, 3, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    y = torch.zeros(0, dtype=torch.long)
    assert linear_soft_target_cross_entropy(z, w, y, reduction='sum') == 0
    assert linear_soft_target_cross_entropy(z, w, y, reduction='none').shape == (0,)
    assert linear_soft_target_cross_entropy(z, w, y).isnan()  # as F.cross_entropy


# ---------------------------------------------------------------- memory
class Largest(TorchDispatchMode):
    "The largest memory, in numbers, behind a tensor that an operator returns."
    def __init__(self, dtype=None): # of one kind only; None: of any
        super().__init__()
        self.dtype, self.numel = dtype, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(x, torch.Tensor) or x.is_sparse: continue
            size = x.untyped_storage().nbytes()//x.element_size()
            if self.dtype in (None, x.dtype): self.numel = max(self.numel, size)
        return out


def largest(f, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    with Largest() as seen: torch.autograd.grad(f(*inputs).sum(), inputs)
    return seen.numel


@pytest.mark.parametrize('reduction', ['none', 'mean'])
@pytest.mark.parametrize('rows, K, d', [(64, 1000, 4), (300, 5000, 4), (200, 20_000, 4), (200, 20_000, 128),
                                        (6, 300_000, 2)])
def test_no_tensor_holds_all_logits(rows, K, d, reduction):
    z, w, y = torch.randn(rows, d), torch.randn(K, d), torch.randint(K, (rows,))
    bound = max(sums.BLOCK, K*d)  # a block, or the gradient by the weight
    ours = lambda z, w: linear_soft_target_cross_entropy(z, w, y, reduction=reduction)
    assert largest(ours, z, w) <= bound and largest(ours, z, w) < max(rows*K, K*d + 1)
    assert largest(lambda z, w: F.cross_entropy(z @ w.T, y), z, w) >= rows*K


def test_closed_form_of_a_million_classes():
    K = 1_000_000
    z, w = torch.randn(40, 2), torch.randn(K, 2)
    eta, t = (torch.rand(K) + .1), SparseTargets(torch.randint(K, (40, 3)), torch.full((40, 3), 1/3), .1, K)
    eta = eta/eta.sum()
    loss = lambda z, w: linear_soft_target_info_nce(z, w, t, noise_probs=eta, noise_samples=ClosedForm(.7))
    assert largest(loss, z, w) <= 2*K  # the weight; all logits are 40 million
    rows = soft_target_info_nce((z @ w.T)[:2], t[:2], noise_probs=eta, noise_samples=ClosedForm(.7), reduction='none')
    found = linear_soft_target_info_nce(z[:2], w, t[:2], noise_probs=eta, noise_samples=ClosedForm(.7),
                                        reduction='none')
    torch.testing.assert_close(found, rows, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- errors
def test_errors():
    z, w, y = torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(3, dtype=torch.long)
    for call, message in ((lambda: linear_soft_target_cross_entropy(z, w.T, y), r'weight must have shape \(K, 2\)'),
                          (lambda: linear_soft_target_cross_entropy(z, w, y, bias=torch.zeros(4)),
                           r'bias must have shape \(5,\)'),
                          (lambda: linear_soft_target_cross_entropy(z, w, y[:2]), 'targets must have 3 rows'),
                          (lambda: linear_soft_target_cross_entropy(z, w, y + 5), r'targets must be in \[0, 5\)'),
                          (lambda: linear_soft_target_cross_entropy(z, w, y, temperature=0.),
                           'temperature must be positive'),
                          (lambda: linear_soft_target_cross_entropy(z, w, y, reduction='avg'), 'reduction must be'),
                          (lambda: linear_soft_target_info_nce(z, w, y, noise_samples=ClosedForm(), sparse_grad=True),
                           'sparse_grad')):
        with pytest.raises(ValueError, match=message): call()


DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture
def tensor_cores(monkeypatch):
    "Products of 16-bit factors with sums in fp32, which torch has on cards only: elsewhere the same calls, by fp32."
    if DEVICE == 'cuda': yield {'mm', 'addmm'}; return
    seen = set()
    def product(a, b, out_dtype, *, out):
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == out.dtype == torch.float32
        seen.add('mm')
        return out.copy_(a.float() @ b.float())
    def sum_of(total, a, b, out_dtype, *, beta=1, alpha=1, out):
        assert a.dtype == b.dtype == torch.bfloat16 and total.dtype == out_dtype == out.dtype == torch.float32
        seen.add('addmm')
        return out.copy_(a.float() @ b.float() + (beta*total if beta else 0.))
    library = torch.library.Library('aten', 'IMPL')
    library.impl('mm.dtype_out', product, 'CPU')
    library.impl('mm.dtype', lambda a, b, kind: product(a, b, kind, out=torch.empty(len(a), b.shape[1])), 'CPU')
    library.impl('addmm.dtype_out', sum_of, 'CPU')
    monkeypatch.setattr(sums, 'by_tensor_cores', lambda W: W.dtype == torch.bfloat16)
    yield seen
    library._destroy()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_a_weight_in_bfloat16_is_multiplied_as_it_is_on_a_card(blocks, tensor_cores, kind, reduction):
    (t, dense), (z, w, b) = targets_of(kind, 37), problem(37)
    z, w, b, dense = z.bfloat16().to(DEVICE), w.bfloat16().to(DEVICE), b.float().to(DEVICE), dense.to(DEVICE)
    t = t.to(DEVICE) if kind == 'ids' else t.to(DEVICE).to(torch.float32)
    loss = lambda z, w, b: linear_soft_target_cross_entropy(z, w, t, bias=b, reduction=reduction)
    def oracle(z, w, b):
        rows = -(dense*(z.double() @ w.double().T + b.double()).log_softmax(1)).sum(1)
        return rows if reduction == 'none' else rows.mean()
    value, grads = o.value_and_grad(loss, z, w, b)
    expected, wanted = o.value_and_grad(oracle, z.double(), w.double(), b.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)  # both factors are exact in 16 bits
    assert tensor_cores == {'mm', 'addmm'} and [g.dtype for g in grads] == [z.dtype, w.dtype, b.dtype]
    for found, g in zip(grads, wanted):  # rounded: the gradient by the logits, what it is multiplied with, the result
        torch.testing.assert_close(found.double(), g, rtol=0, atol=float(g.abs().max())*2**-7)


@pytest.mark.parametrize('loss', [linear_soft_target_info_nce, linear_expected_info_nce])
def test_few_rows_of_a_weight_in_bfloat16_are_converted(loss):
    "With a sparse gradient the cost does not depend on the number of classes, nor does that of the conversion."
    K, y = 50_000, o.ids(N, 50_000, 1)
    z, w, _ = problem(K)
    z, w = z.float(), w.bfloat16()
    few = lambda z, w: loss(z, w, y, sparse_grad=True)
    (value, grads), (expected, wanted) = o.value_and_grad(few, z, w), o.value_and_grad(few, z, w.float())
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grads[0], wanted[0], rtol=1e-5, atol=1e-7)
    assert grads[1].is_sparse and grads[1].dtype == w.dtype
    torch.testing.assert_close(grads[1].to_dense().float(), wanted[1].to_dense(), rtol=2**-6, atol=1e-4)
    leaf = w.clone().requires_grad_()
    with Largest(torch.float32) as seen: few(z, leaf).backward()
    assert seen.numel < K


@pytest.mark.parametrize('autocast', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('sparse_grad', [False, True])
def test_autocast_on_a_card_rounds_a_weight_to_bfloat16_alone(monkeypatch, autocast, dtype, sparse_grad):
    "float16 would lose small gradients, and a rounding that is undone again only loses digits."
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda device: device == 'cuda')
    monkeypatch.setattr(torch, 'get_autocast_dtype', lambda device: autocast)
    with FakeTensorMode(): z, given = (torch.ones(3, 4, dtype=dtype, device='cuda') for _ in range(2))
    z, w, _ = linear_inputs(z, given, None, sparse_grad)
    full = torch.promote_types(dtype, torch.float32)
    rounded = autocast == torch.bfloat16 and not sparse_grad and full == torch.float32
    assert z.dtype == full and w.dtype == (torch.bfloat16 if rounded or dtype == torch.bfloat16 else full)
    assert w is given or rounded or dtype == torch.float16
