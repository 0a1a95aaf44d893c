"""Faults that the losses had, each kind over: masked classes, shifts, sure rows, queues, sparse gradients, compilation,
messages."""
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import softnce
from softnce import (NLL, ClosedForm, Fresh, InBatch, InfoNCE, Queue, SoftTargetCrossEntropy, SoftTargetInfoNCE,
                     SparseTargets, info_nce, linear_soft_target_info_nce, mix, nll, one_hot, set_value_checks, smooth,
                     soft_distribution_info_nce, soft_target_cross_entropy, soft_target_info_nce)
from softnce.contrast import set_backend

INF = float('inf')
BACKENDS = ['torch', 'reference', None]
SIZES = [(6, 5), (300, 200)]  # below and above what an operator costs


def generator(seed=0): return torch.Generator().manual_seed(seed)


def kinds(y, K, dtype=torch.float32):
    "The same or similar targets in every kind; class 0 has no mass but as an empty slot."
    hard = SparseTargets.from_labels(y, K, dtype)
    empty = torch.tensor([[1., 0.]], dtype=dtype).expand(len(y), 2)
    padded = SparseTargets(torch.stack([y, torch.zeros_like(y)], 1), empty, num_classes=K)
    mixed = mix(hard, .7)
    return {'ids': y, 'one class': hard, 'padded': padded, 'mixed': mixed, 'dense': mixed.dense(),
            'one-hot': hard.dense()}


KINDS = list(kinds(torch.tensor([1, 2]), 3))


def spread(K, dtype=torch.float32): # a noise distribution that all but never draws the masked class
    eta = torch.full((K,), 1/(K-1), dtype=dtype)
    eta[0] = 1e-12
    return eta/eta.sum()


LOSSES = {
    'cross-entropy': lambda l, t: soft_target_cross_entropy(l, t, reduction='none'),
    'in batch': lambda l, t: soft_target_info_nce(l, t, reduction='none'),
    'closed form': lambda l, t: soft_target_info_nce(l, t, noise_samples=ClosedForm(.6), reduction='none'),
    'fresh': lambda l, t: soft_target_info_nce(l, t, noise_probs=spread(l.shape[1]),
                                               noise_samples=Fresh(9, generator=generator()), reduction='none'),
    'queue': lambda l, t: soft_target_info_nce(l, t, noise_samples=filled_queue(t), reduction='none'),
    'drawn labels': lambda l, t: soft_distribution_info_nce(l, t, generator=generator(), reduction='none'),
}


def filled_queue(t):
    queue = Queue(5)
    queue.push(t[:3])
    return queue


def value_and_gradient(loss, logits, *args):
    x = logits.detach().clone().requires_grad_()
    rows = loss(x, *args)
    return rows.detach(), torch.autograd.grad(rows.sum(), x)[0]


# ---------------------------------------------------------------- masked classes
def small_classes(loss, logits, t):
    "The loss of the problem without class 0."
    if isinstance(t, SparseTargets):
        t = SparseTargets((t.indices-1).clamp(min=0), t.weights, t.epsilon, t.num_classes-1)
    else: t = t-1 if t.ndim == 1 else t[:, 1:]
    return loss(logits[:, 1:], t)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['cross-entropy', 'in batch', 'queue'])
@pytest.mark.parametrize('N, K', SIZES)
def test_a_masked_class_costs_nothing_where_no_target_has_mass(N, K, name, kind, backend):
    "As if the class did not exist, in value and gradient."
    torch.manual_seed(0)
    logits, t = torch.randn(N, K), kinds(torch.randint(1, K, (N,)), K)[kind]
    logits[:, 0] = -INF
    with set_backend(backend):
        value, gradient = value_and_gradient(LOSSES[name], logits, t)
        wanted, slope = value_and_gradient(lambda l, t: small_classes(LOSSES[name], l, t), logits, t)
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6)
    assert (gradient[:, 0] == 0).all()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('N, K', SIZES)
