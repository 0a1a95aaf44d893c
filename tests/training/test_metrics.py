"softnce.training.metrics: equal to the one-shot scores for any split into batches and ranks; floors of votes."
import copy, pickle

import pytest
import torch

pytest.importorskip('torchmetrics')
from softnce import calibration as c
from softnce.targets import SparseTargets
from softnce.training.metrics import (BrierScore, ClasswiseCalibrationError, EntropyCorrelation, ExpectedAccuracy,
                                      ExpectedCalibrationError, KLDivergence, NegativeLogLikelihood, TotalVariation,
                                      distribution_floors, distribution_metrics, distribution_scores)

N, K = 23, 4
ONE_SHOT = dict(cross_entropy=c.negative_log_likelihood, kl=c.kl_divergence, soft_brier=c.brier_score,
                total_variation=c.total_variation, expected_accuracy=c.expected_accuracy,
                soft_ece=c.expected_calibration_error, classwise_ece=c.classwise_calibration_error,
                entropy_correlation=c.entropy_correlation)
SUMMED = 'classwise_ece',  # a sum of sums: equal but for rounding; the others to the last bit


def rows(seed=0, n=N):
    g = torch.Generator().manual_seed(seed)
    probs, votes = (torch.randn(n, K, generator=g).mul(2).softmax(1) for _ in range(2))
    return probs, (votes*5).round().add(1).div((votes*5).round().add(1).sum(1, keepdim=True))


def same(found, probs, labels, names=ONE_SHOT):
    assert set(found) == set(names)
    for name in names:
        want = ONE_SHOT[name](probs, labels)
        assert found[name] == (pytest.approx(want, rel=1e-13) if name in SUMMED else want), name


@pytest.mark.parametrize('cuts', [[], [10], [1, 2, 3], [5, 22], list(range(1, N))])
@pytest.mark.parametrize('form', ['dense', 'sparse'])
def test_any_split_is_the_one_shot_score(cuts, form):
    probs, votes = rows()
    metrics = distribution_metrics(K)
    for a, b in zip([0, *cuts], [*cuts, N]):
        q = votes[a:b] if form == 'dense' else SparseTargets.from_counts(votes[a:b])
        metrics.update(probs[a:b], q)
    same({k: v.item() for k, v in metrics.compute().items()}, probs, votes)
    same(distribution_scores(probs, votes), probs, votes)
    metrics.reset(); metrics.update(*(t[:9] for t in (probs, votes)))
    same({k: v.item() for k, v in metrics.compute().items()}, probs[:9], votes[:9])


def test_class_ids():
    "Of ids each is the score of one-hot rows; they have no entropy."
    probs, y = rows()[0], torch.arange(N) % K
    metrics = dict(cross_entropy=NegativeLogLikelihood(), kl=KLDivergence(), soft_brier=BrierScore(),
                   total_variation=TotalVariation(), expected_accuracy=ExpectedAccuracy(),
                   soft_ece=ExpectedCalibrationError(7), classwise_ece=ClasswiseCalibrationError(K, 7))
    for name, metric in metrics.items():
        for p, t in zip(probs.split(6), y.split(6)): metric.update(p, t)
        more = (7,) if name.endswith('ece') else ()
        assert metric.compute().item() == pytest.approx(ONE_SHOT[name](probs, y, *more), rel=1e-13)
    with pytest.raises(ValueError, match='class ids have no entropy'): EntropyCorrelation().update(probs, y)


def test_batches_that_look_alike_do_not_tie_two_metrics():
    "One-hot labels make cross-entropy and KL equal; the next batch does not."
    probs, votes = rows()
    one_hot = torch.nn.functional.one_hot(votes.argmax(1), K).float()
    metrics = distribution_metrics(K)
    metrics.update(probs, one_hot); metrics.update(probs, votes)
    same({k: v.item() for k, v in metrics.compute().items()}, torch.cat([probs]*2), torch.cat([one_hot, votes]))


def test_copies_and_pickles_go_on():
    probs, votes = rows()
    metric = ExpectedCalibrationError()
    metric.update(probs[:8], votes[:8])
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        other.update(probs[8:], votes[8:])
        assert other.compute().item() == c.expected_calibration_error(probs, votes)
    assert metric.compute().item() == c.expected_calibration_error(probs[:8], votes[:8])


def test_errors():
    probs, votes = rows()
    with pytest.raises(ValueError, match='probs must have 3 classes, num_classes of the metric, got 4'):
        ClasswiseCalibrationError(3).update(probs, votes)
    with pytest.raises(ValueError, match='rows of labels must sum to 1'): BrierScore().update(probs, 5*votes)
    with pytest.raises(ValueError, match='num_bins must be at least 1'):
        m = ExpectedCalibrationError(0); m.update(probs, votes); m.compute()
    with pytest.raises(ValueError, match='num_votes must be a whole number'): distribution_floors(probs, 0)


# ---- ranks

def of_rank(rank, cuts):
    "The scores of all rows, on a rank that holds some of them, in batches of four."
    probs, votes = rows()
    own = slice(cuts[rank], cuts[rank+1])
    metrics = distribution_metrics(K)
    for p, q in zip(probs[own].split(4), votes[own].split(4)):
        if len(p): metrics.update(p, q)
    own_only = distribution_scores(probs[own], votes[own]) if cuts[rank] < cuts[rank+1] else None
    return {k: v.item() for k, v in metrics.compute().items()}, own_only


@pytest.mark.parametrize('cuts', [(0, 12, N), (0, 3, N), (0, N, N)])  # the last: a rank without rows
@pytest.mark.filterwarnings('ignore:The ``compute`` method')
def test_two_ranks_are_the_one_shot_score(pool, cuts):
    probs, votes = rows()
    for rank, (found, own) in enumerate(pool.run(2, of_rank, cuts)):
        same(found, probs, votes)
        part = slice(cuts[rank], cuts[rank+1])
        if own: same(own, probs[part], votes[part])  # rows that all ranks hold are not gathered


# ---- floors

def test_floors_are_what_the_truth_scores():
    "Votes drawn from the probabilities: the mean scores of the probabilities themselves, over many sets of votes."
    probs, g = rows(n=40)[0].double(), torch.Generator().manual_seed(1)
    V = torch.arange(40) % 4 + 2
    draws = []
    for _ in range(400):
        counts = torch.stack([torch.bincount(torch.multinomial(p, int(v), True, generator=g), minlength=K)
                              for p, v in zip(probs, V)])
        draws.append(distribution_scores(probs, counts/V[:, None]))
    for name, floor in distribution_floors(probs, V, draws=400, generator=g).items():
        values = torch.tensor([d[name.removesuffix('_floor')] for d in draws])
        assert floor == pytest.approx(values.mean().item(), abs=5*values.std().item()/400**.5 + 1e-4), name
