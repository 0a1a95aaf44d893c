"Trainings at batches of fewer rows than classes, against literal programs; softnce.experiments.small_batches."
import itertools, math

import pytest
import torch
from torch import nn

from softnce.experiments import BatchSetting, SMALL_SOURCES, cell_rows, shrinkage, train_stack
from softnce.experiments import small_batches as sb

K, N = 4, 3
ETA = torch.tensor([.4, .3, .2, .1], dtype=torch.float64)


def rows(n, seed):
    g = torch.Generator().manual_seed(seed)
    t = torch.rand(n, K, generator=g, dtype=torch.float64)
    return t/t.sum(1, keepdim=True)


def literal(logits, targets, candidates):
    "Mean over rows of -log of the share of the own target among it and the others, term by term."
    total = 0.
    for i in range(len(logits)):
        s = [logits[i, k].item() - math.log(ETA[k]) for k in range(K)]
        def u(t): return math.exp(sum(t[k].item()*s[k] for k in range(K)))
        total -= math.log(u(targets[i])/(u(targets[i]) + sum(u(c) for c in candidates(i))))
    return total/len(logits)


def test_every_source_by_hand():
    logits, own, noise = rows(N, 0)*5, rows(N, 1), rows(7, 2)
    def others(i): return [own[j] for j in range(N) if j != i]
    wanted = dict(in_batch=literal(logits, own, others), queue=literal(logits, own, lambda i: others(i) + [*noise]),
                  fresh=literal(logits, own, lambda i: [*noise]))
    for source, value in wanted.items():
        samples = None if source == 'in_batch' else noise
        assert sb.loss_of(source, logits, own, samples, ETA, .1, [1.]).item() == pytest.approx(value, rel=1e-12)
    draws = torch.stack([rows(2, 3), rows(2, 4)])
    value = sum(literal(logits, own, lambda i: [*d]) for d in draws)/2
    assert sb.loss_of('averaged', logits, own, draws, ETA, .1, [1.]).item() == pytest.approx(value, rel=1e-12)
    entropy = -(own*logits.log_softmax(1)).sum(1).mean()
    assert sb.loss_of('ce', logits, own, None, ETA, .1, [1.]).item() == pytest.approx(entropy.item(), rel=1e-12)


def test_the_closed_form_is_the_mean_over_the_law_of_the_positives():
    "Every pair of labels and every node of lambda, one after the other."
    logits, own, epsilon, lams = rows(N, 5)*5, rows(N, 6), .1, [.6, .9]
    total = 0.
    for i in range(N):
        s, mean = logits[i] - ETA.log(), 0.
        for lam, a, b in itertools.product(lams, range(K), range(K)):
            t = torch.full((K,), epsilon/K, dtype=torch.float64)
            t[a] += (1-epsilon)*lam
            t[b] += (1-epsilon)*(1-lam)
            mean += (ETA[a]*ETA[b]*math.exp(t @ s)/len(lams)).item()
        total += math.log(mean) - (own[i] @ s).item()
    got = sb.loss_of('closed_form', logits, own, None, ETA, epsilon, lams).item()
    assert got == pytest.approx(total/N, rel=1e-12)


def test_noise_has_the_law_of_the_positives():
    "Mean and second moment of a million targets, own and drawn, for the same labels."
    y = torch.arange(400) % K
    stream = sb.Stream(BatchSetting('fresh', 100, 400), y, K, seed=0)
    drawn = torch.cat([stream.noise(t) for t in range(400)])
    for moment in (lambda t: t.mean(0), lambda t: (t.T @ t)/len(t)):
        torch.testing.assert_close(moment(drawn), moment(stream.targets), rtol=0, atol=5e-3)
    beta = torch.distributions.Beta(.8, .8)
    assert abs(stream.lams.var() - beta.variance) < 2e-3
    nodes = torch.tensor(sb.lambda_nodes())
    folded = torch.maximum(stream.lams, 1 - stream.lams)
    assert abs(nodes.mean() - folded.mean()) < 5e-3 and abs((nodes**2).mean() - (folded**2).mean()) < 5e-3


def test_batches_are_alike_for_all_sources_and_noise_is_their_past():
    y = torch.arange(30) % K
    def first(source): return sb.Stream(BatchSetting(source, 5, 12), y, K, seed=3)
    streams = [first(s) for s in SMALL_SOURCES]
    for s in streams[1:]: assert all(torch.equal(a, b) for a, b in zip(s.batch(7), streams[0].batch(7)))
    queue = first('queue')
    assert torch.equal(queue.noise(7), queue.targets[:35]) and len(queue.noise(0)) == 0
    assert all(sorted(queue.first[p:p+30].tolist()) == list(range(30)) for p in (0, 30))  # a pass sees each image once


class Literal(nn.Module):
    def __init__(self, d, theta, norm):
        super().__init__()
        self.first, self.last = nn.Linear(d, 64, bias=not norm), nn.Linear(64, K)
        self.norm = nn.BatchNorm1d(64) if norm else None
        w1, b1, w2, b2, _, _ = theta.split([d*64, 64, 64*K, K, 64, 64])
        with torch.no_grad():
            self.first.weight.copy_(w1.view(d, 64).T)
            if not norm: self.first.bias.copy_(b1)
            self.last.weight.copy_(w2.view(64, K).T), self.last.bias.copy_(b2)
    def forward(self, x):
        h = self.first(x)
        return self.last((self.norm(h) if self.norm else h).relu())