def test_a_masked_class_leaves_value_and_gradient_finite(N, K, name, kind, backend):
    torch.manual_seed(0)
    logits, t = torch.randn(N, K), kinds(torch.randint(1, K, (N,)), K)[kind]
    logits[:, 0] = -INF
    with set_backend(backend): value, gradient = value_and_gradient(LOSSES[name], logits, t)
    assert value.isfinite().all() and gradient.isfinite().all() and (gradient[:, 0] == 0).all()


@pytest.mark.parametrize('name', ['cross-entropy', 'in batch', 'closed form'])
def test_mass_on_a_masked_class_is_an_infinite_loss(name):
    logits = torch.tensor([[-INF, 0., 1.], [0., 1., 2.]])
    for t in (torch.tensor([0, 1]), mix(SparseTargets.from_labels(torch.tensor([0, 1]), 3), .7),
              torch.eye(3)[:2]*.5 + .5/3):
        assert LOSSES[name](logits, t)[0] == INF


def test_a_masked_class_of_a_linear_head():
    torch.manual_seed(0)
    z, W, bias, y = torch.randn(8, 4), torch.randn(6, 4), torch.randn(6), torch.randint(1, 6, (8,))
    bias[0] = -INF
    for t in kinds(y, 6).values():
        linear = value_and_gradient(
            lambda z, t: linear_soft_target_info_nce(z, W, t, bias=bias, reduction='none'), z, t)
        logits = value_and_gradient(lambda z, t: soft_target_info_nce(z @ W.T + bias, t, reduction='none'), z, t)
        torch.testing.assert_close(linear, logits, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- shifts
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kind', [*KINDS, 'bfloat16'])
@pytest.mark.parametrize('name', ['cross-entropy', 'in batch', 'closed form', 'fresh'])
@pytest.mark.parametrize('N, K', SIZES)
def test_a_shift_of_a_row_changes_nothing(N, K, name, kind, backend):
    "fp32 logits near 1e4 against float64 on the same numbers: no digit is lost but to the logits' own rounding."
    torch.manual_seed(0)
    logits, y = torch.randn(N, K) + 1e4, torch.randint(1, K, (N,))
    t = kinds(y, K)['dense'].bfloat16() if kind == 'bfloat16' else kinds(y, K)[kind]
    with set_backend(backend):
        value, gradient = value_and_gradient(LOSSES[name], logits, t)
        still, slope = value_and_gradient(LOSSES[name], logits - 1e4, t)  # exact: the rounding was in the sum
    torch.testing.assert_close(value, still, rtol=0, atol=2e-6)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=2e-6)


# ---------------------------------------------------------------- sure rows
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('scale', [20., 30., 60.])
@pytest.mark.parametrize('kind', ['ids', 'smoothed', 'dense', 'mixed'])
def test_sure_rows_keep_their_relative_accuracy(kind, scale, backend):
    torch.manual_seed(0)
    N, K = 256, 300
    hard = SparseTargets.from_labels(torch.randperm(K)[:N], K)
    t = {'ids': hard, 'smoothed': smooth(hard, .05), 'dense': smooth(hard, .05).dense(),
         'mixed': smooth(mix(hard, .9), .05)}[kind]
    logits = scale*(t if isinstance(t, torch.Tensor) else t.dense()) + .1*torch.randn(N, K)
    with set_backend(backend): value, gradient = value_and_gradient(LOSSES['in batch'], logits, t)
    with set_backend('reference'):
        truth, slope = value_and_gradient(LOSSES['in batch'], logits.double(), t.to(torch.float64))
    assert (truth > 0).all()
    torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=0)  # scores of 60 are rounded to 4e-6
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=5e-6*slope.abs().max().item())


def test_sure_rows_with_equal_labels():
    "The own label among the candidates more than once: what is left over log of its count keeps its digits."
    logits = 40*one_hot(torch.tensor([0, 0, 1]), 3)
    value, gradient = value_and_gradient(LOSSES['in batch'], logits, torch.tensor([0, 0, 1]))
    truth, slope = value_and_gradient(LOSSES['in batch'], logits.double(), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)  # scores of 40 are rounded to 2e-6
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=0)


