"""softnce.noise: noise probabilities, the continuous categorical of Eq. (4), and where noise targets come from."""
import itertools
import math

import mpmath
import pytest
import torch

import oracles as o
from softnce.losses import SoftTargetInfoNCE, info_nce, soft_target_cross_entropy, soft_target_info_nce
from softnce.noise import ClosedForm, ContinuousCategorical, Fresh, InBatch, Queue, empirical_noise, uniform_noise
from softnce.targets import SparseTargets, one_hot

CC = ContinuousCategorical


# ---------------------------------------------------------------- noise probabilities
@pytest.mark.parametrize('k', [2, 7, 21841])
def test_uniform_noise(k):
    eta = uniform_noise(k)
    assert eta.shape == (k,) and torch.equal(eta, torch.full_like(eta, 1/k))


def test_empirical_noise_counts():
    y = torch.tensor([2, 0, 2, 1, 2, 0, 0, 0])
    o.same(empirical_noise(y, 3).double(), torch.tensor([4/8, 1/8, 3/8], dtype=torch.float64), 1e-7)


def test_empirical_noise_floor():
    eta = empirical_noise(torch.tensor([0, 0, 0, 2]), 4, floor=.01).double()
    assert eta.min() > 0 and abs(eta.sum() - 1) < 1e-6
    assert eta[1] == eta[3] and eta[0] > eta[2] > eta[1]
    assert .01 - 1e-8 <= eta[1] < .012               # the floor is the smallest probability, after normalising too
    o.same(empirical_noise(torch.tensor([0, 0, 1]), 2, floor=1e-3).double(), torch.tensor([2/3, 1/3]).double(), 2e-3)


# ---------------------------------------------------------------- Eq. (4): the normaliser
def spread(k, width=2., seed=0):
    return torch.softmax(width*torch.randn(k, generator=o.generator(seed), dtype=torch.float64), 0)


def test_the_two_exact_forms_agree():
    for k in (2, 3, 10):
        t = o.log_parameters(spread(k))
        a, b = o.divided_difference(t), o.divided_difference_series(t)
        assert abs(a/b - 1) < mpmath.mpf(10)**-40


@pytest.mark.parametrize('k', range(2, 11))
@pytest.mark.parametrize('width', [.1, 1., 4.])
def test_log_normalizer_at_distinct_parameters(k, width):
    p = spread(k, width, k)
    got = CC(p).log_normalizer
    assert got.shape == () and got.dtype == torch.float64
    assert abs(float(got) - o.cc_log_normalizer(p, o.divided_difference)) < 1e-12


def test_log_normalizer_two_classes_by_hand():
    "K = 2: the integral of p^a (1-p)^(1-a) over [0,1] is (2p-1)/(log p - log(1-p))."
    p = torch.tensor([.9, .1], dtype=torch.float64)
    assert abs(float(CC(p).log_normalizer) - math.log(.8/math.log(9))) < 1e-14


@pytest.mark.parametrize('k', [2, 3, 10, 200, 1000])
def test_log_normalizer_at_equal_parameters(k):
    "The integrand is the constant 1/K and the simplex has volume 1/(K-1)!."
    got = float(CC(torch.full((k,), 1/k, dtype=torch.float64)).log_normalizer)
    assert got == pytest.approx(-math.lgamma(k) - math.log(k), rel=1e-13, abs=1e-12)


