"""Slow, literal reference implementations: one Python loop for each sum of the paper's equations, no matrix product.

Everything works on 0-d tensors, so autograd through an oracle gives its gradient. Written from the equations (1)-(13)
and (26)-(31), not from the package: nothing here imports softnce.
"""
import itertools
import math

import mpmath
import torch

WIDE = 64       # above this many classes the sum over classes is `Tensor.sum`; the loops over rows and candidates stay


# ---------------------------------------------------------------- problems
def generator(seed):
    return torch.Generator().manual_seed(seed)


def simplex(rows, num_classes, seed=0, peak=2., dtype=torch.float64):
    "Random strictly positive rows on the simplex."
    return torch.softmax(peak*torch.randn(rows, num_classes, generator=generator(seed), dtype=dtype), -1)


def noise(num_classes, seed=0, dtype=torch.float64):
    return simplex(1, num_classes, 1000 + seed, peak=.7, dtype=dtype)[0]


def ids(rows, num_classes, seed=0):
    return torch.randint(num_classes, (rows,), generator=generator(2000 + seed))


def logits(rows, num_classes, seed=0, scale=1., dtype=torch.float64):
    x = scale*torch.randn(rows, num_classes, generator=generator(3000 + seed), dtype=dtype)
    return x.requires_grad_()


def value_and_grad(function, *inputs, autocast=False, autocast_backward=False):
    """The value, and the gradient of its weighted sum with respect to each input (distinct weights: no row can hide
    behind another). With `autocast` the function runs under bfloat16 autocast and its backward pass outside, as torch
    recommends, or inside too."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    context = lambda on: torch.autocast('cpu', dtype=torch.bfloat16, enabled=on)
    with context(autocast): value = function(*inputs)
    weight = torch.linspace(.5, 1.5, max(value.numel(), 1), dtype=value.dtype).reshape(value.shape)
    with context(autocast_backward): grads = torch.autograd.grad((value*weight).sum(), inputs)
    return value.detach(), grads


def same(got, wanted, tol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=tol, atol=tol)


def same_value_and_grad(function, oracle, *inputs, tol=1e-12):
    (v1, g1), (v2, g2) = value_and_grad(function, *inputs), value_and_grad(oracle, *inputs)
    same(v1, v2, tol)
    for a, b in zip(g1, g2, strict=True): same(a, b, tol)
    return v1, g1


def reduced(per_row, reduction):
    if reduction == 'none': return per_row
    total = sum(per_row[1:], per_row[0])
    return total if reduction == 'sum' else total/len(per_row)


# ---------------------------------------------------------------- pieces of the equations
def scores(logits, noise_probs=None, temperature=1.):
    "s(z, y_k) = z.y_k/tau - log eta(k), the line under Eq. (5): a list of rows. No noise means the uniform one."
    n, k = logits.shape
    if noise_probs is None: noise_probs = [torch.tensor(1/k, dtype=logits.dtype)]*k
    if k > WIDE: return [logits[i]/temperature - torch.stack(list(noise_probs)).log() for i in range(n)]
    return [[logits[i, j]/temperature - torch.log(noise_probs[j]) for j in range(k)] for i in range(n)]


def energy(alpha, s):
    "sum_k alpha_k s_k, the exponent in Eq. (9) and (10)."
    if len(alpha) > WIDE: return (alpha*s).sum()
    total = 0.
    for k in range(len(alpha)): total = total + alpha[k]*s[k]
    return total


def log_sum_exp(terms):
    top = max(float(t.detach()) for t in terms)
    total = 0.
    for t in terms: total = total + torch.exp(t - top)
    return torch.log(total) + top


def position_loss(energies, position):
    "-log P(S = position | T) for unnormalised log ratios `energies`: Eq. (5), (10) and (30)."
    return log_sum_exp(energies) - energies[position]


def dense(targets, num_classes, dtype=torch.float64):
    "Rows as they are; class ids as one-hot rows, literally."
    if len(targets) and torch.is_tensor(targets[0]) and targets[0].ndim == 1: return targets
    rows = torch.zeros(len(targets), num_classes, dtype=dtype)
    for i, y in enumerate(targets): rows[i, int(y)] = 1.
    return rows


def dense_sparse(indices, weights, epsilon, num_classes):
    "(1-eps) sum_s w_s e_{k_s} + eps/K for each row."
    out = torch.zeros(len(indices), num_classes, dtype=torch.float64)
    for m in range(len(indices)):
        e = float(epsilon[m]) if torch.is_tensor(epsilon) and epsilon.ndim else float(epsilon)
        for k in range(num_classes): out[m, k] += e/num_classes
        for s in range(indices.shape[1]): out[m, int(indices[m, s])] += (1 - e)*float(weights[m, s])
    return out


# ---------------------------------------------------------------- the losses, one value per row
def nll(logits, labels, temperature=1.):
    "Eq. (1): -log q(y|x), q the softmax of the scaled logits."
    return torch.stack([position_loss([logits[i, k]/temperature for k in range(logits.shape[1])], int(labels[i]))
                        if logits.shape[1] <= WIDE else
                        torch.logsumexp(logits[i]/temperature, 0) - logits[i, int(labels[i])]/temperature
                        for i in range(len(logits))])


def soft_target_cross_entropy(logits, targets, temperature=1.):
    "Eq. (3): -sum_l alpha_l log q(l|x)."
    n, k = logits.shape
    targets, out = dense(targets, k), []
    for i in range(n):
        if k > WIDE:
            out.append(-(targets[i]*torch.log_softmax(logits[i]/temperature, 0)).sum())
            continue
        row = [logits[i, j]/temperature for j in range(k)]
        norm, total = log_sum_exp(row), 0.
        for j in range(k): total = total - targets[i, j]*(row[j] - norm)
        out.append(total)
    return torch.stack(out)


def info_nce(logits, labels, noise_probs=None, temperature=1., extra=(), fresh=None):
    """Eq. (5) over the labels of a tuple. Candidates: the batch's labels (row i's positive is number i) and the `extra`
    ones; or, with `fresh` labels, the row's own positive and the fresh ones."""
    s, out = scores(logits, noise_probs, temperature), []
    for i in range(len(logits)):
        own = i if fresh is None else 0
        tuple_ = [*labels, *extra] if fresh is None else [labels[i], *fresh]
        out.append(position_loss([s[i][int(y)] for y in tuple_], own))
    return torch.stack(out)