# ---------------------------------------------------------------- queues
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', ['mixed', 'dense'])
def test_a_queue_of_16_bit_targets(dtype, kind):
    queue, K = Queue(8), 50
    for seed in range(3):
        torch.manual_seed(seed)
        t = smooth(kinds(torch.randint(1, K, (6,)), K)[kind], .1).to(dtype)
        assert soft_target_info_nce(torch.randn(6, K).to(dtype), t, noise_samples=queue).isfinite()
    assert queue.draw(spread(K)).shape == (8, K)


def test_a_queue_keeps_no_gradient():
    weights = torch.tensor([[.6, .4]]*3, requires_grad=True)
    t, queue = SparseTargets(torch.tensor([[0, 1], [1, 2], [2, 0]]), weights, num_classes=3), Queue(4)
    for _ in range(2): soft_target_info_nce(torch.randn(3, 3), t, noise_samples=queue).backward()
    assert weights.grad.isfinite().all() and not queue.targets.weights.requires_grad


@pytest.mark.parametrize('reentrant', [False, True])
def test_recomputation_pushes_once_and_sees_the_same_noise(reentrant):
    from torch.utils.checkpoint import checkpoint
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        loss, w = SoftTargetInfoNCE(noise_samples=Queue(20)), torch.randn(4, 5, requires_grad=True)
        for step in range(3):
            x, y = torch.randn(6, 4), torch.randint(5, (6,))
            def forward(x, w): return loss(x @ w, y)
            value = checkpoint(forward, x, w, use_reentrant=reentrant) if recompute else forward(x, w)
            gradients.append(torch.autograd.grad(value, w)[0] if not reentrant
                             else (w.grad, value.backward(), w.grad)[2].clone())
        assert len(loss.noise_samples.targets) == 18
    torch.testing.assert_close(gradients[:3], gradients[3:])


def test_a_closure_pushes_once_a_step():
    torch.manual_seed(0)
    loss, w = SoftTargetInfoNCE(noise_samples=Queue(50)), torch.randn(4, 5, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], lr=.1, max_iter=5)
    calls = []
    for step in range(3):
        x, y = torch.randn(6, 4), torch.randint(5, (6,))
        def closure():
            optimizer.zero_grad()
            value = loss(x @ w, y)
            value.backward()
            calls.append(len(loss.noise_samples.targets))
            return value
        optimizer.step(closure)
        assert set(calls) == {6*(s+1) for s in range(step+1)} and len(calls) > step+1


def test_an_ordinary_loop_pushes_equal_batches_too():
    loss, y = InfoNCE(noise_samples=Queue(50)), torch.tensor([0, 1])
    for _ in range(3): loss(torch.randn(2, 3, requires_grad=True), y).backward()
    assert len(loss.noise_samples.targets) == 6


# ---------------------------------------------------------------- sparse gradients
@pytest.mark.parametrize('N', [1, 2, 300])
@pytest.mark.parametrize('noise', [None, 'queue', 'fresh', 'ids'])
def test_a_sparse_gradient_is_always_sparse(N, noise):
    torch.manual_seed(0)
    z, W, y = torch.randn(N, 4), nn.Parameter(torch.randn(50, 4)), torch.randint(50, (N,))
    for t in (y, smooth(mix(SparseTargets.from_labels(y, 50), .7), .1)):
        eps = 0. if t is y else .1
        source = {'queue': Queue(4), 'fresh': Fresh(4, epsilon=eps),
                  'ids': smooth(SparseTargets.from_labels(y, 50), eps)}.get(noise)
        linear_soft_target_info_nce(z, W, t, noise_samples=source, sparse_grad=True).backward()
        assert W.grad.is_sparse
        torch.optim.SparseAdam([W]).step()
        W.grad = None


@pytest.mark.parametrize('noise', [None, ClosedForm(), Fresh(3)])
def test_a_sparse_gradient_is_refused_where_it_would_be_dense(noise):
    z, W, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match='sparse_grad'):
        linear_soft_target_info_nce(z, W, one_hot(y, 5), noise_samples=noise, sparse_grad=True)
    if noise is not None:
        with pytest.raises(ValueError, match='sparse_grad'):
            linear_soft_target_info_nce(z, W, smooth(SparseTargets.from_labels(y, 5), .1), noise_samples=noise,
                                        sparse_grad=True)


