"The toy experiment against slow, literal programs: softnce.experiments.gmm, gmm_fit and gmm_study."
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from softnce.experiments.gmm import (CONSTRUCTIONS, angles, conditional, efficient_floor, kl_error, modes, newton,
                                     toy_data)
from softnce.experiments.gmm_fit import (NOISES, Fleet, Setting, drawn_weights, fit_gmm, initial, noise_counts,
                                         noise_distribution, noise_table, weighted_grad, weighted_loss,
                                         weighted_softmax)
from softnce.experiments.gmm_study import GMM_KEY, converged_estimate, row_key, run_job, run_jobs, settings_grid

SMALL = dict(num_classes=5, num_points=60, num_labels=500, num_valid=100, num_fresh=80)
EXACT = dict(rtol=0, atol=1e-12)


@pytest.fixture(autouse=True)
def double():
    "float64 by default here; threads as found, since a job sets its own."
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


@pytest.fixture
def data(): return toy_data(70, 1, 'fixed', **SMALL)


def literal_loss(scores, labels, noise_lists):
    "Mean over rows of -s_y + log of the sum over the listed candidates, one candidate at a time."
    total = 0.
    for i, noise in enumerate(noise_lists):
        candidates = torch.stack([scores[i, c] for c in (labels[i].item(), *noise)])
        total = total + candidates.exp().sum().log() - scores[i, labels[i]]
    return total/len(labels)


# --- modes

def spherical_point(phis):
    "The point of the unit sphere with these angles, by the textbook recursion."
    out, rest = [], 1.
    for phi in phis:
        out.append(rest*math.cos(phi))
        rest *= math.sin(phi)
    return [*out, rest]

@pytest.mark.parametrize('alignment', [0, 10, 55.5, 80])
def test_chain_is_spherical_coordinates(alignment):
    phi = math.pi/(2*(100/(100 - alignment)))
    rows = [spherical_point([phi]*i + [0.]*(5 - i)) for i in range(6)]
    assert_close(modes(alignment, 6), torch.tensor(rows), **EXACT)

@pytest.mark.parametrize('construction', CONSTRUCTIONS)
@pytest.mark.parametrize('alignment', [0, 30, 80])
def test_pairwise_angles(construction, alignment):
    theta, phi = modes(alignment, 7, 9, construction), math.radians(90*(1 - alignment/100))
    for i in range(7):
        for j in range(i + 1, 7):
            cos = {'spherical': 1 - math.sin(phi)**(2*i)*(1 - math.cos(phi)), 'pairs': math.cos(phi),
                   'fixed': math.cos(phi) if i == 0 else math.cos(phi)**2}[construction]
            assert math.cos(math.radians(angles(theta)[i, j])) == pytest.approx(cos, abs=1e-12)
    assert_close(theta.norm(dim=1), torch.ones(7), **EXACT)

def test_orthogonal_at_zero_and_18_degrees_at_80():
    for c in CONSTRUCTIONS:
        assert_close(modes(0, construction=c) @ modes(0, construction=c).T, torch.eye(20), **EXACT)
        assert_close(angles(modes(80, construction=c))[0, 1:], torch.full((19,), 18.), rtol=0, atol=1e-10)

def test_small_angles_are_accurate():
    v = torch.tensor([[1., 0.], [math.cos(1e-9), math.sin(1e-9)]])
    assert angles(v)[0, 1].item() == pytest.approx(math.degrees(1e-9), rel=1e-6)

@pytest.mark.parametrize('call, message', [
    (dict(alignment=100), r'alignment must be in \[0, 100\), got 100'),
    (dict(alignment=-1), 'alignment must be in'),
    (dict(alignment=0, construction='chain'), "construction must be one of .* got 'chain'"),
    (dict(alignment=0, num_classes=5, dim=4), r'num_classes must be in \[2, dim=4\], got 5'),
    (dict(alignment=0, num_classes=1), 'num_classes must be in'),
])
def test_mode_errors(call, message):
    with pytest.raises(ValueError, match=message): modes(**call)


# --- model, error, data

def test_equation_6_by_hand():
    theta, x = torch.tensor([[1., 2.], [0., -1.], [.5, 0.]]), torch.tensor([[.3, -.2]])
    e = [math.exp(.3*a - .2*b) for a, b in theta.tolist()]
    assert_close(conditional(x, theta), torch.tensor([[v/sum(e) for v in e]]), **EXACT)

