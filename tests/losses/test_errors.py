"""Every documented error: a ValueError that names the argument; and what turning the value checks off turns off."""
import math

import pytest
import torch

import oracles as o
from softnce import targets as targets_module
from softnce.losses import (NLL, InfoNCE, SoftDistributionInfoNCE, SoftTargetCrossEntropy, SoftTargetInfoNCE, info_nce,
                            linear_soft_target_info_nce, nll, soft_distribution_info_nce, soft_target_cross_entropy,
                            soft_target_info_nce)
from softnce.noise import ClosedForm, ContinuousCategorical, Fresh, Queue, empirical_noise, uniform_noise
from softnce.targets import SparseTargets, mix, one_hot, smooth

N, K, D = 4, 3, 5
NAN, INF = math.nan, math.inf
X, T, Y = o.logits(N, K).detach(), o.simplex(N, K), torch.tensor([0, 2, 1, 0])
Z, W = o.logits(N, D).detach(), o.logits(K, D).detach()
HARD = {'nll': nll, 'info_nce': info_nce}
SOFT = {'soft_target_cross_entropy': soft_target_cross_entropy,
        'soft_distribution_info_nce': soft_distribution_info_nce,
        'soft_target_info_nce': soft_target_info_nce}
NCE = {'info_nce': lambda **kw: info_nce(X, Y, **kw),
       'soft_distribution_info_nce': lambda **kw: soft_distribution_info_nce(X, T, **kw),
       'soft_target_info_nce': lambda **kw: soft_target_info_nce(X, T, **kw),
       'linear': lambda **kw: linear_soft_target_info_nce(Z, W, T, **kw)}
ALL = {**NCE, 'nll': lambda **kw: nll(X, Y, **kw),
       'soft_target_cross_entropy': lambda **kw: soft_target_cross_entropy(X, T, **kw)}


def refuses(match): return pytest.raises(ValueError, match=match)


def spoiled(t, value, i=1, j=1):
    t = t.clone()
    t[i, j] = value
    return t


def test_the_good_inputs_are_good():
    for f in ALL.values(): assert f().isfinite()


# ---------------------------------------------------------------- logits, temperature, reduction: all losses
@pytest.mark.parametrize('name', [*HARD, *SOFT])
def test_logits_must_be_a_matrix_of_floats(name):
    f, a = (HARD[name], Y) if name in HARD else (SOFT[name], T)
    for bad in (X[0], X[None], torch.zeros(N, K, dtype=torch.long), X.tolist()):
        with refuses('^logits'): f(bad, a)


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('tau', [0., -1., NAN, INF])
def test_temperature(name, tau):
    with refuses(f'temperature.*{tau}'): ALL[name](temperature=tau)


@pytest.mark.parametrize('name', ALL)
def test_reduction(name):
    with refuses("reduction.*'?average"): ALL[name](reduction='average')


# ---------------------------------------------------------------- labels
@pytest.mark.parametrize('name', HARD)
def test_labels(name):
    f = HARD[name]
    for bad in (Y[:3], Y[:, None], torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, -1]), Y.float(), Y > 0,
                Y.tolist()):
        with refuses('^labels'): f(X, bad)


def test_labels_say_what_came():
    with refuses('labels.*7'): nll(X, torch.tensor([0, 1, 2, 7]))
    with refuses('labels.*-3'): info_nce(X, torch.tensor([0, -3, 2, 0]))
    with refuses('labels.*3.*4|labels.*4.*3'): nll(X, Y[:3])


# ---------------------------------------------------------------- targets
def target_calls():
    return {**{name: (lambda t, f=f: f(X, t)) for name, f in SOFT.items()},
            'linear': lambda t: linear_soft_target_info_nce(Z, W, t)}


