"What section A.1 leaves open, against slow, literal programs: softnce.experiments.gmm_alternatives."
import math

import pytest
import torch
from torch.testing import assert_close

from softnce.experiments.gmm import conditional, toy_data
from softnce.experiments.gmm_alternatives import (GMM_READINGS, GMM_SWEEP_KEY, gmm_measures, gmm_reading,
                                                  gmm_sweep_jobs, gmm_sweep_rows, stopped, stopping_epoch,
                                                  training_paths)
from softnce.experiments.gmm_fit import initial, noise_distribution

SMALL = dict(num_classes=5, num_points=60, num_labels=500, num_valid=100, num_fresh=80)


@pytest.mark.parametrize('optimizer', ['Adam', 'SGD'])
def test_paths_are_the_literal_program(optimizer):
    "Both losses with autograd and torch's optimiser: the N x N softmax for InfoNCE, all classes for NLL."
    data = gmm_reading('as described', 40, **SMALL)
    path, nll = training_paths(data, [('InfoNCE', .01), ('NLL', .01)], 3, optimizer, batch_size=64)
    eta = noise_distribution(data, 'counts')
    for i, loss in enumerate(('InfoNCE', 'NLL')):
        theta, rng = initial(data, 'linear').requires_grad_(), data.rng(1)
        opt = getattr(torch.optim, optimizer)([theta], lr=.01)
        for epoch in range(3):
            for rows in torch.from_numpy(rng.permutation(500)).split(64):
                x, y = data.points[data.index[rows]], data.labels[rows]
                scores, own = x @ theta.T, y
                if loss == 'InfoNCE': scores, own = (scores - eta.log())[:, y], torch.arange(len(y))
                opt.zero_grad()
                torch.nn.functional.cross_entropy(scores, own).backward()
                opt.step()
            assert_close(path[epoch, i].double(), theta.detach(), rtol=0, atol=1e-4)
            log_p = torch.log_softmax(data.points @ theta.detach().T, 1)
            assert nll[epoch, i].item() == pytest.approx(-(data.valid_counts*log_p).sum().item()/100, abs=1e-4)


def test_early_stopping_by_hand():
    nll = torch.tensor([5., 4., 4.5, 4.2, 3., 6., 7., 8., 2.])
    assert [stopping_epoch(nll, p) for p in (1, 2, 3, 100)] == [1, 1, 4, 8]
    path = torch.arange(9.)[:, None, None, None].expand(9, 1, 2, 2)
    rules = stopped(path, nll[:, None])
    assert {k: v[0, 0, 0].item() for k, v in rules.items()} == {
        'patience 5': 8., 'patience 20': 8., 'patience 100': 8., 'last': 8., 'mean of the last 100': 4.}


def test_measures_by_definition():
    data = toy_data(40, 1, **SMALL)
    estimate = data.theta + .3*initial(data, 'linear')
    p, q = (conditional(data.points, t) for t in (data.theta, estimate))
    def mean(f): return sum(f(p[i, k].item(), q[i, k].item()) for i in range(60) for k in range(5))/60
    apart = (estimate - data.theta) - (estimate - data.theta).mean(0)
    literal = dict(kl_train=mean(lambda a, b: a*math.log(a/b)), kl_reverse=mean(lambda a, b: b*math.log(b/a)),
                   variation=mean(lambda a, b: abs(a - b)/2), parameters=apart.norm().item())
    found = gmm_measures(data, estimate)
    assert set(found) == {*literal, 'kl_fresh'} and abs(found['kl_fresh'] - found['kl_train']) > 1e-6
    for name, value in literal.items(): assert found[name].item() == pytest.approx(value, abs=1e-10), name


def test_readings():
    "What each changes of the data, and what it leaves."
    plain = toy_data(40, 2, **SMALL)
    for name in GMM_READINGS:
        data = gmm_reading(name, 40, 2, **SMALL)
        assert_close(data.points[:, :5], plain.points, rtol=0, atol=0)
        assert data.counts.sum() == 500 and data.valid_counts.sum() == 100
    long = gmm_reading('long parameters', 40, 2, **SMALL)
    assert torch.equal(long.theta, 10*plain.theta) and not torch.equal(long.labels, plain.labels)
    one = gmm_reading('one label', 40, 2, **SMALL)
    assert ((one.counts > 0).sum(1) <= 1).all() and ((plain.counts > 0).sum(1) > 1).any()
    bias = gmm_reading('bias', 40, 2, **SMALL)
    assert bias.points.shape == (60, 6) and (bias.points[:, 5] == 1).all() and (bias.theta[:, 5] == 0).all()
    with pytest.raises(ValueError, match='reading must be one of .* got .chain.'): gmm_reading('chain', 40)
    with pytest.raises(ValueError, match='optimizer must be one of .* got .LBFGS.'):
        training_paths(plain, [('NLL', .1)], 1, 'LBFGS')


def test_labels_of_long_parameters_follow_them():
    sizes = dict(num_classes=4, num_points=3, num_labels=60_000, num_valid=1, num_fresh=1)
    data = gmm_reading('long parameters', 80, 0, **sizes)
    assert_close(data.counts/data.counts.sum(1, keepdim=True), conditional(data.points, data.theta), rtol=0, atol=.015)


def test_a_row_for_everything_that_was_asked():
    rows = gmm_sweep_rows('as described', 'SGD', 40, 0, epochs=2, **SMALL)
    keys = {tuple(r[c] for c in GMM_SWEEP_KEY) for r in rows}
    assert len(keys) == len(rows) == 2*2*5
    jobs = gmm_sweep_jobs([0, 80], [3, 4])
    assert len(jobs) == 2*2*(len(GMM_READINGS) + 1) and len({tuple(j.values()) for j in jobs}) == len(jobs)
