"""softnce.experiments.imbalance: where the in-batch and the fresh InfoNCE loss are smallest, by exact enumeration.

A bias absorbs eta; priors can be chosen after training.
"""
import itertools, math
import pytest, torch
from hypothesis import given, strategies as st
from softnce.experiments.imbalance import optimal_logits, posterior
from softnce.losses import InfoNCE, info_nce
from softnce.noise import Fresh
from softnce.peers import LogitAdjustedCrossEntropy

D = dict(dtype=torch.float64)


def random_joint(seed, x=2, k=3):
    g = torch.Generator().manual_seed(seed)
    joint = torch.rand(x, k, generator=g, **D)*torch.tensor([8., 2., .4][:k], **D) + .01
    return joint/joint.sum()


def loops(scores, joint, noise, size):
    "Expected loss of a positive and `size` noise labels of the law `noise`, by loops over every tuple."
    total = 0.
    for x, k in itertools.product(*map(range, joint.shape)):
        for others in itertools.product(range(joint.shape[1]), repeat=size):
            p = joint[x, k]*math.prod(float(noise[o]) for o in others)
            candidates = torch.stack([scores[x, k], *(scores[x, o] for o in others)])
            total = total - p*(scores[x, k] - torch.logsumexp(candidates, 0))
    return total


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('size', [1, 3])
@pytest.mark.parametrize('eta', ['empirical', 'uniform', 'inverse', 'random'])
@pytest.mark.parametrize('source', ['batch', 'fresh'])
def test_the_claimed_optimum_has_no_gradient(seed, size, eta, source):
    joint = random_joint(seed)
    pi = joint.sum(0)
    eta = dict(empirical=pi, uniform=torch.full((3,), 1/3, **D), inverse=(1/pi)/(1/pi).sum(),
               random=torch.tensor([.2, .3, .5], **D))[eta]
    nu = pi if source == 'batch' else eta
    conditional = joint/joint.sum(1, keepdim=True)
    logits = optimal_logits(conditional, eta, nu).requires_grad_()
    assert torch.autograd.grad(loops(logits-eta.log(), joint, nu, size), logits)[0].abs().max() < 1e-12
    other = (logits.detach() + torch.tensor([.2, 0., -.2], **D)).requires_grad_() # not an optimum
    assert torch.autograd.grad(loops(other-eta.log(), joint, nu, size), other)[0].abs().max() > 1e-4


def test_the_loops_are_the_librarys_in_batch_loss():
    joint, eta = random_joint(0), torch.tensor([.2, .3, .5], **D)
    logits, rows = torch.randn(2, 3, **D), list(itertools.product(range(2), range(3)))
    total = 0.
    for batch in itertools.product(rows, repeat=3):
        x, y = torch.tensor(batch).T
        total += math.prod(float(joint[b]) for b in batch)*info_nce(logits[x], y, noise_probs=eta)
    torch.testing.assert_close(total, loops(logits-eta.log(), joint, joint.sum(0), 2), rtol=0, atol=1e-12)


def test_fresh_noise_comes_from_eta_and_not_from_the_batch():
    "The mean over draws of the library's loss with `Fresh`, against the loops with nu = eta."
    joint, eta = random_joint(1), torch.tensor([.1, .2, .7], **D)
    logits, (x, y) = torch.randn(2, 3, **D), torch.tensor(list(itertools.product(range(2), range(3)))).T
    source = Fresh(2, generator=torch.Generator().manual_seed(0))
    def draw(): return info_nce(logits[x], y, noise_probs=eta, noise_samples=source, reduction='none')
    draws = torch.stack([joint.flatten() @ draw() for _ in range(3000)])
    fresh, in_batch = (loops(logits-eta.log(), joint, noise, 2) for noise in (eta, joint.sum(0)))
    assert abs(draws.mean()-fresh) < 5*draws.std()/3000**.5 and abs(in_batch-fresh) > 20*draws.std()/3000**.5


@pytest.mark.parametrize('optimizer', [torch.optim.SGD, torch.optim.Adam])
def test_a_moved_bias_absorbs_eta(optimizer):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, generator=g, **D), torch.multinomial(torch.tensor([.7, .25, .05]), 40, True, generator=g)
    out = []
    for eta in (torch.tensor([.7, .25, .05], **D), torch.full((3,), 1/3, **D), torch.tensor([.1, .1, .8], **D)):
        W, b = torch.zeros(3, 4, requires_grad=True, **D), eta.log().requires_grad_()
        opt, loss = optimizer([W, b], lr=.1), InfoNCE(noise_probs=eta)
        for _ in range(50):
            opt.zero_grad()
            loss(x @ W.T + b, y).backward()
            opt.step()
        out.append((x @ W.T + b - eta.log()).detach())
    # Adam divides a rounding of a zero gradient by its epsilon, 1e-8
    tolerance = 1e-10 if optimizer is torch.optim.SGD else 1e-7
    for o in out[1:]: torch.testing.assert_close(o, out[0], rtol=0, atol=tolerance)


@given(st.integers(0, 999))
def test_scores_give_the_posterior_under_any_prior(seed):
    joint, prior = random_joint(seed), torch.rand(3, generator=torch.Generator().manual_seed(seed), **D) + .05
    prior = prior/prior.sum()
    pi = joint.sum(0)
    scores = optimal_logits(joint/joint.sum(1, keepdim=True), prior, pi) - prior.log()
    moved = joint/pi*prior
    want = moved/moved.sum(1, keepdim=True)
    torch.testing.assert_close(posterior(scores, prior), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(LogitAdjustedCrossEntropy(pi).probs(scores, prior=prior), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(InfoNCE(noise_probs=prior).probs(scores+prior.log()), want, rtol=0, atol=1e-12)


def test_errors_name_the_argument():
    p, c = torch.full((3,), 1/3), torch.full((2, 3), 1/3)
    calls = {'conditional must sum to 1': (c*2, p, p), 'candidate_probs must have shape': (c, p, c),
             'noise_probs must be positive': (c, torch.tensor([1., 0., 0.]), p)}
    for message, args in calls.items():
        with pytest.raises(ValueError, match=message): optimal_logits(*args)
    with pytest.raises(ValueError, match='scores must be'): posterior(torch.zeros(2, 4), p)
    with pytest.raises(ValueError, match='prior must be positive'):
        posterior(torch.zeros(2, 3), torch.tensor([1., 0., 0.]))