@pytest.mark.parametrize('name', target_calls())
def test_targets(name):
    f = target_calls()[name]
    bad_shapes = (T[:3], T[:, :2], T[None], o.simplex(N, K + 1), Y[:3],
                  SparseTargets(Y[:, None], torch.ones(N, 1), num_classes=K + 1),
                  SparseTargets(Y[:3, None], torch.ones(3, 1), num_classes=K))
    for bad in bad_shapes:
        with refuses('^targets'): f(bad)
    for bad in (T.tolist(), torch.eye(K, dtype=torch.long)[Y], None):
        with refuses('^targets'): f(bad)
    for bad in (spoiled(T, NAN), spoiled(T, INF), spoiled(T, -.1), T*.9,
                torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, -1, 2]), Y.float()):
        with refuses('targets'): f(bad)


def test_targets_say_what_came():
    with refuses('targets.*3 classes.*4'): soft_target_info_nce(X, o.simplex(N, K + 1))
    with refuses('targets.*sum'): soft_target_info_nce(X, T*.9)
    with refuses('targets.*(negative|-0.1)'): soft_target_info_nce(X, spoiled(T, -.1))
    with refuses('targets.*(finite|nan)'): soft_target_info_nce(X, spoiled(T, NAN))


# ---------------------------------------------------------------- noise_probs, noise_samples
@pytest.mark.parametrize('name', NCE)
def test_noise_probs(name):
    f = NCE[name]
    for bad in ([.5, .5, 0.], [.7, .5, -.2], [.5, .5, NAN], [.5, .5, INF], [.5, .4, .3], [.25]*4, [[1/3]*3]):
        with refuses('^noise_probs'): f(noise_probs=torch.tensor(bad, dtype=torch.float64))
    with refuses('^noise_probs'): f(noise_probs=[1/3]*3)


def test_noise_probs_name_the_zero():
    with refuses('noise_probs.*(zero|0|positive)'): info_nce(X, Y, noise_probs=torch.tensor([.5, .5, 0.]))


@pytest.mark.parametrize('name', ['soft_target_info_nce', 'linear'])
def test_noise_samples(name):
    f = NCE[name]
    for bad in (o.simplex(2, K + 1), o.simplex(2, K)*.5, spoiled(T, NAN), spoiled(T, -.2), T[None],
                torch.tensor([0, 3]),
                SparseTargets(torch.tensor([[0]]), torch.ones(1, 1), num_classes=K + 1)):
        with refuses('noise_samples'): f(noise_samples=bad)
    with pytest.raises((ValueError, TypeError), match='noise_samples'): f(noise_samples='batch')


def test_noise_samples_of_info_nce():
    for bad in (torch.tensor([0, 3]), torch.tensor([-1]), torch.tensor([.5, .5])):
        with refuses('noise_samples'): info_nce(X, Y, noise_samples=bad)


def test_a_queue_of_other_classes():
    q = Queue(4)
    soft_target_info_nce(o.logits(2, K + 1).detach(), o.simplex(2, K + 1), noise_samples=q)
    with refuses('noise_samples|[Qq]ueue'): soft_target_info_nce(X, T, noise_samples=q)


def test_a_queue_of_another_kind_writes_the_sparse_rows_out():
    q = Queue(8)
    soft_target_info_nce(X, T, noise_samples=q)
    value = soft_target_info_nce(X, Y, noise_samples=q, reduction='none')
    candidates = torch.cat([torch.eye(X.shape[1], dtype=X.dtype)[Y], T])
    o.same(value, torch.nn.functional.cross_entropy(X @ candidates.T, torch.arange(len(X)), reduction='none'))


# ---------------------------------------------------------------- chunk_size, the linear head
@pytest.mark.parametrize('chunk', [0, -2])
def test_chunk_size(chunk):
    with refuses(f'chunk_size.*{chunk}'): soft_target_info_nce(X, T, chunk_size=chunk)


def test_linear_shapes():
    with refuses('embeddings'): linear_soft_target_info_nce(Z[0], W, T)
    with refuses('weight'): linear_soft_target_info_nce(Z, W[:, :4], T)
    with refuses('weight'): linear_soft_target_info_nce(Z, W[0], T)
    with refuses('bias'): linear_soft_target_info_nce(Z, W, T, bias=torch.zeros(K + 1))
    with refuses('targets'): linear_soft_target_info_nce(Z, o.logits(K + 1, D).detach(), T)