def soft_target_info_nce(logits, targets, noise_probs=None, temperature=1., extra=(), fresh=None):
    "Eq. (11) before the expectation: the loss of each row, candidates as in `info_nce`."
    n, k = logits.shape
    targets, extra = dense(targets, k), dense(extra, k) if len(extra) else []
    s, out = scores(logits, noise_probs, temperature), []
    for i in range(n):
        own = i if fresh is None else 0
        tuple_ = [*targets, *extra] if fresh is None else [targets[i], *fresh]
        out.append(position_loss([energy(alpha, s[i]) for alpha in tuple_], own))
    return torch.stack(out)


def noise_targets(num_classes, lam=1., epsilon=0.):
    "Every noise target a source can draw, with its pair of labels: (1-eps)(lam e_a + (1-lam) e_b) + eps/K."
    for a, b in itertools.product(range(num_classes), repeat=2):
        alpha = torch.full((num_classes,), epsilon/num_classes, dtype=torch.float64)
        alpha[a] += (1 - epsilon)*lam
        alpha[b] += (1 - epsilon)*(1 - lam)
        yield a, b, alpha


def closed_form(logits, targets, noise_probs=None, temperature=1., lam=1., epsilon=0.):
    "-alpha.s + log E[exp(alpha_noise.s)], the expectation enumerated over both labels of a noise target."
    n, k = logits.shape
    eta = [torch.tensor(1/k, dtype=logits.dtype)]*k if noise_probs is None else noise_probs
    targets, s, out = dense(targets, k), scores(logits, noise_probs, temperature), []
    for i in range(n):
        terms = [energy(alpha, s[i]) + torch.log(eta[a]) + torch.log(eta[b])
                 for a, b, alpha in noise_targets(k, lam, epsilon)]
        out.append(log_sum_exp(terms) - energy(targets[i], s[i]))
    return torch.stack(out)


def linear_logits(embeddings, weight, bias=None):
    rows = []
    for z in embeddings:
        row = [(z*w).sum() for w in weight]
        rows.append(torch.stack([x + bias[k] for k, x in enumerate(row)]) if bias is not None else torch.stack(row))
    return torch.stack(rows)