@pytest.mark.parametrize('source, norm', [('ce', False), ('in_batch', False), ('queue', False), ('ce', True)])
def test_a_training_of_the_stack_is_a_training(source, norm):
    "One seed and rate of four, by torch's modules and Adam, step by step."
    g, steps, lr, seed = torch.Generator().manual_seed(0), 25, .02, 1
    x, y, held = torch.rand(40, 6, generator=g), torch.arange(40) % K, torch.rand(9, 6, generator=g)
    setting = BatchSetting(source, 4, steps, norm=norm)
    stack = train_stack(setting, x, y, dict(held=held), [0, seed], [.001, lr])['held']
    assert stack.shape == (4, 9, K)
    theta = sb.StackedMLP(6, K, [seed], 1, norm).theta[0].detach()
    net, stream = Literal(6, theta, norm), sb.Stream(setting, y, K, seed)
    adam, eta = torch.optim.Adam(net.parameters()), torch.full((K,), .25)
    for t in range(steps):
        a, b, lam, target = stream.batch(t)
        noise = stream.noise(t)
        loss = sb.loss_of(source, net(lam[:, None]*x[a] + (1-lam[:, None])*x[b]), target, noise if len(noise) else None,
                          eta, .1, [1.])
        adam.param_groups[0]['lr'] = lr*sb.rate_at(t, steps)
        adam.zero_grad()
        loss.backward()
        adam.step()
    net.eval()
    torch.testing.assert_close(stack[3], net(held).detach(), rtol=1e-3, atol=1e-3)
    assert (stack[3] - stack[2]).abs().max() > 1e-2 and (stack[3] - stack[1]).abs().max() > 1e-2


def test_the_rate_warms_up_and_falls_to_zero():
    found = [sb.rate_at(t, 100) for t in range(100)]
    assert found[9] == 1 and found[0] == .1 and found[-1] < 1e-2 and max(found) == 1
    assert found[:10] == sorted(found[:10]) and found[10:] == sorted(found[10:], reverse=True)


def test_a_choice_at_the_edge_widens_the_grid():
    g = torch.Generator().manual_seed(0)
    def part(n): return torch.eye(6)[torch.arange(n) % K] + .2*torch.rand(n, 6, generator=g), torch.arange(n) % K
    data = dict(train=part(40), valid=part(20), test=part(20))
    found = cell_rows(BatchSetting('ce', 4, 10), data, [1e-5, 3e-5], [0, 1], [9])
    rates = sorted({r['lr'] for r in found if r['split'] == 'valid'})
    assert 9e-5 in rates and len(rates) <= 5
    by_rate = {r['lr']: r['nll_fitted'] for r in found if r['split'] == 'valid'}
    test = [r for r in found if r['split'] == 'test']
    assert {r['lr'] for r in test} == {min(by_rate, key=by_rate.get)} and [r['seed'] for r in test] == [0, 1]
    assert all(0 <= r['top1'] <= 1 and r['rows'] == 20 and r['source'] == 'ce' for r in test)
    assert [sb.neighbour(lr, True) for lr in (.001, .003, .01, .03)] == [.003, .009, .03, .09]
    assert [sb.neighbour(lr, False) for lr in (.001, .003)] == [.0003, .0009]


def test_shrinkage_by_every_batch():
    "Two rows: the mean over the other row's label, exactly; and its first order, from its formula by loops."
    logits, y = rows(8, 7)*4, torch.arange(8) % K
    eta = torch.full((K,), 1/K, dtype=torch.float64)
    left = size = first = 0.
    for i in range(8):
        q, own = logits[i].softmax(0), torch.eye(K, dtype=torch.float64)[y[i]]
        g, mean = q - own, torch.zeros(K, dtype=torch.float64)
        for k in range(K):  # the other row's label
            e = (logits[i] - eta.log()).exp()
            p = e*(own + torch.eye(K, dtype=torch.float64)[k])
            mean += eta[k]*(p/p.sum() - own)
        left, size = left + (mean @ g).item(), size + (g @ g).item()
        first += (g @ (q.diag() - q[:, None]*q) @ (g/eta)).item()
    measured, predicted = shrinkage(logits, y, 2, draws=4000)
    assert measured == pytest.approx(left/size, abs=5e-3) and predicted == pytest.approx(1 - first/size/2, rel=1e-9)


@pytest.mark.parametrize('bad, says', [(dict(source='all'), 'source must be one of ce, in_batch'),
                                       (dict(targets='votes'), "targets must be 'mixed' or 'labels', got 'votes'"),
                                       (dict(batch_size=0), 'batch_size must be at least 1, got 0'),
                                       (dict(batch_size=1, norm=True), 'batch_size must be at least 2, got 1'),
                                       (dict(steps=0), 'steps must be at least 1, got 0')])
def test_settings_that_cannot_be_meant(bad, says):
    with pytest.raises(ValueError, match=says): BatchSetting(**dict(source='ce', batch_size=4, steps=9) | bad)
