"softnce.calibration against literal loops, torchmetrics, scipy and answers known by construction."
import itertools
import math

import pytest, torch
from hypothesis import given, settings, strategies as st

from softnce.calibration import (bin_index, brier_score, calibrated_floor, classwise_calibration_error,
                                 entropy_correlation, expected_accuracy, expected_calibration_error, fit_temperature,
                                 kl_divergence, negative_log_likelihood, reliability, total_variation, vote_floor)
from softnce.targets import SparseTargets


def random_problem(n, k, seed, scale=2., dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = scale*torch.randn(n, k, generator=g, dtype=dtype)
    return logits, torch.randint(k, (n,), generator=g)


def literal_bins(probs, labels, num_bins):
    "For every bin, the (confidence, right) pairs of its rows: edges belong below, 0 to the first bin."
    bins = [[] for _ in range(num_bins)]
    for p, y in zip(probs.tolist(), labels.tolist()):
        c = max(p)
        b = next(b for b in range(num_bins) if c*num_bins <= b+1)
        bins[b].append((c, p.index(c) == y))
    return bins


@pytest.mark.parametrize('n,k,num_bins', [(1, 2, 15), (7, 3, 1), (200, 10, 15), (333, 4, 7), (50, 100, 15)])
@pytest.mark.parametrize('scale', [.1, 1., 30.])
def test_ece_and_reliability_match_loops(n, k, num_bins, scale):
    logits, labels = random_problem(n, k, n+k, scale)
    probs = logits.softmax(-1)
    r, bins = reliability(probs, labels, num_bins), literal_bins(probs, labels, num_bins)
    assert r.count.tolist() == [len(b) for b in bins]
    mean = lambda v: sum(v)/len(v) if v else math.nan
    for got, want in ((r.confidence, [mean([c for c, _ in b]) for b in bins]),
                      (r.accuracy, [mean([right for _, right in b]) for b in bins])):
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12, equal_nan=True)
    want = sum(len(b)/n*abs(mean([right for _, right in b])-mean([c for c, _ in b])) for b in bins if b)
    assert expected_calibration_error(probs, labels, num_bins) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize('num_bins', [1, 10, 15])
def test_ece_matches_torchmetrics(num_bins):
    MulticlassCalibrationError = pytest.importorskip('torchmetrics.classification').MulticlassCalibrationError
    logits, labels = random_problem(500, 6, 0)
    metric = MulticlassCalibrationError(6, n_bins=num_bins, norm='l1')
    want = metric(logits.softmax(-1), labels)
    assert expected_calibration_error(logits.softmax(-1), labels, num_bins) == pytest.approx(want.item(), abs=1e-6)