# ---------------------------------------------------------------- empty batches, precision, default dtype
@pytest.mark.parametrize('name', ['cross-entropy', 'in batch', 'closed form', 'fresh'])
@pytest.mark.parametrize('kind', KINDS)
def test_an_empty_batch(name, kind):
    t = kinds(torch.tensor([1, 2]), 5)[kind][:0]
    x = torch.zeros(0, 5, requires_grad=True)
    rows = LOSSES[name](x, t)
    assert rows.shape == (0,) and rows.sum() == 0 and rows.mean().isnan()
    rows.sum().backward()
    assert x.grad.shape == (0, 5)


def test_noise_that_underflows_in_the_precision_of_the_logits():
    eta = torch.tensor([.5, .5, 1e-60], dtype=torch.float64)
    with pytest.raises(ValueError, match='noise_probs must be positive'):
        soft_target_info_nce(torch.randn(2, 3), torch.tensor([0, 1]), noise_probs=eta)
    assert soft_target_info_nce(torch.randn(2, 3).double(), torch.tensor([0, 1]), noise_probs=eta).isfinite()


def test_another_default_dtype():
    torch.manual_seed(0)
    logits, y = torch.randn(300, 20), torch.randint(20, (300,))
    t = mix(SparseTargets.from_labels(y, 20, torch.float32), .7)
    wanted = soft_target_info_nce(logits, t), info_nce(logits, y)
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        assert (soft_target_info_nce(logits, t), info_nce(logits, y)) == wanted


# ---------------------------------------------------------------- transforms, meta and fake tensors
@pytest.mark.parametrize('N, K', SIZES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['cross-entropy', 'in batch', 'closed form'])
def test_forward_mode_and_functorch(N, K, kind, name):
    import torch.autograd.forward_ad as fwd
    torch.manual_seed(0)
    logits, t = torch.randn(N, K).double(), kinds(torch.randint(1, K, (N,)), K, torch.float64)[kind]
    def loss(l): return LOSSES[name](l, t).sum()
    direction, (_, slope) = torch.randn_like(logits), value_and_gradient(LOSSES[name], logits, t)
    with fwd.dual_level():
        tangent = fwd.unpack_dual(loss(fwd.make_dual(logits, direction))).tangent
    torch.testing.assert_close(tangent, (slope*direction).sum())
    torch.testing.assert_close(torch.func.grad(loss)(logits), slope)
    torch.testing.assert_close(torch.func.jvp(loss, (logits,), (direction,))[1], (slope*direction).sum())
    many = torch.stack([logits, logits + direction])
    torch.testing.assert_close(torch.vmap(loss)(many), torch.stack([loss(m) for m in many]))


@pytest.mark.parametrize('name', ['cross-entropy', 'in batch', 'closed form'])
@pytest.mark.parametrize('kind', KINDS)
def test_meta_and_fake_tensors(name, kind):
    from torch._subclasses.fake_tensor import FakeTensorMode
    t = kinds(torch.tensor([1, 2, 3]), 5)[kind].to('meta')
    rows = LOSSES[name](torch.empty(3, 5, device='meta', requires_grad=True), t)
    assert rows.shape == (3,) and rows.is_meta
    with FakeTensorMode():
        t = (kinds(torch.tensor([1, 2, 3]), 5)[kind] if kind == 'ids'
             else SparseTargets.from_labels(torch.zeros(3).long(), 5))
        assert LOSSES[name](torch.empty(3, 5), t).shape == (3,)


