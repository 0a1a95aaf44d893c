"""Losses where frameworks take them: on the meta device, under vmap, in torch.export and torch.compile, a row alone."""
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from softnce import (NLL, ClosedForm, ExpectedInfoNCE, Fresh, InfoNCE, Queue, SoftDistributionInfoNCE,
                     SoftTargetCrossEntropy, SoftTargetInfoNCE, SparseTargets, empirical_noise, expected_info_nce,
                     info_nce, linear_expected_info_nce, linear_soft_target_cross_entropy,
                     linear_soft_target_info_nce, mix, nll, smooth, soft_distribution_info_nce,
                     soft_target_cross_entropy, soft_target_info_nce, uniform_noise)
from softnce.distributed import micro_batch_noise
from softnce.noise import warn_alone
from softnce.peers import (BinaryCrossEntropy, ContinuousCategoricalNLL, Distillation,
                           GeneralizedSupervisedContrastive, LogitAdjustedCrossEntropy, SoftInfoNCE)

N, K = 6, 5
CONTRASTIVE = [InfoNCE, SoftDistributionInfoNCE, ExpectedInfoNCE, SoftTargetInfoNCE]
MODULES = [NLL, SoftTargetCrossEntropy, *CONTRASTIVE]
PEERS = [BinaryCrossEntropy, ContinuousCategoricalNLL, Distillation, GeneralizedSupervisedContrastive, SoftInfoNCE]
IDS = torch.tensor([0, 3, 1, 1, 4, 2])
TARGETS = {
    'ids': IDS, 'dense': torch.rand(N, K, generator=torch.Generator().manual_seed(0)).softmax(1),
    'one class': SparseTargets.from_labels(IDS, K), 'smoothed': smooth(SparseTargets.from_labels(IDS, K), .1),
    'mixed': smooth(mix(SparseTargets.from_labels(IDS, K), .7), .1),
    'each epsilon': smooth(SparseTargets.from_labels(IDS, K), torch.linspace(0, .5, N)),
}


# ---------------------------------------------------------------- without numbers
@pytest.mark.parametrize('module', MODULES + PEERS)
@pytest.mark.parametrize('mode', [lambda: torch.device('meta'), FakeTensorMode], ids=['meta', 'fake'])
def test_modules_are_built_and_shown_without_numbers(mode, module):
    "A tensor as temperature, a Parameter, a noise distribution, and a queue."
    with mode():
        eta = torch.full((K,), 1/K)
        for temperature in (2., torch.tensor(2.), nn.Parameter(torch.tensor(2.))):
            options = dict(noise_probs=eta, noise_samples=Queue(3)) if module in CONTRASTIVE else {}
            made = module(temperature=temperature, **options)
            assert module.__name__ in repr(made) and list(made.state_dict()) is not None
            if module in MODULES: assert made(torch.randn(N, K), torch.zeros(N, dtype=torch.long)).shape == ()


def test_constants_of_a_module_on_the_meta_device():
    labels = torch.tensor([0, 1, 1, 2])
    with torch.device('meta'):
        assert uniform_noise(3).is_meta
        for floor in (None, .1): assert empirical_noise(labels.to('meta'), 3, floor=floor).shape == (3,)
        assert empirical_noise(labels, 3, floor=.1).tolist() == [.25, .5, .25]  # labels that are there are counted
        assert 'LogitAdjusted' in repr(LogitAdjustedCrossEntropy(uniform_noise(3)))
        SoftTargetInfoNCE(empirical_noise(labels, 3), noise_samples=Fresh(3))


def test_a_value_that_is_there_is_checked_on_the_meta_device_too():
    real = torch.tensor(-1.)
    with torch.device('meta'), pytest.raises(ValueError, match='temperature must be positive'): NLL(real)


@pytest.mark.parametrize('module', MODULES)
def test_unknown_arguments_are_refused(module):
    with pytest.raises(TypeError, match='temprature'): module(temprature=2.)


# ---------------------------------------------------------------- a row by itself
@pytest.fixture
def said():
    "The warnings of a block, as if it were the first of the process."
    warn_alone.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        yield lambda: [str(w.message) for w in seen if 'a batch of one row' in str(w.message)]
    warn_alone.cache_clear()