@pytest.mark.parametrize('gap', [1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
@pytest.mark.parametrize('k', [3, 6])
def test_log_normalizer_at_nearly_equal_parameters(k, gap):
    p = torch.full((k,), 1/k, dtype=torch.float64)*(1 + gap*torch.arange(k, dtype=torch.float64))
    p = p/p.sum()
    assert abs(float(CC(p).log_normalizer) - o.cc_log_normalizer(p)) < 1e-12


@pytest.mark.parametrize('epsilon', [.5, .1, 1e-3, 1e-9])
@pytest.mark.parametrize('k', [3, 10, 100])
def test_log_normalizer_at_smoothed_one_hot(k, epsilon):
    "All parameters but one are equal: the textbook form is 0/0 here."
    p = torch.full((k,), epsilon/k, dtype=torch.float64)
    p[1] += 1 - epsilon
    wanted = o.cc_log_normalizer(p)
    assert abs(float(CC(p).log_normalizer) - wanted) < 1e-12*max(1, abs(wanted))


@pytest.mark.parametrize('p', [lambda: spread(1000, 1.), lambda: spread(1000, 3., 1),
                               lambda: torch.cat([torch.tensor([.9]), torch.full((999,), .1/999)]).double()],
                         ids=['spread', 'wide', 'smoothed'])
def test_log_normalizer_of_a_thousand_classes(p):
    p = p()/p().sum()
    wanted = o.cc_log_normalizer(p)
    assert -5950 < wanted < -5000
    assert abs(float(CC(p).log_normalizer) - wanted) < 1e-12*abs(wanted)


def test_log_normalizer_batches():
    p = torch.stack([spread(5, 1., 0), spread(5, 2., 1), torch.full((5,), .2, dtype=torch.float64)])
    d = CC(torch.stack([p, p.flip(0)]))
    assert d.batch_shape == (2, 3) and d.event_shape == (5,) and isinstance(d, torch.distributions.Distribution)
    assert d.log_normalizer.shape == (2, 3) and d.mean.shape == (2, 3, 5)
    for i, row in enumerate(p):
        o.same(d.log_normalizer[0, i], CC(row).log_normalizer, 1e-14)
        o.same(d.mean[0, i], CC(row).mean, 1e-14)
        assert d.log_normalizer[1, 2 - i] == pytest.approx(float(d.log_normalizer[0, i]), abs=1e-14)


def test_class_order_does_not_matter():
    p, order = spread(6, 3.), torch.tensor([3, 1, 5, 0, 2, 4])
    o.same(CC(p[order]).log_normalizer, CC(p).log_normalizer)
    o.same(CC(p[order]).mean, CC(p).mean[order])


# ---------------------------------------------------------------- the mean
@pytest.mark.parametrize('k, width', [(2, 1.), (3, 3.), (7, .5), (10, 4.)])
def test_mean_against_exact_arithmetic(k, width):
    p = spread(k, width, k)
    mean = CC(p).mean
    o.same(mean, o.cc_mean(p), 1e-11)
    assert abs(mean.sum() - 1) < 1e-12


def test_mean_at_equal_parameters():
    for k in (2, 3, 40):
        o.same(CC(torch.full((k,), 1/k, dtype=torch.float64)).mean, torch.full((k,), 1/k, dtype=torch.float64))


def test_mean_of_a_thousand_classes():
    "At K = 1000 the mean of CC(p) has forgotten p: no coordinate is near the .9 it was given."
    p = torch.cat([torch.tensor([.9]), torch.full((999,), .1/999)]).double()
    p = p/p.sum()
    mean = CC(p).mean
    o.same(mean[:2], o.cc_mean(p, [0, 1]), 1e-10)
    assert abs(mean.sum() - 1) < 1e-9 and mean[0] < .01


@pytest.mark.parametrize('k', [2, 3, 6])
def test_mean_is_the_derivative_of_the_log_normalizer(k):
    "d log C/d log p_j with the parameters kept normalised is mean_j - p_j; central differences."
    theta, h = torch.randn(k, generator=o.generator(k), dtype=torch.float64), 1e-5
    p = torch.softmax(theta, 0)
    for j in range(k):
        step = torch.zeros(k, dtype=torch.float64)
        step[j] = h
        up, down = (CC(torch.softmax(theta + d, 0)).log_normalizer for d in (step, -step))
        slope = (up - down)/(2*h)
        assert abs(float(CC(p).mean[j] - p[j]) - float(slope)) < 1e-9
    assert (CC(p).mean - p).abs().max() > 1e-2      # and the mean of CC(p) is not p


# ---------------------------------------------------------------- the density
def test_log_prob_literally():
    p, a = spread(4), o.simplex(3, 4)
    for row in a:
        wanted = sum(float(row[i])*math.log(float(p[i])) for i in range(4)) - o.cc_log_normalizer(p)
        assert abs(float(CC(p).log_prob(row)) - wanted) < 1e-12
    batch = CC(torch.stack([p, p.flip(0), p])).log_prob(a)
    assert batch.shape == (3,) and abs(float(batch[1] - CC(p.flip(0)).log_prob(a[1]))) < 1e-14


@pytest.mark.parametrize('p', [[.9, .1], [.5, .5], [.999, .001]])
def test_density_integrates_to_one_on_the_segment(p):
    x, w = quadrature(60)
    a = torch.stack([x, 1 - x], -1)
    assert abs((w*CC(torch.tensor(p, dtype=torch.float64)).log_prob(a).exp()).sum() - 1) < 1e-12


@pytest.mark.parametrize('p', [[.7, .2, .1], [1/3, 1/3, 1/3], [.98, .01, .01]])
def test_density_integrates_to_one_on_the_triangle(p):
    "Lebesgue measure on the first two coordinates, the square folded onto the triangle."
    (x, wx), (y, wy) = quadrature(40), quadrature(40)
    a1, a2 = x[:, None].expand(40, 40), (1 - x)[:, None]*y
    a = torch.stack([a1, a2, 1 - a1 - a2], -1)
    weight = wx[:, None]*wy*(1 - x)[:, None]
    d = CC(torch.tensor(p, dtype=torch.float64))
    density = weight*d.log_prob(a).exp()
    assert abs(density.sum() - 1) < 1e-12
    o.same((density[..., None]*a).sum((0, 1)), d.mean, 1e-11)


def quadrature(n):
    "Gauss-Legendre on [0, 1] (Golub-Welsch)."
    i = torch.arange(1, n, dtype=torch.float64)
    off = i/torch.sqrt(4*i**2 - 1)
    x, v = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (x + 1)/2, v[0]**2


# ---------------------------------------------------------------- sampling
def on_the_simplex(a, tol=1e-9):
    return bool((a >= 0).all()) and bool(((a.sum(-1) - 1).abs() < tol).all())


def test_sample_shapes():
    d = CC(torch.stack([spread(4, 1., 0), spread(4, 1., 1)]))
    assert d.sample().shape == (2, 4) and d.sample((5,)).shape == (5, 2, 4) and d.sample((3, 2)).shape == (3, 2, 2, 4)
    assert CC(spread(4)).sample((7,)).shape == (7, 4)
    assert on_the_simplex(d.sample((100,)))


def test_sample_is_seeded():
    d = CC(spread(4))
    torch.manual_seed(3)
    a = d.sample((5,))
    torch.manual_seed(3)
    assert torch.equal(a, d.sample((5,))) and not torch.equal(a, d.sample((5,)))


@pytest.mark.parametrize('p', [.9, .5, .02])
def test_sample_of_two_classes_follows_its_distribution_function(p):
    "Kolmogorov-Smirnov: F(a) = (e^{ta} - 1)/(e^t - 1), t = log p/(1-p)."
    n = 20000
    a = CC(torch.tensor([p, 1 - p], dtype=torch.float64)).sample((n,))[:, 0].sort().values
    t = math.log(p/(1 - p))
    cdf = a if t == 0 else torch.expm1(t*a)/math.expm1(t)
    steps = torch.arange(n + 1, dtype=torch.float64)/n
    distance = float(torch.maximum((cdf - steps[:-1]).abs(), (cdf - steps[1:]).abs()).max())
    assert distance*math.sqrt(n) < 1.95              # one in a thousand
    wrong = torch.expm1((t + .3)*a)/math.expm1(t + .3)
    assert float((wrong - steps[1:]).abs().max())*math.sqrt(n) > 1.95


@pytest.mark.parametrize('p', [(.7, .2, .1), (1/3, 1/3, 1/3), (.98, .01, .01), (.4, .3, .2, .1),
                               (.9, .05, .03, .01, .01)])
def test_sample_moments(p):
    "First and second moments within five standard errors of the exact ones."
    p, n = torch.tensor(p, dtype=torch.float64), 20000
    p = p/p.sum()
    a = CC(p).sample((n,))
    assert a.shape == (n, len(p)) and on_the_simplex(a)
    within(a, o.cc_mean(p))
    within(torch.stack([a[:, i]*a[:, j] for i in range(len(p)) for j in range(len(p))], -1),
           o.cc_second_moment(p).flatten())


def within(draws, wanted, errors=5.):
    error = draws.std(0)/math.sqrt(len(draws))
    assert ((draws.mean(0) - wanted).abs() <= errors*error + 1e-12).all(), (draws.mean(0), wanted, error)


def test_sample_marginal_of_three_classes():
    "Kolmogorov-Smirnov for the first coordinate, its distribution function by quadrature over the other."
    p, n = torch.tensor([.2, .5, .3], dtype=torch.float64), 10000
    t = p.log()
    a = CC(p).sample((n,))[:, 0].sort().values
    x, w = quadrature(12)

    def density(u):     # integral over a2 in [0, 1-u]
        a2 = (1 - u)[..., None]*x
        return (1 - u)*(w*torch.exp(u[..., None]*t[0] + a2*t[1] + (1 - u[..., None] - a2)*t[2])).sum(-1)

    below = (density(a[:, None]*x)*w).sum(-1)*a
    cdf, steps = below/(density(x)*w).sum(), torch.arange(n + 1, dtype=torch.float64)/n
    assert float(torch.maximum((cdf - steps[:-1]).abs(), (cdf - steps[1:]).abs()).max())*math.sqrt(n) < 1.95


def test_sample_of_a_thousand_classes():
    p = torch.cat([torch.tensor([.9]), torch.full((999,), .1/999)]).double()
    p, n = p/p.sum(), 400
    a = CC(p).sample((n,))
    assert a.shape == (n, 1000) and on_the_simplex(a, 1e-6)
    within(a[:, :1], o.cc_mean(p, [0]))
    within(a[:, 1:].square().mean(-1, keepdim=True), torch.tensor([2/1000/1001], dtype=torch.float64)*1.)


# ---------------------------------------------------------------- sources
def decode(loss, s, own, alphas):
    """How often each of the `alphas` is among the noise targets, from the losses of as many rows as there are alphas:
    every row sees the same noise, so exp(loss + own) - exp(own) = sum_a c_a exp(alpha_a . s) is a linear system in the
    counts."""
    right = torch.exp(loss + own) - torch.exp(own)
    return torch.linalg.solve(torch.exp(s @ torch.stack(alphas).T), right)


def chi_square(counts, probs):
    expected = counts.sum()*probs
    return float(((counts - expected)**2/expected).sum())


@pytest.mark.parametrize('lam, epsilon', [(1., 0.), (1., .2), (.3, 0.), (.2, .1)])
def test_fresh_draws_are_mixtures_of_independent_noise_labels(lam, epsilon):
    "Drawn from eta, shared by the rows, exactly `size` of them, the batch's other targets not among them."
    k, size, eta = 3, 20000, torch.tensor([.6, .3, .1], dtype=torch.float64)
    pairs = [(a, b, t) for a, b, t in o.noise_targets(k, lam, epsilon) if lam < 1 or b == 0]
    alphas = [t for *_, t in pairs]
    x, y = o.logits(len(pairs), k, 1, scale=2.).detach(), o.simplex(len(pairs), k)
    s = x - eta.log()
    loss = soft_target_info_nce(x, y, noise_probs=eta, reduction='none',
                                noise_samples=Fresh(size, lam, epsilon, generator=o.generator(0)))
    counts = decode(loss, s, (y*s).sum(-1), alphas)
    assert (counts - counts.round()).abs().max() < 1e-3*size**.5 and abs(counts.sum() - size) < 1e-3*size
    probs = torch.stack([eta[a]*(eta[b] if lam < 1 else 1.) for a, b, _ in pairs])
    assert chi_square(counts, probs) < 30           # 8 degrees of freedom at most: far beyond one in a thousand
    assert chi_square(counts, torch.full_like(probs, 1/len(pairs))) > 300


def test_fresh_labels_of_hard_info_nce():
    k, size, eta = 3, 20000, torch.tensor([.6, .3, .1], dtype=torch.float64)
    x, y = o.logits(k, k, 1).detach(), torch.tensor([0, 2, 1])
    s = x - eta.log()
    loss = info_nce(x, y, noise_probs=eta, noise_samples=Fresh(size, generator=o.generator(0)), reduction='none')
    counts = decode(loss, s, s[torch.arange(k), y], list(torch.eye(k, dtype=torch.float64)))
    assert (counts - counts.round()).abs().max() < 1e-3 and abs(counts.sum() - size) < 1e-3
    assert chi_square(counts, eta) < 20


def test_fresh_is_seeded_and_fresh():
    x, y = o.logits(4, 3).detach(), o.simplex(4, 3)
    source = lambda seed: Fresh(3, lam=.3, generator=o.generator(seed))
    run = lambda f: soft_target_info_nce(x, y, noise_samples=f)
    f = source(0)
    first = run(f)
    assert torch.equal(first, run(source(0)))
    assert not torch.equal(first, run(f)) and not torch.equal(first, run(source(1)))


@pytest.mark.parametrize('lam, epsilon', [(1., 0.), (.3, .1)])
def test_fresh_partition_estimates_the_closed_form(lam, epsilon):
    """exp(loss + alpha.s) - exp(alpha.s) over M noise targets is an unbiased estimate of E[exp(alpha_noise.s)], the
    closed form's."""
    k, size, draws, eta = 4, 3, 1500, o.noise(4)
    x, y = o.logits(2, k).detach(), o.simplex(2, k)
    own = (y*(x - eta.log())).sum(-1)
    wanted = torch.exp(soft_target_info_nce(x, y, noise_probs=eta, noise_samples=ClosedForm(lam, epsilon),
                                            reduction='none') + own)
    source, seen = Fresh(size, lam, epsilon, generator=o.generator(0)), []
    for _ in range(draws):
        loss = soft_target_info_nce(x, y, noise_probs=eta, noise_samples=source, reduction='none')
        seen.append((torch.exp(loss + own) - torch.exp(own))/size)
    seen = torch.stack(seen)
    within(seen, wanted)
    assert (seen.std(0)/math.sqrt(draws) < .05*wanted).all()       # the interval is narrow enough to mean something


def test_many_fresh_targets_approach_the_closed_form():
    k, eta = 5, o.noise(5)
    x, y = o.logits(3, k).detach(), o.simplex(3, k)
    loss = lambda source: soft_target_info_nce(x, y, noise_probs=eta, noise_samples=source, reduction='none')
    limit, gap = loss(ClosedForm(.3, .1)), []
    for size in (100, 10000, 1000000):
        gap.append(float((loss(Fresh(size, .3, .1, generator=o.generator(0))) - math.log(size) - limit).abs().max()))
    assert gap[0] > 1e-3 and gap[1] < .05 and gap[2] < .005


def test_closed_form_with_hard_noise_is_soft_target_cross_entropy():
    "Up to the constant sum_k alpha_k log eta_k; with lam < 1 it is another loss."
    eta, t, x = o.noise(5), o.simplex(4, 5), o.logits(4, 5)
    closed = lambda source: lambda l: soft_target_info_nce(l, t, noise_probs=eta, temperature=.7, noise_samples=source,
                                                           reduction='none')
    wanted = lambda l: soft_target_cross_entropy(l, t, temperature=.7, reduction='none') + (t*eta.log()).sum(-1)
    o.same_value_and_grad(closed(ClosedForm()), wanted, x)
    assert (closed(ClosedForm(lam=.5))(x) - wanted(x)).abs().min() > 1e-3


def test_queue_holds_the_last_targets_of_the_previous_calls():
    k, eta = 4, o.noise(4)
    batches = [(o.logits(n, k, i).detach(), o.simplex(n, k, i)) for i, n in enumerate([2, 3, 1, 4, 2])]
    queue, past = Queue(5), []
    for x, t in batches:
        got = soft_target_info_nce(x, t, noise_probs=eta, noise_samples=queue, reduction='none')
        o.same(got, o.soft_target_info_nce(x, t, eta, extra=past[-5:]))
        past += list(t)
    assert len(past) > 10                            # the queue overflowed on the way


def test_queue_smaller_than_the_batch():
    x, t = o.logits(4, 3).detach(), o.simplex(4, 3)
    queue = Queue(2)
    soft_target_info_nce(x, t, noise_samples=queue)
    o.same(soft_target_info_nce(x, t, noise_samples=queue, reduction='none'),
           o.soft_target_info_nce(x, t, extra=list(t[2:])))


def test_queue_of_hard_labels():
    k, eta, queue, past = 4, o.noise(4), Queue(3), []
    for i, n in enumerate([2, 3, 1]):
        x, y = o.logits(n, k, i).detach(), o.ids(n, k, i)
        o.same(info_nce(x, y, noise_probs=eta, noise_samples=queue, reduction='none'),
               o.info_nce(x, y, eta, extra=past[-3:]))
        past += y.tolist()


def test_queue_targets_carry_no_graph():
    "Two backward passes in turn: a queue that kept the first one's graph would fail in the second."
    queue = Queue(4)
    for seed in range(2):
        x, teacher = o.logits(3, 4, seed), o.logits(3, 4, 5 + seed)
        soft_target_info_nce(x, torch.softmax(teacher, -1), noise_samples=queue).backward()
        assert x.grad.isfinite().all()


def test_queue_is_not_filled_in_evaluation():
    x, t = o.logits(3, 4).detach(), o.simplex(3, 4)
    queue = Queue(4)
    with torch.no_grad(): soft_target_info_nce(x, t, noise_samples=queue)
    o.same(soft_target_info_nce(x, t, noise_samples=queue), soft_target_info_nce(x, t))


def test_queue_keeps_its_own_copy():
    "A training loop may write the next batch into the same tensor."
    x, buffer, first = o.logits(3, 4).detach(), o.simplex(3, 4, 1), o.simplex(3, 4, 1)
    queue = Queue(4)
    soft_target_info_nce(x, buffer, noise_samples=queue)
    buffer.copy_(o.simplex(3, 4, 2))
    o.same(soft_target_info_nce(x, buffer, noise_samples=queue, reduction='none'),
           o.soft_target_info_nce(x, buffer, extra=first))


@pytest.mark.parametrize('kind', ['dense', 'sparse', 'ids'])
def test_queue_is_saved_and_loaded(kind, tmp_path):
    x, y = o.logits(3, 4).detach(), o.ids(3, 4)
    t = {'dense': o.simplex(3, 4), 'ids': y,
         'sparse': SparseTargets(y[:, None], torch.ones(3, 1).double(), epsilon=.1, num_classes=4)}[kind]
    a, b = SoftTargetInfoNCE(noise_samples=Queue(2)), SoftTargetInfoNCE(noise_samples=Queue(2))
    a(x, t)
    torch.save(a.state_dict(), tmp_path/'state.pt')
    b.load_state_dict(torch.load(tmp_path/'state.pt', weights_only=True))
    with torch.no_grad():
        assert torch.equal(a(x, t), b(x, t))
        assert (a(x, t) - soft_target_info_nce(x, t)).abs() > 1e-3


def test_in_batch_is_none():
    x, t, y = o.logits(4, 3), o.simplex(4, 3), o.ids(4, 3)
    assert torch.equal(soft_target_info_nce(x, t, noise_samples=InBatch()), soft_target_info_nce(x, t))
    assert torch.equal(info_nce(x, y, noise_samples=InBatch()), info_nce(x, y))


# ---------------------------------------------------------------- Eq. (7)-(9), soft targets: the normalisers cancel
def test_position_posterior_of_soft_targets():
    """Every tuple of three targets from a finite set: Bayes' rule on the densities (normalised or not) gives
    exp(-loss), Eq. (7)-(10)."""
    p, eta = spread(3, 1., 5), o.noise(3, 5)
    points, data, noise = o.simplex(4, 3, 7), CC(p), CC(eta)
    f = lambda d, norm: [math.exp(float(d.log_prob(a)) + (0 if norm else float(d.log_normalizer))) for a in points]
    worst, apart = 0., 0.
    for t in itertools.product(range(4), repeat=3):
        posteriors = []
        for norm in (True, False):
            fd, fn = f(data, norm), f(noise, norm)
            like = [o.likelihood([fd[i] for i in t], [fn[i] for i in t], k) for k in range(3)]
            second = [fd[t[k]]/fn[t[k]]*math.prod(fn[i] for i in t) for k in range(3)]                     # (7)
            marginal = math.prod(fn[i] for i in t)*sum(fd[i]/fn[i] for i in t)/3                           # (8)
            assert all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(like, second))
            assert math.isclose(marginal, sum(like)/3, rel_tol=1e-12)
            posteriors.append(o.posterior_by_bayes(like))
        ratio = [math.prod((float(p[i])/float(eta[i]))**float(points[m, i]) for i in range(3)) for m in t]  # (9), right
        loss = float(soft_target_info_nce(p.log()[None], points[t[0]][None], noise_probs=eta,
                                          noise_samples=points[list(t[1:])]))
        for wanted in (posteriors[0][0], posteriors[1][0], ratio[0]/sum(ratio)):
            worst = max(worst, abs(math.exp(-loss) - wanted))
        apart = max(apart, abs(math.exp(-loss) - 1/3))
    assert worst < 1e-12 and apart > 1e-2


def test_targets_of_a_queue_can_be_one_hot_or_ids():
    x, y, k = o.logits(3, 4).detach(), o.ids(3, 4), 4
    a, b = Queue(4), Queue(4)
    for _ in range(2):
        same = (soft_target_info_nce(x, y, noise_samples=a),
                soft_target_info_nce(x, one_hot(y, k).double(), noise_samples=b))
        o.same(*same)