def test_kl_by_definition(data):
    other = data.theta + .3*initial(data, 'linear')
    p, q = conditional(data.fresh, data.theta), conditional(data.fresh, other)
    literal = sum(p[i, k].item()*math.log(p[i, k].item()/q[i, k].item()) for i in range(80) for k in range(5))/80
    assert kl_error(data.fresh, data.theta, other).item() == pytest.approx(literal, abs=1e-12)
    errors = kl_error(data.fresh, data.theta, torch.stack([data.theta, data.theta + 3., other]))
    assert_close(errors, torch.tensor([0., 0., literal]), **EXACT)

def test_data_are_seeded_and_sized(data):
    again, other = toy_data(70, 1, 'fixed', **SMALL), toy_data(70, 2, 'fixed', **SMALL)
    assert torch.equal(data.points, again.points) and torch.equal(data.labels, again.labels)
    assert not torch.equal(data.points, other.points)
    assert data.counts.sum() == 500 and data.valid_counts.sum() == 100 and data.points.shape == (60, 5)
    table = torch.zeros(60, 5)
    for i, k in zip(data.index.tolist(), data.labels.tolist()): table[i, k] += 1
    assert torch.equal(table, data.counts)

def test_labels_follow_the_model():
    data = toy_data(60, 0, num_classes=4, num_points=3, num_labels=60_000, num_valid=1, num_fresh=1)
    assert_close(data.counts/data.counts.sum(1, keepdim=True), conditional(data.points, data.theta), rtol=0, atol=.015)
    assert_close(data.counts.sum(1)/60_000, torch.full((3,), 1/3), rtol=0, atol=.01)

def test_points_are_around_the_modes():
    data = toy_data(0, 0, num_classes=3, num_points=30_000, num_labels=1, num_valid=1, num_fresh=1)
    own = (data.points[:, None] - 10*data.theta).norm(dim=2).argmin(1)
    for k in range(3):
        near = data.points[own == k] - 10*data.theta[k]
        assert len(near)/30_000 == pytest.approx(1/3, abs=.015)
        assert_close(near.T.cov(), torch.eye(3), rtol=0, atol=.06)


# --- one formula for every loss

def test_in_batch_weights_are_the_n_by_n_softmax(data):
    x, y, eta = data.points[data.index[:40]], data.labels[:40], noise_distribution(data, 'counts')
    theta = initial(data, 'linear').requires_grad_()
    s = x @ theta.T - eta.log()
    literal = literal_loss(s, y, [[c.item() for j, c in enumerate(y) if j != i] for i in range(40)])
    w = y.bincount(minlength=5)/eta
    assert_close(weighted_loss(x @ theta.T, y, w) + eta[y].log().mean(), literal, **EXACT)
    assert_close(weighted_grad(x, y, theta.detach(), w), torch.autograd.grad(literal, theta)[0], **EXACT)

@pytest.mark.parametrize('M', [1, 2, 8, 64])
def test_drawn_weights_are_literal_candidates(data, M):
    x, y, eta = data.points[data.index[:30]], data.labels[:30], torch.tensor([.1, .15, .2, .25, .3])
    drawn = np.random.default_rng(M).choice(5, p=eta.numpy(), size=(30, M))
    counts = torch.stack([torch.bincount(torch.from_numpy(r), minlength=5) for r in drawn])
    theta = initial(data, 'linear').requires_grad_()
    literal = literal_loss(x @ theta.T - eta.log(), y, drawn.tolist())
    w = drawn_weights(counts, y, eta)
    assert_close(weighted_loss(x @ theta.T, y, w) + eta[y].log().mean(), literal, **EXACT)
    assert_close(weighted_grad(x, y, theta.detach(), w), torch.autograd.grad(literal, theta)[0], **EXACT)

def test_noise_counts_are_multinomial():
    eta = torch.tensor([.2, .3, .5])
    counts = noise_counts(eta, 8, 40_000, np.random.default_rng(0))
    assert (counts.sum(1) == 8).all()
    assert_close(counts.mean(0), 8*eta, rtol=0, atol=.05)
    assert_close(counts.T.cov(), 8*(eta.diag() - eta[:, None]*eta), rtol=0, atol=.06)