@pytest.mark.parametrize('loss', [info_nce, soft_target_info_nce, soft_distribution_info_nce, expected_info_nce])
def test_a_row_alone_in_its_batch_is_said_once(loss, said):
    for _ in range(3): assert loss(torch.randn(1, K), torch.tensor([1])) == 0
    assert len(said()) == 1
    for remedy in ('Queue', 'Fresh', 'ClosedForm', 'micro_batch_noise'): assert remedy in said()[0]


def test_a_row_that_has_company_is_not_warned_about(said):
    one, y = torch.randn(1, K), torch.tensor([1])
    sources = [Queue(2), Fresh(2), ClosedForm(), torch.tensor([2]), *micro_batch_noise([y, y])]
    for source in sources: soft_target_info_nce(one, y, noise_samples=source)
    soft_target_info_nce(torch.randn(2, K), torch.tensor([1, 2]))
    soft_target_cross_entropy(one, y)
    assert not said()


# ---------------------------------------------------------------- vmap
FUNCTIONS = {
    'cross-entropy': soft_target_cross_entropy, 'in batch': soft_target_info_nce, 'expected': expected_info_nce,
    'closed form': lambda *a, **k: soft_target_info_nce(*a, noise_samples=ClosedForm(), **k),
    'ids': lambda l, t, **k: nll(l, t.argmax(-1), **k), 'labels': lambda l, t, **k: info_nce(l, t.argmax(-1), **k),
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_vmap_over_logits_targets_and_temperature(name):
    "Each alone and all together: value and gradient of each are those of a call of its own."
    loss, B = FUNCTIONS[name], 3
    logits, targets = torch.randn(B, N, K), torch.randn(B, N, K).softmax(-1)
    if name == 'expected': targets = nn.functional.one_hot(targets.argmax(-1), K).float()  # no label is drawn
    tau = torch.tensor([.5, 1., 2.])
    def f(l, t, temperature): return loss(l, t, temperature=temperature)
    for dims in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (0, 0, None)):
        args = [x if d == 0 else x[0] for x, d in zip((logits, targets, tau), dims)]
        got = torch.vmap(torch.func.grad_and_value(f), in_dims=dims, randomness='different')(*args)
        each = [torch.func.grad_and_value(f)(*(x[i] if d == 0 else x[0] for x, d in zip((logits, targets, tau), dims)))
                for i in range(B)]
        torch.testing.assert_close(got, tuple(torch.stack(o) for o in zip(*each)), rtol=1e-5, atol=1e-6)


def test_vmap_over_sparse_targets():
    t = TARGETS['mixed']
    logits = torch.randn(3, N, K)
    got = torch.vmap(soft_target_info_nce, in_dims=(0, None))(logits, t)
    torch.testing.assert_close(got, torch.stack([soft_target_info_nce(l, t) for l in logits]))
    weights = torch.rand(3, N, 2).softmax(-1)
    def f(l, w): return soft_target_info_nce(l, SparseTargets(t.indices, w, .1, K))
    torch.testing.assert_close(torch.vmap(f)(logits, weights), torch.stack([f(*o) for o in zip(logits, weights)]))


# ---------------------------------------------------------------- torch.export
class Loss(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss
    def forward(self, logits, targets): return self.loss(logits, targets)


EXPORTED = {'cross-entropy': SoftTargetCrossEntropy(2.), 'InfoNCE': InfoNCE(temperature=2.),
            'in batch': SoftTargetInfoNCE(temperature=2.), 'expected': ExpectedInfoNCE(temperature=2.),
            'closed form': SoftTargetInfoNCE(noise_samples=ClosedForm(.7))}


@pytest.mark.parametrize('name, kind', [(name, kind) for name in EXPORTED for kind in TARGETS
                                        if name != 'InfoNCE' or kind == 'ids'])
def test_export_with_a_dynamic_batch(name, kind):
    "One program for any number of rows."
    module, t, rows = Loss(EXPORTED[name]), TARGETS[kind], torch.export.Dim('rows')
    many = SparseTargets.cat([t, t, t]) if isinstance(t, SparseTargets) else torch.cat([t, t, t])
    shape = [{0: rows}]*(2 + isinstance(t.epsilon, torch.Tensor)) if isinstance(t, SparseTargets) else {0: rows}
    program = torch.export.export(module, (torch.randn(N, K), t), dynamic_shapes=({0: rows}, shape)).module()
    for targets in (t, many):
        x = torch.randn(len(targets), K)
        torch.manual_seed(1)
        got = program(x, targets)
        torch.manual_seed(1)
        torch.testing.assert_close(got, module(x, targets))


# ---------------------------------------------------------------- torch.compile
def compilations(function, *calls):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for args in calls: torch.testing.assert_close(compiled(*args), function(*args))
    return counter.frame_count


LAMS = (.3, .4, .5, .71, .25, .9)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ('ids', 'smoothed')]  # each compiles five times


