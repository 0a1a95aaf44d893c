"""softnce.theory.gradients, Eqs. (19)-(25): closed forms against autograd and finite differences through losses written
out here, the slips of the printed equations, and every documented error."""
import itertools
import math
from pathlib import Path

import pytest
import torch

from oracles import generator, ids, noise, same, simplex
from softnce.targets import SparseTargets
from softnce.theory.gradients import (attraction_repulsion, candidate_gradient, embedding_gradient,
                                      label_embedding_gradient, logit_gradient, normalization_gradient, score_gradient)

SHAPES = [(1, 2, 2), (1, 5, 3), (4, 4, 7), (3, 8, 2), (6, 6, 1)]  # rows, candidates, classes
NOTEBOOK = Path(__file__).parents[2]/'nbs'/'theory'/'gradients.ipynb'


def refuses(match): return pytest.raises(ValueError, match=match)
def normal(*shape, seed=0): return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# ---------------------------------------------------------------- Eq. (19), one loop for each sum
def loss(s, alpha, k):
    "Eq. (19) as printed, for scores `s` (a list of scalars), candidates `alpha` and positive `k`."
    total = 0.
    for i in range(len(s)):
        denominator = 0.
        for l in range(len(alpha)):
            energy = 0.
            for j in range(len(s)): energy = energy + alpha[l][j]*s[j]
            denominator = denominator + torch.exp(energy)
        total = total - alpha[k][i]*torch.log(torch.exp(s[i])/denominator)
    return total


def mean_loss(rows, alpha, positives):
    return sum(loss(list(s), alpha, int(k)) for s, k in zip(rows, positives))/len(rows)


def mean_loss_of_logits(logits, alpha, positives, eta, tau):
    return mean_loss(torch.stack([torch.stack([l/tau - torch.log(e) for l, e in zip(row, eta)]) for row in logits]),
                     alpha, positives)


def dot(a, b): return sum(x*y for x, y in zip(a, b))
def length(v): return torch.sqrt(dot(v, v))
def inner(z, y): return torch.stack([torch.stack([dot(a, b) for b in y]) for a in z])
def cosine(z, y): return torch.stack([torch.stack([dot(a, b)/(length(a)*length(b)) for b in y]) for a in z])