def test_bins_at_their_edges():
    edges = torch.arange(11, dtype=torch.float64)/10
    assert bin_index(edges, 10).tolist() == [0, *range(10)]
    assert bin_index(edges[1:-1]+1e-9, 10).tolist() == list(range(1, 10))
    assert bin_index(torch.tensor([0., 1.]), 1).tolist() == [0, 0]
    assert bin_index(torch.tensor([0., 1.]), 15).tolist() == [0, 14]
    assert bin_index(torch.tensor([.5], dtype=torch.float16), 2).tolist() == [0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(1, 40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_confidence_has_a_bin(values, num_bins):
    c = torch.tensor(values, dtype=torch.float64)
    b = bin_index(c, num_bins)
    assert (b >= 0).all() and (b < num_bins).all()
    assert (c*num_bins <= b+1).all() and ((c*num_bins > b) | (b == 0)).all()


def test_perfect_calibration_is_zero():
    "Confidence 0.7 right in 7 of 10, confidence 1 always right."
    probs = torch.tensor([[.7, .3]]*10+[[0., 1.]]*5, dtype=torch.float64)
    labels = torch.tensor([0]*7+[1]*3+[1]*5)
    assert expected_calibration_error(probs, labels) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize('label,ece,brier', [(0, 0, 0), (1, 1, 2)])
def test_certain_predictions(label, ece, brier):
    probs, labels = torch.tensor([[1., 0., 0.]]), torch.tensor([label])
    assert (expected_calibration_error(probs, labels), brier_score(probs, labels)) == (ece, brier)


def test_known_gap():
    "Always 0.9 sure, right in 6 of 10: off by 0.3 whatever the bins."
    probs, labels = torch.tensor([[.9, .1]]*10, dtype=torch.float64), torch.tensor([0]*6+[1]*4)
    for b in (1, 2, 15, 100): assert expected_calibration_error(probs, labels, b) == pytest.approx(.3, abs=1e-12)


def test_ties_take_the_first_class():
    assert reliability(torch.tensor([[.5, .5]]), torch.tensor([0]), 1).accuracy.item() == 1
    assert reliability(torch.tensor([[.5, .5]]), torch.tensor([1]), 1).accuracy.item() == 0


@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_low_precision_probs(dtype, tol):
    logits, labels = random_problem(400, 5, 3)
    probs = logits.softmax(-1)
    assert brier_score(probs.to(dtype), labels) == pytest.approx(brier_score(probs, labels), abs=tol)
    assert 0 <= expected_calibration_error(probs.to(dtype), labels) <= 1


def test_brier_matches_loop():
    logits, labels = random_problem(40, 5, 1)
    p = logits.softmax(-1)
    want = sum((p[i, k].item()-(labels[i].item() == k))**2 for i in range(40) for k in range(5))/40
    assert brier_score(p, labels) == pytest.approx(want, abs=1e-12)


def test_floor_is_the_mean_ece_of_calibrated_labels():
    logits, _ = random_problem(300, 4, 5)
    probs = logits.softmax(-1)
    got = calibrated_floor(probs, draws=200, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    other = torch.tensor([expected_calibration_error(probs, torch.multinomial(probs, 1, generator=g)[:, 0])
                          for _ in range(200)])
    assert abs(got-other.mean()) < 5*other.std()*(2/200)**.5
    assert got == calibrated_floor(probs, draws=200, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('seed,scale', [(0, .3), (1, 3.), (2, 40.)])
def test_temperature_is_the_minimum(seed, scale):
    "Against scipy's bounded minimiser of the NLL, written out."
    optimize = pytest.importorskip('scipy.optimize')
    logits, _ = random_problem(300, 6, seed)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    nll = lambda log_t: torch.nn.functional.cross_entropy(scale*logits/math.exp(log_t), labels).item()
    want = math.exp(optimize.minimize_scalar(nll, bounds=(math.log(.01), math.log(100)), method='bounded',
                                             options=dict(xatol=1e-10)).x)
    assert fit_temperature(scale*logits, labels) == pytest.approx(want, rel=1e-6)


@given(st.integers(0, 10**6), st.floats(.05, 20))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_temperature_scales_with_the_logits(seed, factor):
    logits, _ = random_problem(60, 4, seed)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    a = fit_temperature(logits, labels, bounds=(1e-6, 1e6))
    if 1e-3 < a < 1e3:
        assert fit_temperature(factor*logits, labels, bounds=(1e-6, 1e6)) == pytest.approx(factor*a, rel=1e-9)


def test_temperature_ignores_row_constants_and_dtype():
    logits, labels = random_problem(100, 5, 8, dtype=torch.float32)
    labels[:60] = logits[:60].argmax(-1)
    want = fit_temperature(logits, labels)
    assert fit_temperature(logits.double()+torch.arange(100)[:, None], labels) == pytest.approx(want, rel=1e-9)
    assert fit_temperature(logits.log_softmax(-1), labels) == pytest.approx(want, rel=1e-4)


def test_temperature_of_large_logits_and_one_mistake():
    "All right but one: finite, however large the margins (the bracket is left to Newton and bisection)."
    for size in (1., 30., 90.):
        logits = torch.tensor([[size, 0.]]*9+[[0., size]], dtype=torch.float64)
        # NLL of beta*size at 9 right, 1 wrong is minimal at sigmoid(beta*size) = .9
        assert fit_temperature(logits, torch.zeros(10, dtype=torch.long)) == pytest.approx(size/math.log(9), rel=1e-10)


def test_temperature_at_its_bounds_warns():
    sure, coin = torch.eye(3), torch.tensor([[1., 0.], [0., 1.]])
    with pytest.warns(UserWarning, match='largest logit'): assert fit_temperature(sure, torch.arange(3)) == .01
    with pytest.warns(UserWarning, match='no better than chance'):
        assert fit_temperature(coin, torch.tensor([1, 0])) == 100
    with pytest.warns(UserWarning, match='T = 0.5'): assert fit_temperature(sure, torch.arange(3), bounds=(.5, 2)) == .5
    with pytest.warns(UserWarning, match='no better than chance'):
        assert fit_temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 100


def soft_problem(n, k, seed, zeros=False):
    "Probabilities and label distributions, as nested lists too; with some classes that no vote names."
    g = torch.Generator().manual_seed(seed)
    p, q = ((2*torch.randn(n, k, generator=g, dtype=torch.float64)).softmax(-1) for _ in range(2))
    if zeros: q = torch.where(q == q.amin(-1, keepdim=True), 0., q); q = q/q.sum(-1, keepdim=True)
    return p, q, p.tolist(), q.tolist()


def bin_of(c, num_bins): return next(b for b in range(num_bins) if c*num_bins <= b+1)


def literal_ece(p, q, num_bins):
    bins = [[] for _ in range(num_bins)]
    for row, label in zip(p, q): bins[bin_of(max(row), num_bins)].append((max(row), label[row.index(max(row))]))
    return sum(abs(sum(a for _, a in b) - sum(c for c, _ in b)) for b in bins)/len(p)


def literal_classwise(p, q, num_bins):
    total = 0.
    for k in range(len(p[0])):
        for b in range(num_bins):
            rows = [i for i in range(len(p)) if bin_of(p[i][k], num_bins) == b]
            if rows: total += len(rows)/len(p)*abs(sum(q[i][k] for i in rows) - sum(p[i][k] for i in rows))/len(rows)
    return total/len(p[0])


def mean_of(p, q, f): return sum(f(a, b) for row, label in zip(p, q) for a, b in zip(row, label))/len(p)


def entropy(row): return -sum(a*math.log(a) for a in row if a)


LITERAL = {
    brier_score: lambda p, q: mean_of(p, q, lambda a, b: (a-b)**2),
    negative_log_likelihood: lambda p, q: mean_of(p, q, lambda a, b: -b*math.log(a) if b else 0.),
    kl_divergence: lambda p, q: mean_of(p, q, lambda a, b: b*math.log(b/a) if b else 0.),
    total_variation: lambda p, q: mean_of(p, q, lambda a, b: abs(a-b)/2),
    expected_accuracy: lambda p, q: sum(label[row.index(max(row))] for row, label in zip(p, q))/len(p),
    expected_calibration_error: lambda p, q: literal_ece(p, q, 15),
    classwise_calibration_error: lambda p, q: literal_classwise(p, q, 15),
}


@pytest.mark.parametrize('score', LITERAL, ids=lambda f: f.__name__)
@pytest.mark.parametrize('n, k, zeros', [(1, 2, False), (7, 3, True), (150, 6, False), (40, 20, True)])
def test_scores_against_distributions_match_loops(score, n, k, zeros):
    p, q, p_rows, q_rows = soft_problem(n, k, n+k, zeros)
    assert score(p, q) == pytest.approx(LITERAL[score](p_rows, q_rows), abs=1e-12)


@pytest.mark.parametrize('score', LITERAL, ids=lambda f: f.__name__)
def test_one_hot_rows_are_class_ids(score):
    p, labels = soft_problem(60, 5, 2)[0], torch.arange(60) % 5
    hot = torch.eye(5, dtype=torch.float64)[labels]
    assert score(p, hot) == pytest.approx(score(p, labels), abs=1e-14)
    assert score(p, SparseTargets(labels[:, None], torch.ones(60, 1).double(), num_classes=5)) == score(p, hot)
    assert score(p, hot.float()) == score(p, hot) and score(p, labels.int()) == score(p, labels)


def test_classwise_in_other_bins_and_its_bounds():
    p, q, p_rows, q_rows = soft_problem(80, 4, 3)
    for bins in (1, 2, 7, 100):
        want = literal_classwise(p_rows, q_rows, bins)
        assert classwise_calibration_error(p, q, bins) == pytest.approx(want, abs=1e-12)
    assert classwise_calibration_error(p, p) == 0
    wrong = torch.tensor([[1., 0., 0., 0.]])
    assert classwise_calibration_error(wrong, torch.tensor([1])) == 2/4  # its largest value


def test_scores_of_the_truth_and_of_the_impossible():
    _, q, _, q_rows = soft_problem(30, 4, 5, zeros=True)
    assert (kl_divergence(q, q), total_variation(q, q), brier_score(q, q)) == (0, 0, 0)
    assert negative_log_likelihood(q, q) == pytest.approx(sum(map(entropy, q_rows))/30, abs=1e-12)
    certain = torch.tensor([[1., 0.]])
    assert negative_log_likelihood(certain, torch.tensor([0])) == 0 == kl_divergence(certain, certain)
    for label in (torch.tensor([1]), torch.tensor([[.5, .5]])):
        assert negative_log_likelihood(certain, label) == math.inf == kl_divergence(certain, label)


def test_brier_of_a_vote_costs_what_its_distribution_leaves_open():
    p, q, *_ = soft_problem(1, 3, 6)
    votes = sum(q[0, k].item()*brier_score(p, torch.tensor([k])) for k in range(3))
    assert votes == pytest.approx(brier_score(p, q) + 1 - q.square().sum().item(), abs=1e-14)


def test_entropy_correlation_is_pearsons():
    stats = pytest.importorskip('scipy.stats')
    p, q, p_rows, q_rows = soft_problem(50, 4, 7, zeros=True)
    want = stats.pearsonr([entropy(r) for r in p_rows], [entropy(r) for r in q_rows]).statistic
    assert entropy_correlation(p, q) == pytest.approx(want, abs=1e-12)
    assert entropy_correlation(q, q) == pytest.approx(1, abs=1e-12)
    assert math.isnan(entropy_correlation(p, torch.eye(4)[torch.arange(50) % 4]))  # labels without doubt


def test_class_ids_score_what_they_did_before_distributions_were_taken():
    "Values of the version that took class ids only."
    logits = 2*torch.randn(200, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(8))
    labels[:120] = logits[:120].argmax(-1)
    p, g = logits.softmax(-1), torch.Generator().manual_seed(0)
    got = (expected_calibration_error(p, labels), brier_score(p, labels), fit_temperature(logits, labels),
           calibrated_floor(p, draws=10, generator=g))
    before = 0.21065904377938138, 0.5869468441902058, 1.8277892184070461, 0.0738931448805831
    assert got == pytest.approx(before, rel=1e-14)


@pytest.mark.parametrize('seed', range(3))
def test_temperature_of_distributions_is_the_minimum(seed):
    optimize = pytest.importorskip('scipy.optimize')
    logits, q = random_problem(80, 5, seed)[0], soft_problem(80, 5, seed)[1]
    nll = lambda log_t: negative_log_likelihood((logits/math.exp(log_t)).softmax(-1), (q + logits.softmax(-1))/2)
    want = math.exp(optimize.minimize_scalar(nll, bounds=(-3, 3), method='bounded', options=dict(xatol=1e-10)).x)
    assert fit_temperature(logits, (q + logits.softmax(-1))/2) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize('T', [.05, .7, 1., 3., 40.])
def test_temperature_of_the_models_own_distributions_is_exact(T):
    logits, labels = random_problem(50, 6, 1)
    assert fit_temperature(T*logits, logits.softmax(-1)) == pytest.approx(T, rel=1e-11)
    labels[:30] = logits[:30].argmax(-1)
    one_hot = fit_temperature(T*logits, torch.eye(6)[labels], bounds=(1e-3, 1e5))
    assert one_hot == pytest.approx(fit_temperature(T*logits, labels, bounds=(1e-3, 1e5)), rel=1e-11)


def tables(num_votes, probs):
    "Every outcome of the votes on one row: its probability and the shares."
    for votes in itertools.product(range(len(probs)), repeat=num_votes):
        yield math.prod(probs[v] for v in votes), [votes.count(k)/num_votes for k in range(len(probs))]


@pytest.mark.parametrize('num_votes', [1, 2, 5])
@pytest.mark.parametrize('probs', [[.6, .3, .1], [1., 0., 0.], [.5, .5, 0.], [1/3]*3])
def test_vote_floor_is_the_mean_over_every_outcome(num_votes, probs):
    p, scores = torch.tensor([probs], dtype=torch.float64), (negative_log_likelihood, kl_divergence, brier_score,
                                                             total_variation)
    floor = vote_floor(p, num_votes)
    for score in scores:
        want = sum(w*score(p, torch.tensor([q], dtype=torch.float64)) for w, q in tables(num_votes, probs) if w)
        assert getattr(floor, score.__name__) == pytest.approx(want, abs=1e-12)
    assert floor.brier_score == pytest.approx((1 - sum(x*x for x in probs))/num_votes, abs=1e-12)
    of_shares = lambda q: vote_floor(torch.tensor([q], dtype=torch.float64), num_votes).brier_score
    plugged_in = sum(w*of_shares(q) for w, q in tables(num_votes, probs))
    assert plugged_in == pytest.approx((1 - 1/num_votes)*floor.brier_score, abs=1e-12)


def test_vote_floor_with_votes_that_differ_by_row_and_many_of_them():
    p, *_ = soft_problem(4, 3, 9)
    votes = torch.tensor([1, 7, 2, 30])
    rows = [vote_floor(p[i:i+1], int(v)) for i, v in enumerate(votes)]
    for got, want in zip(vote_floor(p, votes), zip(*rows)): assert got == pytest.approx(sum(want)/4, abs=1e-13)
    assert vote_floor(p, 4000).kl_divergence == pytest.approx(2/8000, rel=.01)  # (K-1)/(2V)
    assert vote_floor(p.float(), 3).kl_divergence == pytest.approx(vote_floor(p, 3).kl_divergence, abs=1e-6)


def test_calibrated_floor_of_votes_that_differ_by_row():
    "As many votes in every row is the number; rows of few votes have the floor of few."
    p = torch.tensor([[.6, .3, .1]]).repeat(30, 1)
    floor = lambda votes, draws=5: calibrated_floor(p, draws=draws, num_votes=votes,
                                                    generator=torch.Generator().manual_seed(0))
    assert floor(4) == pytest.approx(floor(torch.full((30,), 4)), rel=1e-7)
    assert floor(50, 200) < floor(torch.tensor([2, 50]*15), 200) < floor(2, 200)


def test_calibrated_floor_of_votes_is_lower_and_is_the_mean_ece():
    p, *_ = soft_problem(200, 4, 11)
    one, ten = (calibrated_floor(p, draws=50, num_votes=v, generator=torch.Generator().manual_seed(0)) for v in (1, 10))
    assert ten < .6*one
    g = torch.Generator().manual_seed(1)
    drawn = [torch.eye(4)[torch.multinomial(p, 10, replacement=True, generator=g)].mean(1) for _ in range(50)]
    other = torch.tensor([expected_calibration_error(p, q) for q in drawn])
    assert abs(ten - other.mean()) < 5*other.std()*(2/50)**.5


P, Y = torch.full((4, 3), 1/3), torch.tensor([0, 1, 2, 0])
@pytest.mark.parametrize('call,message', [
    (lambda: expected_calibration_error(P[0], Y), r'probs must be \(N, K\) with N > 0, got \(3,\)'),
    (lambda: expected_calibration_error(P[:0], Y[:0]), 'N > 0'),
    (lambda: expected_calibration_error(P, Y[:3]),
     r'labels must be \(4,\) class ids or \(4, 3\) distributions, got \(3,\)'),
    (lambda: expected_calibration_error(P, P[:3]), r'labels must be .* distributions, got \(3, 3\)'),
    (lambda: expected_calibration_error(P, [0, 1, 2, 0]), 'labels must be a tensor, got list'),
    (lambda: brier_score(P, 5*P), 'rows of labels must sum to 1, one is off by 4'),
    (lambda: brier_score(P, torch.ones(4, 3, dtype=torch.long)), 'rows of labels must sum to 1, .*vote_targets'),
    (lambda: kl_divergence(P, -P), 'labels must be finite and not negative'),
    (lambda: total_variation(P, P*torch.nan), 'labels must be finite and not negative'),
    (lambda: fit_temperature(P, 2*P), 'rows of labels must sum to 1'),
    (lambda: entropy_correlation(P, Y), 'class ids have no entropy'),
    (lambda: vote_floor(P, 0), 'num_votes must be a whole number, at least 1'),
    (lambda: vote_floor(P, torch.tensor([1, 2])), r'num_votes must be .*\(4,\) of them'),
    (lambda: vote_floor(P, 1.5), 'num_votes must be a whole number'),
    (lambda: vote_floor(2*P, 1), 'rows of probs must sum to 1'),
    (lambda: calibrated_floor(P, num_votes=0), 'num_votes must be a whole number, at least 1'),
    (lambda: expected_calibration_error(P, Y.float()), 'labels must be integer class ids, got torch.float32'),
    (lambda: expected_calibration_error(P, Y+1), r'labels must lie in \[0, 3\), got 1 to 3'),
    (lambda: expected_calibration_error(P, Y-1), r'labels must lie in \[0, 3\)'),
    (lambda: expected_calibration_error(2*P, Y), 'rows of probs must sum to 1'),
    (lambda: reliability(torch.tensor([[1.5, -.5]]), torch.tensor([0])), 'finite and not negative'),
    (lambda: reliability(P*torch.nan, Y), 'finite and not negative'),
    (lambda: reliability(P, Y, 0), 'num_bins must be at least 1, got 0'),
    (lambda: bin_index(torch.tensor([1.1])), r'confidence must lie in \[0, 1\]'),
    (lambda: bin_index(torch.tensor([torch.nan])), r'confidence must lie in \[0, 1\]'),
    (lambda: brier_score(P, Y[:, None]), 'labels must be'),
    (lambda: fit_temperature(P*torch.inf, Y), 'logits must be finite'),
    (lambda: fit_temperature(P[0], Y), r'logits must be \(N, K\)'),
    (lambda: fit_temperature(P, Y, bounds=(2, 1)), 'bounds must be'),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message): call()
