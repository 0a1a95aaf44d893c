"""softnce.theory.soft_labels and the facts of its page (THEORY D1, D2, D5), against literal sums."""
import itertools
import math

import pytest
import torch

import oracles as o
from softnce.losses import InfoNCE, SoftTargetInfoNCE, info_nce, soft_target_info_nce
from softnce.theory import expected_target, optimal_scores
from softnce.theory.soft_labels import departure, vote_law

P = torch.tensor([[.1, .6, .3], [.2, .3, .5], [.5, .1, .4]], dtype=torch.float64)
PX = torch.tensor([.3, .3, .4], dtype=torch.float64)
PY = PX @ P
EYE = torch.eye(3, dtype=torch.float64)


def by_hand(probs, num_votes, weights):
    "Every sequence of votes, one at a time."
    law = {}
    for x, p in enumerate(probs.tolist()):
        for votes in itertools.product(range(len(p)), repeat=num_votes):
            key = tuple(votes.count(k) for k in range(len(p)))
            law[key] = law.get(key, 0.) + float(weights[x])*math.prod(p[k] for k in votes)
    return law


@pytest.mark.parametrize('probs', [P, torch.tensor([[.5, .5], [0., 1.], [.9, .1]], dtype=torch.float64)])
@pytest.mark.parametrize('num_votes', [1, 2, 5])
@pytest.mark.parametrize('weights', [None, PX])
def test_vote_law(probs, num_votes, weights):
    targets, law = vote_law(probs, num_votes, weights)
    wanted = by_hand(probs, num_votes, PX if weights is not None else [1/3]*3)
    got = {tuple(int(round(float(v)*num_votes)) for v in t): float(w) for t, w in zip(targets, law)}
    assert len(got) == len(targets) and set(wanted) <= set(got)
    for key, w in got.items(): assert abs(w - wanted.get(key, 0.)) < 1e-15
    o.same(law @ targets, (PX if weights is not None else torch.full_like(PX, 1/3)) @ probs)
    o.same(targets.sum(1), torch.ones_like(law))


@pytest.mark.parametrize('arguments, said', [((P*.9, 2), 'probs must sum to 1'), ((P[0], 2), 'probs must have shape'),
                                             ((P, 0), 'num_votes must be at least 1'),
                                             ((P, 1.5), 'num_votes must be an integer'),
                                             ((P, 2, PX[:2]/PX[:2].sum()), r'weights must have shape \(3,\)'),
                                             ((P, 2, PX*2), 'weights must sum to 1')])
def test_vote_law_refuses(arguments, said):
    with pytest.raises(ValueError, match=said): vote_law(*arguments)


def test_votes_overstate_more_and_more():
    reads = [(optimal_scores(P, *vote_law(P, v, PX)) + PY.log()).softmax(1) for v in (1, 2, 3, 5, 10)]
    o.same(reads[0], P, 1e-10)
    departures = torch.stack([departure(r, PY) for r in reads])
    assert (departures.diff(dim=0) > .05).all()
    assert [round(float(r[0, 1]), 3) for r in reads] == [.6, .748, .825, .9, .96]


def test_independent_votes_multiply_the_evidence_in_every_batch():
    "Candidates whose votes are independent draws from p_Y: s = V log(mu/p_Y), by the loss itself in small batches."
    num_votes, s = 2, 2*(P[0]/PY).log()
    own, others = (list(itertools.product(range(3), repeat=num_votes)),)*2
    for size in (2, 3):
        def mean_loss(l, total=0.):
            for v in own:
                for draw in itertools.product(others, repeat=size - 1):
                    w = math.prod(float(P[0, k]) for k in v)*math.prod(float(PY[k]) for d in draw for k in d)
                    noise = torch.stack([EYE[list(d)].mean(0) for d in draw])
                    target = EYE[list(v)].mean(0)[None]
                    total = total + w*soft_target_info_nce(l[None], target, noise_probs=PY, noise_samples=noise)
            return total
        assert torch.func.grad(mean_loss)(s + PY.log()).abs().max() < 1e-14
        assert torch.func.grad(mean_loss)(s/2 + PY.log()).abs().max() > 1e-2  # where one-hot targets would end