# ---------------------------------------------------------------- softnce.targets
def test_one_hot():
    for bad in (torch.tensor([0, 3]), torch.tensor([-1]), torch.tensor([0., 1.]), torch.tensor([[0, 1]])):
        with refuses('labels'): one_hot(bad, 3)


@pytest.mark.parametrize('eps', [-.1, 1.1, NAN])
def test_epsilon(eps):
    sparse = SparseTargets(Y[:, None], torch.ones(N, 1), num_classes=K)
    for call in (lambda: smooth(T, eps), lambda: smooth(sparse, eps),
                 lambda: Fresh(3, epsilon=eps), lambda: ClosedForm(epsilon=eps),
                 lambda: SparseTargets(Y[:, None], torch.ones(N, 1), epsilon=eps, num_classes=K)):
        with refuses(f'epsilon.*{eps}'): call()
    with refuses('epsilon'):
        SparseTargets(Y[:, None], torch.ones(N, 1), epsilon=torch.tensor([0., .1, .2, eps]), num_classes=K)
    for m in (NLL(), SoftTargetCrossEntropy(), InfoNCE(), SoftDistributionInfoNCE(), SoftTargetInfoNCE()):
        with refuses('epsilon'): m.probs(X, epsilon=eps)


@pytest.mark.parametrize('lam', [-.1, 1.1, NAN])
def test_lam(lam):
    for call in (lambda: mix(T, lam), lambda: Fresh(3, lam=lam), lambda: ClosedForm(lam=lam)):
        with refuses(f'lam.*{lam}'): call()
    with refuses('lam'): mix(T, torch.tensor([.1, .2, .3, lam]))


def test_smooth_and_mix_shapes():
    with refuses('targets'): smooth(T[0], .1)
    with refuses('targets'): mix(T[0], .1)
    with refuses('targets'): smooth(T*.5, .1)
    with refuses('background'): smooth(T, .1, torch.full((K + 1,), 1/(K + 1)))
    with refuses('background'): smooth(T, .1, torch.tensor([.5, .6, .2]))
    with refuses('background'):
        smooth(SparseTargets(Y[:, None], torch.ones(N, 1), num_classes=K), .1, torch.full((K,), 1/K))
    with refuses('lam'): mix(T, torch.tensor([.1, .2]))
    for bad in (torch.tensor([0, 1]), torch.tensor([0, 1, 2, 4]), torch.tensor([0., 1., 2., 3.])):
        with refuses('permutation'): mix(T, .5, bad)


def test_sparse_targets():
    good = dict(indices=torch.tensor([[0, 1]]), weights=torch.tensor([[.3, .7]]), num_classes=K)
    SparseTargets(**good)
    for name, bad in [('indices', torch.tensor([0, 1])), ('indices', torch.tensor([[0, 3]])),
                      ('indices', torch.tensor([[-1, 0]])),
                      ('indices', torch.tensor([[0., 1.]])),
                      ('weights', torch.tensor([[.3, .3, .4]])), ('weights', torch.tensor([[.3, .6]])),
                      ('weights', torch.tensor([[-.3, 1.3]])), ('weights', torch.tensor([[NAN, .7]]))]:
        with refuses(f'^{name}'): SparseTargets(**{**good, name: bad})
    with refuses('^num_classes'): SparseTargets(good['indices'], good['weights'])
    with refuses('epsilon'): SparseTargets(**good, epsilon=torch.tensor([.1, .2]))
    with refuses('num_classes'):
        SparseTargets.cat([SparseTargets(**good), SparseTargets(**{**good, 'num_classes': K + 1})])


# ---------------------------------------------------------------- softnce.noise
def test_empirical_noise():
    with refuses('labels.*(class|classes)? ?.*1'): empirical_noise(torch.tensor([0, 2, 2]), 3)
    for bad in (torch.tensor([0, 3]), torch.tensor([0., 1.]), torch.tensor([], dtype=torch.long)):
        with refuses('labels'): empirical_noise(bad, 3)
        with refuses('labels'): empirical_noise(bad, 3, floor=.01)
    for floor in (0., -.1, NAN):
        with refuses('floor'): empirical_noise(torch.tensor([0, 2, 2]), 3, floor=floor)