def test_noise_probs(data):
    assert_close(noise_distribution(data, 'counts'), torch.bincount(data.labels, minlength=5)/500, **EXACT)
    by_point = [conditional(x[None], data.theta)[0] for x in data.points]
    assert_close(noise_distribution(data, 'marginal'), sum(by_point)/60, **EXACT)
    assert_close(noise_distribution(data, 'uniform'), torch.full((5,), .2), **EXACT)


# --- the trainer

def literal_training(data, setting, epochs, batch_size, decay):
    "One setting with autograd, torch.optim.Adam and every candidate spelt out."
    theta = initial(data, 'linear').requires_grad_()
    kind, lr = setting.schedule.split()
    optimizer, rng = torch.optim.Adam([theta], lr=float(lr)), data.rng(1)
    eta = noise_distribution(data, setting.noise) if setting.noise else torch.ones(5)
    table = (noise_table(data, setting).T*eta).round().long() if setting.drawn else None
    for epoch in range(epochs):
        if kind == 'cosine': optimizer.param_groups[0]['lr'] = float(lr)*(1 + math.cos(math.pi*epoch/decay))/2
        place = 0
        for rows in torch.from_numpy(rng.permutation(len(data.labels))).split(batch_size):
            y = data.labels[rows]
            s = data.points[data.index[rows]] @ theta.T - eta.log()
            if setting.loss == 'NLL': loss = torch.nn.functional.cross_entropy(s, y)
            elif setting.drawn:
                mine = table[place:place + len(rows)]
                loss = literal_loss(s, y, [torch.arange(5).repeat_interleave(m).tolist() for m in mine])
            else: loss = torch.nn.functional.cross_entropy(s[:, y], torch.arange(len(y)))
            place += len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return theta.detach()

def test_every_setting_is_its_literal_program(data):
    settings = [Setting(), *settings_grid(candidates=['in-batch'], schedules=['constant 0.01'])[1:],
                Setting('InfoNCE', 'uniform', '8', 'cosine 0.01'), Setting('InfoNCE', 'marginal', '2'),
                Setting('NLL', '', '', 'cosine 0.01')]
    fits = fit_gmm(data, settings, epochs=2, decay=3, batch_size=128, dtype=torch.float64)
    for s, last in zip(settings, fits['last']):
        assert_close(last, literal_training(data, s, 2, 128, 2), msg=lambda m, s=s: f'{s}: {m}', **EXACT)

def test_residual_at_full_size_against_the_definition():
    data, settings = toy_data(70, 2), settings_grid(schedules=['constant 0.01'])
    fleet = Fleet(data, settings, batch_size=64, dtype=torch.float64)
    x, y = data.points[data.index[64:128]], data.labels[64:128]
    counts = torch.bincount(y, minlength=20).double()
    got = weighted_softmax(fleet.adam.theta, fleet.weights, x, y, counts, slice(64, 128), fleet.buffer)
    for s, p in zip(fleet.settings, got.view(len(settings), 20, 64)):
        own = torch.nn.functional.one_hot(y, 20)
        if s.loss == 'NLL': w = torch.ones(20)
        elif s.drawn: w = noise_table(data, s).T[64:128] + own/noise_distribution(data, s.noise)
        else: w = torch.bincount(y, minlength=20)/noise_distribution(data, s.noise)
        e = (x @ initial(data, 'linear').T).exp()*w
        assert_close(p.T, e/e.sum(1, keepdim=True), **EXACT)

def test_a_run_does_not_depend_on_its_company(data):
    settings = settings_grid(candidates=['in-batch', '8'])
    together = fit_gmm(data, settings, epochs=60, decay=25, patience=2, batch_size=32, dtype=torch.float64)
    assert len(set(together['epochs'].tolist())) > 3       # they did stop at different times
    assert [e for s, e in zip(settings, together['epochs'].tolist()) if s.decays] == [25]*7
    for i in (0, 4, 8, 11, 20):
        alone = fit_gmm(data, [settings[i]], epochs=60, decay=25, patience=2, batch_size=32, dtype=torch.float64)
        assert alone['epochs'][0] == together['epochs'][i] and alone['best_epoch'][0] == together['best_epoch'][i]
        for k in ('theta', 'last'): assert_close(alone[k][0], together[k][i], rtol=0, atol=1e-9)