# ---------------------------------------------------------------- exact arithmetic
def mp_soft_target_info_nce(logits, targets, noise_probs, temperature=1., extra=(), digits=60):
    "Eq. (10) in exact arithmetic on the given numbers, for logits where float64 has to be careful."
    with mpmath.workdps(digits):
        f = lambda x: mpmath.mpf(float(x))
        out = []
        for i in range(len(logits)):
            s = [f(l)/f(temperature) - mpmath.log(f(e)) for l, e in zip(logits[i], noise_probs)]
            u = [mpmath.fsum(f(a)*x for a, x in zip(alpha, s)) for alpha in [*targets, *extra]]
            top = max(u)
            out.append(float(top + mpmath.log(mpmath.fsum(mpmath.exp(x - top) for x in u)) - u[i]))
    return torch.tensor(out, dtype=torch.float64)


def divided_difference(points, digits=120):
    """exp[t_1, ..., t_K] at distinct points: sum_i e^{t_i} / prod_{j != i} (t_i - t_j). By Hermite and Genocchi it is
    the integral of exp(sum_i alpha_i t_i) over the simplex, so Eq. (4)'s normaliser at t = log lambda."""
    with mpmath.workdps(digits):
        t = [mpmath.mpf(x) for x in points]
        total = mpmath.mpf(0)
        for i, x in enumerate(t):
            total += mpmath.exp(x)/mpmath.fprod(x - y for j, y in enumerate(t) if j != i)
        return total


def divided_difference_series(points, digits=60, extra_terms=80):
    """The same for any points, equal ones included: e^{t_min} sum_m h_m(t - t_min)/(m+K-1)!, h_m the complete
    homogeneous polynomials (Newton's identities). Every term is positive: nothing cancels."""
    with mpmath.workdps(digits):
        low = min(mpmath.mpf(x) for x in points)
        t = [mpmath.mpf(x) - low for x in points]
        k, count = len(t), int(4*max(t)) + extra_terms
        power, powers = [mpmath.mpf(1)]*k, []
        for _ in range(count):
            power = [p*x for p, x in zip(power, t)]
            powers.append(mpmath.fsum(power))
        h = [mpmath.mpf(1)]
        for m in range(1, count): h.append(mpmath.fsum(powers[r - 1]*h[m - r] for r in range(1, m + 1))/m)
        term, total = mpmath.mpf(1)/mpmath.factorial(k - 1), mpmath.mpf(0)
        for m in range(count):
            total += h[m]*term
            term /= m + k
        return mpmath.exp(low)*total


def log_parameters(probs, digits=60):
    "log of the normalised parameters, in mpmath."
    with mpmath.workdps(digits):
        p = [mpmath.mpf(float(x)) for x in probs]
        total = mpmath.fsum(p)
        return [mpmath.log(x/total) for x in p]


def cc_log_normalizer(probs, exact=divided_difference_series):
    with mpmath.workdps(120): return float(mpmath.log(exact(log_parameters(probs, 120))))


def cc_mean(probs, which=None):
    "E[alpha_i] = exp[t_1..t_K, t_i] / exp[t_1..t_K], for the coordinates in `which`."
    t = log_parameters(probs)
    below = divided_difference_series(t)
    which = range(len(t)) if which is None else which
    return torch.tensor([float(divided_difference_series([*t, t[i]])/below) for i in which], dtype=torch.float64)


def cc_second_moment(probs):
    "E[alpha_i alpha_j] = (1 + [i = j]) exp[t_1..t_K, t_i, t_j] / exp[t_1..t_K]."
    t = log_parameters(probs)
    below = divided_difference_series(t)
    return torch.tensor([[float((1 + (i == j))*divided_difference_series([*t, a, b])/below) for j, b in enumerate(t)]
                         for i, a in enumerate(t)], dtype=torch.float64)


# ---------------------------------------------------------------- position posteriors by Bayes' rule
def posterior_by_bayes(likelihoods):
    """P(S = k | T) from P(T | S = k) under the uniform prior on positions: the step from Eq. (7), (8) to (9), and from
    (26), (27) to (28)."""
    prior = 1/len(likelihoods)
    evidence = math.fsum(prior*x for x in likelihoods)
    return [prior*x/evidence for x in likelihoods]


def likelihood(densities_data, densities_noise, position):
    "P(T | S = position): the data law at the position, the noise law everywhere else (Eq. (7) and (26), first form)."
    out = 1.
    for i, (d, e) in enumerate(zip(densities_data, densities_noise)): out *= d if i == position else e
    return out