# ---------------------------------------------------------------- D2
@pytest.mark.parametrize('k, atoms', [(2, 3), (3, 4), (5, 4), (5, 12)])
def test_departure_theorem(k, atoms):
    g = o.generator(k*atoms)
    for seed in range(200):
        A, m = o.simplex(atoms, k, seed), o.simplex(1, atoms, 500 + seed)[0]
        s = 2*torch.randn(1, k, generator=g, dtype=torch.float64)
        base, tilt = m @ A, m*torch.exp(s[0] @ A.T)
        mu = tilt @ A/tilt.sum()
        literal = max(math.log(mu[a]/base[a]/(mu[b]/base[b])) for a in range(k) for b in range(k))
        o.same(departure(mu, base), torch.tensor(literal, dtype=torch.float64))
        o.same(departure((s + base.log()).softmax(1)[0], base), s.max() - s.min())
        assert literal <= float(s.max() - s.min())
        hot = torch.softmax(s[0] + o.noise(k, seed).log(), 0)  # one-hot targets: equality
        o.same(departure(hot, o.noise(k, seed)), s.max() - s.min())


@pytest.mark.parametrize('probs, base, said', [(P, PY*2, 'base must sum'), (P, EYE[0], 'base must be positive'),
                                               (EYE, PY, 'probs must be positive'),
                                               (P, torch.full((4,), .25), r'base must have shape \(3,\)')])
def test_departure_refuses(probs, base, said):
    with pytest.raises(ValueError, match=said): departure(probs, base)


# ---------------------------------------------------------------- smoothing, one site, a model that is trained already
def test_smoothing_changes_the_argmax_of_the_plain_read_out():
    p, py = torch.tensor([[.48, .46, .06]], dtype=torch.float64), torch.tensor([.6, .3, .1], dtype=torch.float64)
    logits = optimal_scores(.9*p + .1/3, .9*EYE + .1/3, py) + py.log()
    assert p.argmax() == 0 and logits.softmax(1).argmax() == 1
    o.same(SoftTargetInfoNCE(py).probs(logits, .1, 'labels'), p, 1e-10)


@pytest.mark.parametrize('size', [2, 3])
def test_batches_of_one_site(size):
    "Rows of site c, and an x that shows its site: exp(s) is p(y|x)/p(y|c) for every batch size."
    site, p = torch.tensor([.2, .3, .5], dtype=torch.float64), P[0]
    def mean_loss(s):
        total = 0.
        for y in itertools.product(range(3), repeat=size):
            w = float(p[y[0]])*math.prod(float(site[k]) for k in y[1:])
            total = total + w*info_nce(s[None], torch.tensor(y[:1]), noise_samples=torch.tensor(y[1:]))
        return total
    s = (p/site).log()
    assert torch.func.grad(mean_loss)(s).abs().max() < 1e-15
    assert torch.func.grad(mean_loss)((p/PY).log()).abs().max() > 1e-2
    read = InfoNCE(PY).probs((s + PY.log())[None])[0]  # the overall frequencies read it wrongly,
    o.same(read, p*PY/site/(p*PY/site).sum())
    o.same(InfoNCE(site).probs((s + site.log())[None])[0], p)  # those of the site rightly


def test_the_law_of_the_targets_reads_a_model_that_is_trained_already():
    A, m = vote_law(P, 4, PX)
    s = optimal_scores(P, A, m)
    o.same(expected_target(s, A, m), P, 1e-10)
    assert ((s + PY.log()).softmax(1) - P).abs().max() > .1
    with pytest.raises(ValueError, match='expected_target'): SoftTargetInfoNCE(PY).probs(s, targets='votes')
