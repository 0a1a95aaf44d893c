"""The sums as loops over rows, candidates and classes, on 0-d tensors: autograd through them is the gradient. Nothing
here imports softnce.
"""
import torch

F64, INF = torch.float64, float('inf')


def scores(x, log_eta=None, scale=1.):
    "s = scale*(l - max l) - log eta, row by row."
    shifted = [scale*(row - row.detach().max()) for row in x]
    return [s if log_eta is None else s - log_eta for s in shifted]


def energy(alpha, s):
    "<alpha, s>: a class without mass counts as nothing, also where its score is -inf."
    return sum((a*v for a, v in zip(alpha, s) if a != 0), torch.zeros((), dtype=F64))


def log_sum_exp(values):
    top = max(float(v.detach()) for v in values)
    if top == -INF: return torch.tensor(-INF, dtype=F64)
    return top + torch.log(sum(torch.exp(v - top) for v in values))


def target(ids, weights, share, K):
    "A target as a list of K numbers, entry by entry."
    row = [torch.as_tensor(share, dtype=F64)/K for _ in range(K)]
    for k, w in zip(ids.tolist(), weights): row[k] = row[k] + w.double()
    return row


def sums_over_classes(x, own, exponents=(1.,), offsets=None, own_class=None, own_offset=None, log_eta=None, scale=1.):
    "Of each row: sum_t log sum_k exp(t s_k + o_tk) - <own, s>."
    rows = []
    for i, s in enumerate(scores(x, log_eta, scale)):
        total = -energy(own[i], s)
        for j, t in enumerate(exponents):
            terms = []
            for k in range(len(s)):
                o = 0. if offsets is None else offsets[j % len(offsets)][k]
                terms.append(t*s[k] + (own_offset[i] if own_class is not None and k == own_class[i] else o))
            total = total + log_sum_exp(terms)
        rows.append(total)
    return torch.stack(rows)


def sums_over_candidates(x, candidates, own, in_batch, log_eta=None, scale=1.):
    "Of each row: the log-sum-exp over the candidates but the row's own, less its own score."
    rows = []
    for i, s in enumerate(scores(x, log_eta, scale)):
        others = [energy(a, s) for m, a in enumerate(candidates) if not (in_batch and m == i)]
        rows.append(log_sum_exp(others) - energy(own[i], s))
    return torch.stack(rows)


def sums_over_products(a, b, shift=None, in_batch=True):
    "The same with <a_i, b_m> + shift_m as the scores of candidates."
    rows = []
    for i in range(len(a)):
        u = [sum(p*q for p, q in zip(a[i], b[m])) + (0. if shift is None else shift[m]) for m in range(len(b))]
        others = [u[m] for m in range(len(b)) if not (in_batch and m == i)]
        rows.append(log_sum_exp(others) - (u[i] if in_batch else 0.))
    return torch.stack(rows)


def value_and_gradients(function, *inputs):
    "Rows, and gradients of their sum under weights of both signs: no row hides behind another."
    x = [i.detach().clone(memory_format=torch.preserve_format).requires_grad_() for i in inputs]
    rows = function(*x)
    weights = torch.linspace(-1, 2, len(rows), dtype=rows.dtype, device=rows.device)
    return rows.detach(), *torch.autograd.grad((weights*rows).sum(), x)


def assert_same(fast, slow, *inputs, tol=1e-12):
    for a, b in zip(value_and_gradients(fast, *inputs), value_and_gradients(slow, *inputs)):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def generator(seed=0): return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0): return torch.randn(*shape, generator=generator(seed), dtype=F64)


def uniform(*shape, seed=0): return torch.rand(*shape, generator=generator(seed), dtype=F64)


def classes(K, *shape, seed=0): return torch.randint(K, shape, generator=generator(seed))


def sparse_case(N, M, K, S, one_weight, seed=0):
    "Logits, and candidates' classes and weights, which the first N rows own."
    w = uniform(1 if one_weight else M, S, seed=seed).expand(M, S)
    return normal(N, K, seed=seed), classes(K, M, S, seed=seed), w