def test_early_stopping_keeps_the_best(data):
    s, trace = Setting('NLL', '', '', 'constant 0.01'), []
    fits = fit_gmm(data, [s], epochs=400, patience=5, batch_size=64, dtype=torch.float64)
    fleet = Fleet(data, [s], batch_size=64, dtype=torch.float64)
    for epoch in range(fits['epochs'][0]):
        fleet.train_epoch(epoch)
        theta = fleet.adam.theta[0].clone()
        log_p = torch.log_softmax(data.points @ theta.T, 1)
        trace.append((-(data.valid_counts*log_p).sum().item()/100, theta))
    best = min(range(len(trace)), key=lambda i: trace[i][0])
    assert fits['best_epoch'][0] == best + 1 and fits['epochs'][0] == best + 6 < 400
    assert fits['valid_nll'][0].item() == pytest.approx(trace[best][0], abs=1e-12)
    assert_close(fits['theta'][0], trace[best][1], **EXACT)
    assert_close(fits['last'][0], trace[-1][1], **EXACT)

def test_float32_follows_float64(data):
    settings = settings_grid(candidates=['in-batch', '2'], schedules=['constant 0.001'])
    single, double = (fit_gmm(data, settings, epochs=20, patience=20, batch_size=64, dtype=dtype)['last']
                      for dtype in (torch.float32, torch.float64))
    assert single.dtype == torch.float32
    assert_close(single.double(), double, rtol=0, atol=1e-4)

@pytest.mark.parametrize('call, message', [
    (lambda: Setting('MSE'), "loss must be 'NLL' or 'InfoNCE', got 'MSE'"),
    (lambda: Setting('InfoNCE', 'zipf', '8'), "noise must be one of .* got 'zipf'"),
    (lambda: Setting('InfoNCE', 'counts', 'all'), "candidates must be 'in-batch' or a number .* got 'all'"),
    (lambda: Setting(schedule='step 0.1'), "schedule must be .* got 'step 0.1'"),
    (lambda: fit_gmm(None, [Setting(schedule='converged')]), 'settings must be Setting objects with a learning-rate'),
    (lambda: fit_gmm(toy_data(0, **SMALL), [Setting()], init='ones'), "init must be one of .* got 'ones'"),
])
def test_setting_errors(call, message):
    with pytest.raises(ValueError, match=message): call()


# --- the converged estimates

def test_mle_is_a_minimum(data):
    theta, gradient, steps = newton(data.points, data.counts)
    free = theta.clone().requires_grad_()
    rows = torch.nn.functional.cross_entropy(data.points[data.index] @ free.T, data.labels)
    assert torch.autograd.grad(rows, free)[0].abs().max() < 1e-9 and gradient < 1e-9 and 1 < steps < 20
    fits = fit_gmm(data, settings_grid(candidates=['in-batch', '8']), epochs=60, batch_size=64, dtype=torch.float64)
    for t in (*fits['theta'], *fits['last']):
        assert torch.nn.functional.cross_entropy(data.points[data.index] @ t.T, data.labels) > rows

def test_newton_with_row_weights_zeroes_the_literal_gradient(data):
    eta = noise_distribution(data, 'uniform')
    w = drawn_weights(noise_counts(eta, 3, 500, data.rng(7)), data.labels, eta)
    own = torch.nn.functional.one_hot(data.labels, 5).double()
    theta, gradient, _ = newton(data.points[data.index], own, w)
    assert weighted_grad(data.points[data.index], data.labels, theta, w).abs().max() < 1e-9 and gradient < 1e-9

def test_decayed_training_reaches_the_mle():
    data = toy_data(60, 0, 'pairs', num_classes=4, num_points=50, num_labels=4_000, num_valid=200, num_fresh=10)
    mle = newton(data.points, data.counts)[0]
    settings = [Setting('NLL', '', '', 'cosine 0.01'), Setting('InfoNCE', 'counts', 'in-batch', 'cosine 0.01')]
    fits = fit_gmm(data, settings, epochs=150, decay=150, batch_size=100)
    for t in fits['last']: assert kl_error(data.points, mle, t) < 2e-5 < .05*kl_error(data.points, data.theta, mle)