def test_absent_classes_are_named():
    with refuses('5'): empirical_noise(torch.tensor([0, 1, 2, 3, 4, 6]), 7)


def test_sizes():
    with refuses('num_classes'): uniform_noise(0)
    for size in (0, -1):
        with refuses(f'size.*{size}'): Queue(size)
        with refuses(f'size.*{size}'): Fresh(size)


def test_continuous_categorical():
    for bad in ([.5, .5, 0.], [.5, .7, -.2], [.5, .5, NAN], [2., 3.]):
        with refuses('probs'): ContinuousCategorical(torch.tensor(bad))


def test_continuous_categorical_value():
    d = ContinuousCategorical(torch.tensor([.5, .3, .2], dtype=torch.float64))
    for bad in ([.5, .5, .5], [1.2, -.1, -.1], [.5, .5]):
        with refuses('value|simplex|support'): d.log_prob(torch.tensor(bad, dtype=torch.float64))


# ---------------------------------------------------------------- modules
def test_modules_check_their_constants_at_once():
    for cls in (InfoNCE, SoftDistributionInfoNCE, SoftTargetInfoNCE):
        with refuses('noise_probs'): cls(noise_probs=torch.tensor([.5, .5, 0.]))
    for cls in (NLL, SoftTargetCrossEntropy, InfoNCE, SoftDistributionInfoNCE, SoftTargetInfoNCE):
        with refuses('temperature'): cls(temperature=0.)
        with refuses('reduction'): cls(reduction='average')


# ---------------------------------------------------------------- value checks can be turned off, shape checks cannot
VALUE_ERRORS = {'negative': lambda: soft_target_info_nce(X, spoiled(T, -.1)),
                'sum': lambda: soft_target_info_nce(X, T*.9),
                'nan': lambda: soft_target_cross_entropy(X, spoiled(T, NAN)),
                'noise': lambda: info_nce(X, Y, noise_probs=torch.tensor([.5, .4, .3], dtype=torch.float64)),
                'extra': lambda: soft_target_info_nce(X, T, noise_samples=T*.5)}
SHAPE_ERRORS = {'rows': lambda: soft_target_info_nce(X, T[:3]),
                'classes': lambda: soft_target_cross_entropy(X, o.simplex(N, K + 1)),
                'noise': lambda: info_nce(X, Y, noise_probs=torch.full((4,), .25)),
                'extra': lambda: soft_target_info_nce(X, T, noise_samples=o.simplex(2, 4)),
                'logits': lambda: nll(X[0], Y), 'labels': lambda: nll(X, Y[:2]),
                'reduction': lambda: nll(X, Y, reduction='average')}


@pytest.mark.parametrize('name', VALUE_ERRORS)
def test_value_checks_off(name):
    call = VALUE_ERRORS[name]
    with refuses('targets|noise_probs|noise_samples'): call()
    with targets_module.set_value_checks(False): call()
    with refuses('targets|noise_probs|noise_samples'): call()          # on again after the block
    targets_module.set_value_checks(False)
    try: call()
    finally: targets_module.set_value_checks(True)
    with refuses('targets|noise_probs|noise_samples'): call()


@pytest.mark.parametrize('name', SHAPE_ERRORS)
def test_shape_checks_stay(name):
    with targets_module.set_value_checks(False), refuses('logits|labels|targets|noise_probs|noise_samples|reduction'):
        SHAPE_ERRORS[name]()


def test_value_checks_come_back_after_an_error():
    with pytest.raises(ZeroDivisionError), targets_module.set_value_checks(False): 1/0
    with refuses('targets'): soft_target_info_nce(X, T*.9)


def test_value_checks_do_not_change_the_value():
    with targets_module.set_value_checks(False):
        off = soft_target_info_nce(X, T, noise_probs=torch.tensor([.2, .3, .5], dtype=torch.float64))
    assert torch.equal(off, soft_target_info_nce(X, T, noise_probs=torch.tensor([.2, .3, .5], dtype=torch.float64)))