@pytest.mark.parametrize('kind', ['dense', 'one class', *SLOW])
def test_mix_in_a_compiled_step_compiles_once_whatever_lam(kind):
    t, x = TARGETS[kind], torch.randn(N, K)
    def step(x, t, lam):
        if kind == 'ids': t = SparseTargets.from_labels(t, K)
        return soft_target_info_nce(x, mix(t, lam))
    for lams in (list(map(torch.tensor, LAMS)), list(map(np.float64, LAMS)), [torch.rand(N) for _ in LAMS]):
        assert compilations(step, *((x, t, lam) for lam in lams)) == 1
    # PyTorch takes the first float that it sees as a constant, whatever is done with it, and no other
    product = compilations(lambda x, lam: lam*x, *((x, lam) for lam in LAMS))
    assert compilations(step, *((x, t, lam) for lam in LAMS)) == product == 2


def test_numbers_and_tensors_mix_alike():
    for t in (TARGETS['dense'], TARGETS['smoothed'].to(torch.float64)):
        for lam in (0., 1., .1, 1/3):
            want = mix(t, torch.tensor(lam, dtype=torch.float64))
            for got in (mix(t, lam), mix(t, np.float64(lam)), mix(t, torch.full((N,), lam, dtype=torch.float64))):
                a, b = (o.dense() if isinstance(o, SparseTargets) else o for o in (got, want))
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert mix(TARGETS['one class'], 1).weights.tolist() == [[1., 0.]]*N


# ---------------------------------------------------------------- where autocast is not known
LINEAR = [linear_soft_target_cross_entropy, linear_soft_target_info_nce, linear_expected_info_nce]


@pytest.mark.parametrize('kind', TARGETS)
@pytest.mark.parametrize('loss', LINEAR)
@pytest.mark.parametrize('reduction, options', [
    ('mean', {}), ('none', {}), ('sum', {'bias': True}), ('mean', {'class_weight': True, 'label_smoothing': .1}),
    ('mean', {'noise_samples': ClosedForm()}), ('mean', {'noise_samples': Fresh(3)}),
    ('none', {'noise_samples': IDS[:2], 'noise_probs': True})])
def test_linear_forms_on_the_meta_device(loss, kind, reduction, options):
    if loss is linear_soft_target_cross_entropy and options.keys() & {'noise_samples', 'noise_probs'}: return
    z, w = (torch.empty(n, 3, device='meta', requires_grad=True) for n in (N, K))
    vectors = dict(bias=torch.zeros(K), class_weight=torch.ones(K), noise_probs=torch.full((K,), 1/K))
    given = {k: vectors[k] if v is True else v for k, v in options.items()}
    given = {k: v.to('meta') if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    value = loss(z, w, TARGETS[kind].to('meta'), reduction=reduction, **given)
    assert value.is_meta and value.shape == ((N,) if reduction == 'none' else ())
    value.sum().backward()
    assert z.grad.shape == z.shape and w.grad.shape == w.shape and w.grad.is_meta


@pytest.mark.parametrize('kind', TARGETS)
def test_class_weights_and_pairs_of_rows_on_the_meta_device(kind):
    x, t = torch.empty(N, K, device='meta', requires_grad=True), TARGETS[kind].to('meta')
    weight = torch.ones(K, device='meta')
    for loss in (SoftTargetCrossEntropy(weight=weight), SoftTargetInfoNCE(weight=weight), BinaryCrossEntropy(),
                 SoftInfoNCE(), GeneralizedSupervisedContrastive()):
        value = loss(x, t)
        assert value.is_meta and value.shape == ()
        assert torch.autograd.grad(value, x)[0].shape == x.shape


@pytest.mark.parametrize('loss', LINEAR)
def test_linear_forms_keep_their_precision_inside_autocast(loss):
    g = torch.Generator().manual_seed(0)
    z, w = torch.randn(N, 3, generator=g), torch.randn(K, 3, generator=g)
    outside = loss(z, w, TARGETS['dense'], **given_generator(loss))
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = loss(z, w, TARGETS['dense'], **given_generator(loss))
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def given_generator(loss):
    return dict(generator=torch.Generator().manual_seed(1)) if loss is linear_expected_info_nce else {}