def test_mle_error_is_near_the_floor():
    errors = []
    for seed in range(30):
        data = toy_data(60, seed, 'pairs', num_classes=3, num_points=40, num_labels=3_000, num_valid=1, num_fresh=1)
        errors.append(kl_error(data.points, data.theta, newton(data.points, data.counts)[0]).item())
    assert np.mean(errors) == pytest.approx(efficient_floor(3, 3, 3_000), rel=.3)  # 30 seeds of 6 parameters: sd 0.1
    assert efficient_floor(20, 20, 32_000) == 380/64_000


# --- the ledger

JOB = dict(construction='pairs', alignment=40, seed=0, sizes=SMALL)
FEW = dict(epochs=3, decay=3, batch_size=64)

def test_ledger_resumes():
    settings = [*settings_grid(['counts', 'uniform'], ['in-batch', '2']), Setting(schedule='converged'),
                Setting('InfoNCE', 'counts', '2', 'converged')]
    whole, first, rest = [], [], []
    run_jobs([JOB | dict(settings=settings)], whole.append, **FEW)
    run_jobs([JOB | dict(settings=settings[:4])], first.append, **FEW)
    as_read = [{k: str(v) for k, v in r.items()} for r in first]                       # as csv.DictReader gives them
    run_jobs([JOB | dict(settings=settings)], rest.append, done=as_read, **FEW)
    assert len(whole) == 17 and len(rest) == 13 and len({row_key(r) for r in whole}) == 17
    assert {row_key(r) for r in first + rest} == {row_key(r) for r in whole}
    for a, b in zip(first + rest, whole):
        assert a['loss'] == b['loss'] and a['last_train'] == pytest.approx(b['last_train'], rel=2e-3)
    run_jobs([JOB | dict(settings=settings)], pytest.fail, done=whole, **FEW)          # nothing is left to log

def test_rows_are_what_was_trained():
    settings = [Setting(), Setting('InfoNCE', 'counts', '8', 'cosine 0.01'), Setting(schedule='converged')]
    rows, data = run_job(settings=settings, **JOB, **FEW), toy_data(40, 0, 'pairs', **SMALL)
    fits = fit_gmm(data, settings[:2], **FEW)
    mle = newton(data.points, data.counts)[0]
    for row, s, theta, last in zip(rows, settings, [*fits['theta'], mle], [*fits['last'], mle]):
        assert {k: row[k] for k in asdict(s)} == asdict(s) and list(row)[:8] == GMM_KEY
        assert row['kl_fresh'] == pytest.approx(kl_error(data.fresh, data.theta, theta).item(), rel=1e-3)
        assert row['last_train'] == pytest.approx(kl_error(data.points, data.theta, last).item(), rel=1e-3)
    assert [r['epochs'] for r in rows] == [3, 3, 0]

def test_drawn_converged_uses_the_noise_table():
    "Newton's estimate for noise drawn once is the minimum of the loss with the noise table of the trainer."
    s, data = Setting('InfoNCE', 'marginal', '2', 'converged'), toy_data(40, 0, 'pairs', **SMALL)
    eta, own = noise_distribution(data, 'marginal'), torch.nn.functional.one_hot(data.labels, 5)
    theta, weights = converged_estimate(data, s), noise_table(data, s).T + own/eta
    assert weighted_grad(data.points[data.index], data.labels, theta, weights).abs().max() < 1e-9
    for n in NOISES:
        w = data.labels.bincount(minlength=5)/500/noise_distribution(data, n)
        theta = converged_estimate(data, Setting('InfoNCE', n, 'in-batch', 'converged'))
        assert weighted_grad(data.points[data.index], data.labels, theta, w).abs().max() < 1e-9

@pytest.mark.slow
def test_two_processes_give_the_same_rows():
    "Spawned workers, the way the full ledger is made."
    settings, one, two = [Setting(), Setting('InfoNCE', 'counts', 'in-batch')], [], []
    jobs = [JOB | dict(settings=settings, seed=s) for s in range(3)]
    run_jobs(jobs, one.append, **FEW)
    run_jobs(jobs, two.append, workers=2, **FEW)
    assert sorted(map(str, one)) == sorted(map(str, two))