def autograd(function, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def finite_differences(function, x, h=1e-5):
    out = torch.zeros_like(x)
    for i in itertools.product(*map(range, x.shape)):
        d = torch.zeros_like(x)
        d[i] = h
        out[i] = (function(x + d) - function(x - d))/(2*h)
    return out


def problem(n, m, k, d=3, seed=0):
    z, y, alpha = normal(n, d, seed=seed), normal(k, d, seed=seed+1), simplex(m, k, seed=seed)
    return z, y, alpha, ids(n, m, seed=seed), noise(k, seed=seed)


# ---------------------------------------------------------------- Eqs. (19), (20), (21)
def eq20(s, alpha, k):
    total = 0.
    for i in range(len(s)):
        denominator = torch.exp(alpha[k][i]*s[i])
        for l in range(len(alpha)):
            if l == k: continue
            energy = alpha[l][i]*s[i]
            for j in range(len(s)):
                if j != i: energy = energy + (alpha[l][j] - alpha[k][j])*s[j]
            denominator = denominator + torch.exp(energy)
        total = total - alpha[k][i]*torch.log(torch.exp(s[i])/denominator)
    return total


def eq21(s, alpha, k):
    total = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.product(range(len(s)), repeat=2):
        if j != i: total = total + alpha[k][i]*alpha[k][j]*s[j]
    return total


@pytest.mark.parametrize('m, k', [(1, 3), (2, 2), (3, 3), (5, 4), (4, 7), (3, 1)])
@pytest.mark.parametrize('scale', [.1, 1., 20.])
def test_attraction_and_repulsion_add_up_to_the_loss(m, k, scale):
    alpha, s = simplex(m, k, seed=m), scale*normal(k, seed=k)
    for positive in range(m):
        first, second = attraction_repulsion(s, alpha, positive)
        assert first.shape == second.shape == ()
        same(first, eq20(s, alpha, positive))
        same(second, eq21(s, alpha, positive))
        same(first + second, loss(s, alpha, positive))


def test_attraction_and_repulsion_by_hand():
    "Two classes, two mirrored candidates (3/4, 1/4), scores (log 16, 0): u = (log 8, log 2)."
    alpha, s = torch.tensor([[.75, .25], [.25, .75]]).double(), torch.tensor([math.log(16), 0.], dtype=torch.float64)
    first, second = attraction_repulsion(s, alpha, 0)
    same(second, torch.tensor(3/16*math.log(16), dtype=torch.float64))
    same(first + second, torch.tensor(math.log(10/8), dtype=torch.float64))
    first, second = attraction_repulsion(s, alpha, 1)
    same(first + second, torch.tensor(math.log(10/2), dtype=torch.float64))


def test_hard_targets_have_no_penalty():
    "alpha (1 - alpha) = 0 at a corner: Eq. (20) is the whole loss, Eq. (5)."
    s, labels = normal(4), torch.tensor([2, 0, 2, 3])
    for k in range(4):
        first, second = attraction_repulsion(s, labels, k)
        same(second, torch.tensor(0., dtype=torch.float64))
        same(first, -torch.log(torch.exp(s[labels[k]])/sum(torch.exp(s[y]) for y in labels)))


def test_large_scores_do_not_overflow():
    s, alpha = torch.tensor([900., -900., 0.]).double(), simplex(3, 3)
    first, second = attraction_repulsion(s, alpha, 1)
    u = alpha @ s
    same(first + second, u.max() - u[1] + torch.log(torch.exp(u - u.max()).sum()))


@pytest.mark.parametrize('slip', ['positive', 'tilde', 'penalty'])
def test_each_slip_of_the_printed_pair_breaks_it(slip):
    """exp(alpha_ki s(y_k)) for y_i; alpha_lj - alpha_ki for alpha_kj; sum_{l != k} alpha_ki alpha_li s_l for
    sum_{j != i} alpha_ki alpha_kj s_j."""
    n, gaps = 4, []
    for seed in range(5):
        alpha, s, k = simplex(n, n, seed=seed), normal(n, seed=seed), seed % n
        total = 0.
        for i in range(n):
            denominator = torch.exp(alpha[k][i]*s[k if slip == 'positive' else i])
            for l in range(n):
                if l == k: continue
                tilde = [alpha[l][j] - alpha[k][i if slip == 'tilde' else j] for j in range(n)]
                denominator = denominator + torch.exp(alpha[l][i]*s[i] + sum(tilde[j]*s[j] for j in range(n) if j != i))
            total = total - alpha[k][i]*torch.log(torch.exp(s[i])/denominator)
            for j in range(n):
                if slip == 'penalty': total = total + (alpha[k][i]*alpha[j][i]*s[j] if j != k else 0.)
                else: total = total + (alpha[k][i]*alpha[k][j]*s[j] if j != i else 0.)
        gaps.append(float(abs(total - sum(attraction_repulsion(s, alpha, k)))))
    assert min(gaps) > 1e-3


@pytest.mark.parametrize('k', [2, 3, 4, 10, 100])
def test_the_penalty_never_spares_the_true_class(k):
    "d Eq. (21)/ds under smoothing: equal for two classes, larger for the true one from three on, at every epsilon."
    s = normal(k)
    for eps in (.01, .2, .49, .51, .8, .99):
        own = torch.full((k,), eps/k, dtype=torch.float64)
        own[0] += 1 - eps
        weight = autograd(lambda s, own=own: attraction_repulsion(s, own[None], 0)[1], s)
        same(weight[0] - weight[1], torch.tensor((1 - eps)*eps*(k - 2)/k, dtype=torch.float64))
        assert k == 2 or weight[0] > weight[1]


# ---------------------------------------------------------------- with respect to energies, scores, logits
@pytest.mark.parametrize('n, m, k', SHAPES)
def test_candidate_and_score_gradient(n, m, k):
    s, (_, _, alpha, positives, _) = normal(n, k), problem(n, m, k)
    got = score_gradient(s, alpha, positives)
    for i in range(n): same(got[i], autograd(lambda s, i=i: loss(s, alpha, int(positives[i])), s[i]))
    energies = torch.stack([torch.stack([dot(a, row) for a in alpha]) for row in s])
    def of_energies(u):
        return sum(torch.log(sum(torch.exp(x) for x in row)) - row[int(p)] for row, p in zip(u, positives))
    same(candidate_gradient(s, alpha, positives), autograd(of_energies, energies))
    same(got.sum(1), torch.zeros(n, dtype=torch.float64))


@pytest.mark.parametrize('n, m, k', SHAPES)
@pytest.mark.parametrize('tau', [.3, 1., 4.])
def test_logit_gradient(n, m, k, tau):
    logits, (_, _, alpha, positives, eta) = normal(n, k), problem(n, m, k)
    got = logit_gradient(logits, alpha, positives, noise_probs=eta, temperature=tau)
    f = lambda l: mean_loss_of_logits(l, alpha, positives, eta, tau)
    same(got, autograd(f, logits))
    torch.testing.assert_close(got, finite_differences(f, logits), rtol=1e-6, atol=1e-7)


def test_logit_gradient_is_torch_cross_entropy_where_the_candidates_are_the_classes():
    logits, labels = normal(5, 4), ids(5, 4)
    f = lambda l: torch.nn.functional.cross_entropy(l/.7, labels)
    same(logit_gradient(logits, torch.arange(4), labels, temperature=.7), autograd(f, logits))


# ---------------------------------------------------------------- embeddings: Eqs. (22)-(25)
@pytest.mark.parametrize('n, m, k', SHAPES)
@pytest.mark.parametrize('tau', [.3, 1.])
def test_embedding_gradients_of_inner_products(n, m, k, tau):
    z, y, alpha, positives, eta = problem(n, m, k)
    f = lambda z, y: mean_loss_of_logits(inner(z, y), alpha, positives, eta, tau)
    arguments = {'noise_probs': eta, 'temperature': tau}
    same(embedding_gradient(z, y, alpha, positives, **arguments), autograd(lambda z: f(z, y), z))
    same(label_embedding_gradient(z, y, alpha, positives, **arguments), autograd(lambda y: f(z, y), y))


@pytest.mark.parametrize('n, m, k', SHAPES)
def test_embedding_gradients_of_cosines(n, m, k):
    z, y, alpha, positives, eta = problem(n, m, k)
    f = lambda z, y: mean_loss_of_logits(cosine(z, y), alpha, positives, eta, .5)
    z_hat, y_hat = (torch.stack([v/length(v) for v in x]) for x in (z, y))
    arguments = z_hat, y_hat, alpha, positives
    at_z = embedding_gradient(*arguments, noise_probs=eta, temperature=.5)
    at_y = label_embedding_gradient(*arguments, noise_probs=eta, temperature=.5)
    same(normalization_gradient(at_z, z), autograd(lambda z: f(z, y), z))
    same(normalization_gradient(at_y, y), autograd(lambda y: f(z, y), y))
    torch.testing.assert_close(normalization_gradient(at_y, y), finite_differences(lambda y: f(z, y), y),
                               rtol=1e-6, atol=1e-7)


def test_normalization_gradient_is_the_jacobian_and_orthogonal():
    z, g = normal(4, 3), normal(4, 3, seed=1)
    got = normalization_gradient(g, z)
    for i in range(4):
        jacobian = (torch.eye(3).double() - torch.outer(z[i], z[i])/dot(z[i], z[i]))/length(z[i])
        same(got[i], jacobian @ g[i])
        same(dot(got[i], z[i]), torch.tensor(0., dtype=torch.float64))
    same(normalization_gradient(z, z), torch.zeros(4, 3).double())  # aligned: nothing is left


def literal_pieces(seed=0, n=3):
    z, y, alpha = normal(5, seed=seed), normal(n, 5, seed=seed+1), simplex(n, n, seed=seed)
    z, y = z/length(z), torch.stack([v/length(v) for v in y])
    s = [dot(z, v) for v in y]
    e = [torch.exp(dot(a, s)) for a in alpha]
    return z, y, alpha, e, [x/sum(e) for x in e]


def test_eq22_and_eq23_as_sums_and_their_slips():
    z, y, alpha, _, C = literal_pieces()
    truth, k, n = autograd(lambda v: loss([dot(v, w) for w in y], alpha, 1), z), 1, 3
    eq22 = -(sum(alpha[k][i]*y[i] for i in range(n))
             - sum(C[l]*sum(alpha[l][j]*y[j] for j in range(n)) for l in range(n)))
    eq23 = lambda repel: sum(-alpha[k][i]*y[i] + repel(i) for i in range(n))
    expected = lambda j: sum(C[l]*alpha[l][j]*y[j] for l in range(n))
    same(embedding_gradient(z[None], y, alpha, k)[0], truth)
    same(eq22, truth)
    same(eq23(expected), truth)
    for j in range(n): assert (eq23(lambda i, j=j: expected(j)) - truth).norm() > .05
    assert (eq23(lambda i: sum(expected(j) for j in range(n))) - truth).norm() > .05


def test_eq22_needs_label_embeddings_of_length_one():
    z, y, alpha, _, C = literal_pieces()
    long = y*torch.tensor([[.5], [1.], [3.]])
    truth = autograd(lambda v: mean_loss(cosine(v[None], long), alpha, [0]), z)
    printed = -sum((alpha[0][i] - sum(C[l]*alpha[l][i] for l in range(3)))*long[i] for i in range(3))
    printed = normalization_gradient(printed[None], z[None])[0]
    assert (printed - truth).norm() > .1*truth.norm()
    same(normalization_gradient(embedding_gradient(z[None], y, alpha, 0), z[None])[0], truth)


def test_eq25_is_the_length_and_its_printed_denominator_is_not():
    z, y, alpha, e, _ = literal_pieces()
    k, n = 2, 3
    lengths = label_embedding_gradient(z[None], y, alpha, k).norm(dim=1)
    for j in range(n):
        above, below = sum(alpha[l][j]*e[l] for l in range(n)), sum(alpha[k][j]*e[l] for l in range(n))
        same(lengths[j], alpha[k][j]*abs(-1 + above/below))
    printed = torch.tensor([[float(alpha[k][j]*abs(-1 + above_j/(n*alpha[k][j]*e[l]))) for j in range(n)
                             for above_j in [sum(alpha[m][j]*e[m] for m in range(n))]]
                            for l in range(n)], dtype=torch.float64)
    assert (printed - lengths).abs().amax(1).min() > .01


@pytest.mark.parametrize('eps', [0., .1, .49, .51, .9, 1.])
def test_a_class_absent_from_the_tuple_has_no_gradient(eps):
    alpha = torch.full((3, 5), eps/5, dtype=torch.float64)
    for row, label in zip(alpha, (3, 1, 1)): row[label] += 1 - eps
    z, y = normal(1, 4), normal(5, 4, seed=1)
    got = label_embedding_gradient(z, y, alpha, 0)
    same(got[[0, 2, 4]], torch.zeros(3, 4, dtype=torch.float64))
    moved = got[[1, 3]].norm(dim=1)
    assert (moved > 1e-3).all() if eps < 1 else (moved < 1e-12).all()
    absent_in_all = label_embedding_gradient(z, y, alpha[[1, 2]], 0)
    same(absent_in_all, torch.zeros(5, 4, dtype=torch.float64))


@pytest.mark.parametrize('eps', [.1, .4, .6, .9])
def test_the_side_of_one_follows_the_class_not_epsilon(eps):
    alpha = torch.full((2, 3), eps/3, dtype=torch.float64)
    alpha[0, 0] += 1 - eps
    alpha[1, 1] += 1 - eps
    g = score_gradient(normal(1, 3), alpha, 0)[0]
    assert g[0] < -1e-3 and g[1] > 1e-3 and abs(g[2]) < 1e-15


# ---------------------------------------------------------------- hard positives and negatives
def test_coefficients_of_hard_positives_and_negatives():
    "n negatives at score 0 against a positive at score 0: n/(n+1) and 1/(n+1)."
    rows = []
    for n in (1, 2, 4, 8, 64):
        labels = torch.arange(n + 1)
        rows.append(score_gradient(torch.zeros(1, n + 1, dtype=torch.float64), labels, 0)[0, :2].abs())
    n = torch.tensor([1, 2, 4, 8, 64.], dtype=torch.float64)
    same(torch.stack(rows), torch.stack([n/(n+1), 1/(n+1)], 1))


@pytest.mark.parametrize('turned, angle', [(0, -1.), (0, 1.), (1, 1.), (1, -1.)])
def test_the_projection_takes_the_hardest_too(turned, angle):
    "A positive opposite to z, or a negative along it, adds nothing to the gradient of z."
    z, y = torch.tensor([[2., 0.]]).double(), torch.tensor([[0., 1.], [0., -1.]]).double()
    y[turned] = torch.tensor([angle, 0.])
    weight = score_gradient(z/2 @ y.T, torch.tensor([0, 1]), 0)[0]
    share = normalization_gradient((weight[turned]*y[turned])[None], z)
    assert abs(weight[turned]) > .1
    same(share, torch.zeros(1, 2).double())


# ---------------------------------------------------------------- forms of the arguments
def test_candidates_as_ids_sparse_and_dense_agree():
    s, labels = normal(3, 4), torch.tensor([0, 2, 1, 2])
    hard = torch.nn.functional.one_hot(labels, 4).double()
    sparse = SparseTargets(labels[:, None], torch.ones(4, 1).double(), epsilon=.2, num_classes=4)
    for f in (candidate_gradient, score_gradient, logit_gradient):
        same(f(s, labels), f(s, hard))
        same(f(s, sparse), f(s, .8*hard + .05))
    for a, b in zip(attraction_repulsion(s[0], sparse, 3), attraction_repulsion(s[0], .8*hard + .05, 3), strict=True):
        same(a, b)


def test_positives_default_number_and_tensor_agree():
    s, alpha = normal(3, 4), simplex(5, 4)
    same(score_gradient(s, alpha), score_gradient(s, alpha, torch.tensor([0, 1, 2])))
    same(score_gradient(s, alpha, 4), score_gradient(s, alpha, torch.tensor([4, 4, 4])))
    same(score_gradient(s, alpha, [2, 0, 1]), score_gradient(s, alpha, torch.tensor([2, 0, 1], dtype=torch.int32)))


def test_half_precision_is_computed_in_float32():
    s, alpha = normal(3, 4), simplex(3, 4)
    for f in (score_gradient, logit_gradient):
        assert f(s.bfloat16(), alpha).dtype == torch.float32
        assert f(s, alpha).dtype == torch.float64
    assert attraction_repulsion(s[0].half(), alpha, 0)[0].dtype == torch.float32


# ---------------------------------------------------------------- errors
S, A, Z, Y = normal(3, 4), simplex(3, 4), normal(3, 2), normal(4, 2, seed=1)
CALLS = {'candidate_gradient': lambda s=S, a=A, p=None: candidate_gradient(s, a, p),
         'score_gradient': lambda s=S, a=A, p=None: score_gradient(s, a, p),
         'logit_gradient': lambda s=S, a=A, p=None: logit_gradient(s, a, p),
         'embedding_gradient': lambda s=Z, a=A, p=None: embedding_gradient(s, Y, a, p),
         'label_embedding_gradient': lambda s=Z, a=A, p=None: label_embedding_gradient(s, Y, a, p),
         'attraction_repulsion': lambda s=S[0], a=A, p=0: attraction_repulsion(s, a, p)}
FIRST = {'candidate_gradient': 'scores', 'score_gradient': 'scores', 'logit_gradient': 'logits',
         'embedding_gradient': 'embeddings', 'label_embedding_gradient': 'embeddings', 'attraction_repulsion': 'scores'}


@pytest.mark.parametrize('name', CALLS)
def test_errors_of_scores_candidates_and_positives(name):
    f, positive = CALLS[name], 'positive' if name == 'attraction_repulsion' else 'positives'
    for bad in (torch.zeros(1, 2, 3), [[1., 2.]], torch.zeros(4, dtype=torch.long)):
        with refuses(f'^{FIRST[name]} must'): f(s=bad)
    for bad in (A[:, :3]/A[:, :3].sum(1, keepdim=True), A*2, -A, A*math.nan, torch.tensor([0, 1, 4]), 'a'):
        with refuses('^candidates must'): f(a=bad)
    for bad in (3, -1):
        with refuses(rf'^{positive} must be in \[0, 3\), got values from {bad}'): f(p=bad)
    with refuses(rf'^{positive} must be integers, got dtype torch.float32'): f(p=1.)
    with refuses(rf'^{positive} must be integers, got dtype torch.bool'): f(p=True)
    with refuses(rf'^{positive} must be a number or have shape \(\d,\), got \(2,\)'): f(p=torch.tensor([0, 1]))


@pytest.mark.parametrize('name', ['candidate_gradient', 'score_gradient', 'logit_gradient', 'embedding_gradient',
                                  'label_embedding_gradient'])
def test_in_batch_needs_a_candidate_for_every_row(name):
    with refuses(r'^positives must be in \[0, 2\), got values from 0 to 2'): CALLS[name](a=A[:2])


@pytest.mark.parametrize('f, arguments', [(logit_gradient, (S,)), (embedding_gradient, (Z, Y)),
                                          (label_embedding_gradient, (Z, Y))])
def test_errors_of_temperature_and_noise(f, arguments):
    for tau in (0., -1., math.nan, math.inf):
        with refuses(f'temperature must be positive and finite, got {tau}'): f(*arguments, A, temperature=tau)
    for eta in (torch.tensor([.5, .5, 0., 0.]), torch.full((3,), 1/3), torch.full((4,), .3), torch.full((1, 4), .25)):
        with refuses('^noise_probs must'): f(*arguments, A, noise_probs=eta)


@pytest.mark.parametrize('f', [embedding_gradient, label_embedding_gradient])
def test_errors_of_label_embeddings(f):
    for bad in (Y[:, :1], Y[0], None):
        with refuses(r'^label_embeddings must have shape \(K, 2\) like the embeddings, got'): f(Z, bad, A)


def test_errors_of_the_normalisation():
    with refuses(r'^gradient must have the embeddings. shape \(3, 2\), got \(3, 1\)'):
        normalization_gradient(Z[:, :1], Z)
    with refuses('^embeddings must have shape'): normalization_gradient(Z[0], Z[0])
    zero = Z.clone()
    zero[1] = 0
    with refuses('^embeddings must not be zero, got norm 0 in row 1'): normalization_gradient(Z, zero)


# ---------------------------------------------------------------- the notebook
def test_the_moving_figure_needs_no_kernel():
    "The force field moves on the site by a script of its own: no widget and no state of one is in the notebook."
    text = NOTEBOOK.read_text(encoding='utf-8')
    assert 'widget-view' not in text and 'widget-state' not in text and '@interact' not in text
    assert 'data-moving' in text
