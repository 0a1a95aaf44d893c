"softnce.calibration against literal loops, torchmetrics, scipy and answers known by construction."
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from softnce.calibration import (bin_index, brier_score, calibrated_floor, expected_calibration_error, fit_temperature,
                                 reliability)


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


P, Y = torch.full((4, 3), 1/3), torch.tensor([0, 1, 2, 0])
@pytest.mark.parametrize('call,message', [
    (lambda: expected_calibration_error(P[0], Y), r'probs must be \(N, K\) with N > 0, got \(3,\)'),
    (lambda: expected_calibration_error(P[:0], Y[:0]), 'N > 0'),
    (lambda: expected_calibration_error(P, Y[:3]), r'labels must be \(4,\) class ids, got \(3,\)'),
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