# ---------------------------------------------------------------- compilation
@pytest.mark.parametrize('kind', ['ids', 'mixed', 'dense'])
@pytest.mark.parametrize('name', ['cross-entropy', 'in batch', 'closed form'])
def test_one_graph_for_all_batch_sizes(name, kind):
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda l, t: LOSSES[name](l, t).mean(), backend=counter, fullgraph=True)
    for n in (200, 7, 64, 65, 128, 300):
        torch.manual_seed(n)
        logits, t = torch.randn(n, 40, requires_grad=True), kinds(torch.randint(1, 40, (n,)), 40)[kind]
        value = compiled(logits, t)
        torch.testing.assert_close(value, LOSSES[name](logits, t).mean(), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_marked_dynamic():
    torch._dynamo.reset()
    compiled = torch.compile(lambda l, y: info_nce(l, y), backend='aot_eager', fullgraph=True)
    logits, y = torch.randn(200, 40, requires_grad=True), torch.randint(40, (200,))
    torch._dynamo.mark_dynamic(logits, 0)
    torch._dynamo.mark_dynamic(y, 0)
    torch.testing.assert_close(compiled(logits, y), info_nce(logits, y))


@pytest.mark.parametrize('parameter', [False, True])
def test_a_temperature_that_is_a_tensor(parameter):
    tau = torch.tensor(.7, dtype=torch.float64)
    loss = SoftTargetInfoNCE(temperature=nn.Parameter(tau.clone()) if parameter else tau)
    assert ('temperature' in dict(loss.named_parameters())) == parameter and 'temperature' in loss.state_dict()
    torch.manual_seed(0)
    logits, y = torch.randn(9, 4).double(), torch.randint(4, (9,))
    torch.testing.assert_close(loss(logits, y), soft_target_info_nce(logits, y, temperature=.7))
    assert torch.autograd.gradcheck(lambda l, t: soft_target_info_nce(l, y, temperature=t),
                                    (logits.clone().requires_grad_(), tau.clone().requires_grad_()))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, backend='aot_eager', fullgraph=True)(logits, y), loss(logits, y))
    each = torch.vmap(lambda t: soft_target_info_nce(logits, y, temperature=t))(
        torch.tensor([.5, .7], dtype=torch.float64))
    torch.testing.assert_close(each[1], loss(logits, y).detach())


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize('name', ['cross-entropy', 'in batch', 'closed form', 'hard'])
def test_nothing_is_larger_than_the_logits(name, dtype):
    "No fp32 copy of 16-bit logits, forward or backward, and no array of rows times candidates."
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(o.untyped_storage().nbytes() for o in (out if isinstance(out, (tuple, list)) else [out])
                         if isinstance(o, torch.Tensor))
            return out
    y = torch.randint(2048, (1024,))
    t = y if name == 'hard' else smooth(mix(SparseTargets.from_labels(y, 2048), .7), .1)
    logits = torch.randn(1024, 2048).to(dtype).requires_grad_()
    loss = info_nce if name == 'hard' else lambda l, t: LOSSES[name](l, t).mean()
    with Watch(): loss(logits, t).backward()
    assert max(sizes) <= max(logits.untyped_storage().nbytes(), 2**22 + 2**12)  # or a block of candidate scores


# ---------------------------------------------------------------- settings of a thread
def test_settings_belong_to_a_thread():
    from softnce.contrast import operators
    from softnce.sparse import _value_checks
    seen, meet = {}, threading.Barrier(2)
    def work(name, enabled, backend):
        with set_value_checks(enabled), set_backend(backend):
            meet.wait()
            seen[name] = _value_checks.get(), operators._backend.get()
            meet.wait()
    threads = [threading.Thread(target=work, args=a) for a in (('a', False, 'torch'), ('b', True, 'reference'))]
    for t in threads: t.start()
    for t in threads: t.join()
    assert seen == {'a': (False, 'torch'), 'b': (True, 'reference')}
    assert _value_checks.get() and operators._backend.get() is None


def test_names_and_representations():
    names = dir(softnce)
    assert len(names) == len(set(names)) and 'import_module' not in names
    eps = torch.full((200,), .1)
    assert len(repr(SparseTargets(torch.zeros(200, 2).long(), torch.full((200, 2), .5), eps, 3))) < 120


def test_a_loss_does_not_load_the_compiler():
    code = ("import sys, torch; from softnce import *\n"
            "l = torch.randn(300, 200, requires_grad=True)\n"
            "soft_target_info_nce(l, mix(SparseTargets.from_labels(torch.randint(200, (300,)), 200), .7)).backward()\n"
            "soft_target_info_nce(l, torch.softmax(torch.randn(300, 200), 1)).backward()\n"
            "assert 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, '-c', code], check=True)


# ---------------------------------------------------------------- messages
X, Y = torch.zeros(3, 4), torch.tensor([0, 1, 2])
MESSAGES = [
    (lambda: nll(X, Y.numpy()), 'labels must be a tensor, got ndarray: use torch.as_tensor'),
    (lambda: nll(X, [0, 1, 2]), 'labels must be a tensor, got list: use torch.as_tensor'),
    (lambda: info_nce(X, Y.numpy()), 'labels must be a tensor, got ndarray'),
    (lambda: soft_target_info_nce(X, np.eye(4)[:3]), 'targets must be .* got ndarray'),
    (lambda: nll(X, Y[:, None]), r'labels must have shape \(N,\), got \(3, 1\): use .squeeze\(1\)'),
    (lambda: soft_target_info_nce(X, Y[:, None]), r'targets must have shape .* got \(3, 1\): use .squeeze\(1\)'),
    (lambda: soft_target_info_nce(X, torch.eye(4).long()[:3]), 'targets must be floating point, got dtype torch.int64'),
    (lambda: soft_target_info_nce(X, torch.eye(4)[:3].to_sparse()), 'targets must be a dense tensor, got layout'),
    (lambda: soft_target_info_nce(X, Y, temperature=torch.ones(5)), r'temperature must be one .* shape \(5,\)'),
    (lambda: soft_target_info_nce(X, Y, temperature='hot'), "temperature must be a positive number, got 'hot'"),
    (lambda: nll(X, Y, temperature=None), 'temperature must be a positive number, got None'),
    (lambda: SoftTargetInfoNCE(temperature=True), 'temperature must be a positive number, got True'),
    (lambda: soft_target_info_nce(X, Y, chunk_size=2.5), 'chunk_size must be an integer, got 2.5'),
    (lambda: Queue(2.5), 'size must be an integer, got 2.5'),
    (lambda: Queue(True), 'size must be an integer, got True'),
    (lambda: Fresh('3'), "size must be an integer, got '3'"),
    (lambda: SoftTargetInfoNCE(noise_samples=Fresh), r'noise_samples must be .* give an instance, Fresh\(...\)'),
    (lambda: soft_target_info_nce(X, Y, noise_samples=Queue), 'noise_samples must be .* got type'),
    (lambda: SparseTargets(torch.zeros(3, 0).long(), torch.zeros(3, 0), num_classes=4), 'indices must .* S at least 1'),
    (lambda: linear_soft_target_info_nce(X, X, Y, bias=[0., 0., 0.]), r'bias must have shape \(3,\), got list'),
    (lambda: smooth(mix(SparseTargets.from_labels(Y, 4), .5), torch.tensor([.1, .2])),
     r'epsilon must be .* \(3,\), got \(2,\)'),
    (lambda: NLL().probs(torch.zeros(4)), r'logits must have shape \(N, K\), got \(4,\)'),
    (lambda: InfoNCE().probs(torch.zeros(4)), r'logits must have shape \(N, K\), got \(4,\)'),
]


@pytest.mark.parametrize('call, message', MESSAGES, ids=[m for _, m in MESSAGES])
def test_messages(call, message):
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize('module', [NLL, SoftTargetCrossEntropy, InfoNCE, SoftTargetInfoNCE])
def test_unknown_options_are_refused(module):
    with pytest.raises(TypeError, match='chunksize'): module(chunksize=3)


def test_smoothing_of_each_row():
    t, eps = SparseTargets.from_labels(Y, 4), torch.tensor([.1, .2, .3])
    torch.testing.assert_close(smooth(t, eps).dense(),
                               torch.stack([smooth(t[i:i+1], float(e)).dense()[0] for i, e in enumerate(eps)]))
    assert InBatch().in_batch and F.one_hot(Y, 4).shape == (3, 4)
