"""softnce.experiments.bench, bench_forms and bench_measure.

The forms are one function, allocations and times of known calls, failures as rows, and a ledger that resumes.
"""
import csv, time
from pathlib import Path

import oracles
import pytest
import torch

from softnce.experiments import bench
from softnce.experiments.bench import (BENCH_COLUMNS, add_rows, environment, fill_ledger, measure_size, read_rows,
                                       skip_reason)
from softnce.experiments.bench_forms import (PROVIDERS, Problem, Provider, available, count, matmul_form, mixed_targets,
                                             published_form, tf32_products)
from softnce.experiments.bench_measure import MODES, durations, measure, memory, timed_call
from softnce.losses import soft_target_info_nce
from softnce.targets import value_checks

LEDGER = Path(__file__).resolve().parents[2]/'results'/'bench.csv'
TIMERS = 'clock', 'process', 'events', 'graph'
NUMBERS = ['p20_ms', 'p50_ms', 'p80_ms', 'peak_mib', 'held_mib', 'repeats']


# ---- the forms
@pytest.mark.parametrize('n,m,k', [(3, 3, 4), (4, 8, 3), (5, 10, 100), (1, 1, 2)])
def test_published_and_matrix_form_are_the_loss(n, m, k):
    "Value and gradient, in float64, also against the loop over candidates."
    p = Problem(n, m, k, dtype=torch.float64)
    (own, others), log_noise = mixed_targets(p), p.noise_probs.log()
    def published(x): return published_form(x, p.dense_targets, log_noise)
    def product(x): return matmul_form(x, p.dense_targets, log_noise)
    def ours(x): return soft_target_info_nce(x, own, noise_probs=p.noise_probs, noise_samples=others)
    def loop(x):
        energies = [[((x[i] - log_noise)*p.dense_targets[j]).sum() for j in range(m)] for i in range(n)]
        return sum(torch.stack(e).logsumexp(0) - e[i] for i, e in enumerate(energies))/n
    for form in (published, product, ours): oracles.same_value_and_grad(form, loop, p.logits)


@pytest.mark.parametrize('m', [6, 48])
def test_providers_of_one_loss_agree(m):
    p = Problem(6, m, 5, dtype=torch.float64)
    results = {}
    for name in ('published form', 'matmul', 'ours, one lam', 'ours, dense'):
        fn = PROVIDERS[name].build(p)
        results[name] = fn(), timed_call(fn, p.leaves, 'both')()[0]
    for value, grad in results.values():
        torch.testing.assert_close(value, results['matmul'][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, results['matmul'][1], rtol=1e-12, atol=1e-12)


def test_cross_entropies_agree_and_kinds_differ():
    p = Problem(6, 6, 5, dtype=torch.float64)
    pytest.importorskip('timm')
    value = {name: PROVIDERS[name].build(p)() for name in available() if 'compiled' not in name}
    timm, own = value['timm SoftTargetCrossEntropy'], value['cross-entropy, probabilities']
    torch.testing.assert_close(timm, own, rtol=1e-12, atol=1e-12)
    kinds = [value[f'ours, {k}'] for k in ('hard', 'one lam', 'lam per sample', 'closed form')]
    assert len({round(v.item(), 9) for v in kinds}) == 4


def test_targets_are_mixed_as_named():
    p = Problem(4, 12, 7)
    own, others = mixed_targets(p)
    assert len(own) == 4 and len(others) == 8 and own.epsilon == .1
    assert torch.equal(own.weights, torch.tensor([.3, .7]).expand(4, 2))
    assert torch.equal(own.indices, torch.stack([p.ids[:4], p.ids[:4].flip(0)], 1))
    each, _ = mixed_targets(p, per_sample=True)
    assert each.weights[:, 0].unique().numel() == 4 and torch.equal(each.indices, own.indices)
    torch.testing.assert_close(p.dense_targets, torch.cat([own.dense(), others.dense()]))
    assert 0 <= p.ids.min() and p.ids.max() < 7


def test_linear_providers_are_the_losses_of_the_logits():
    p = Problem(6, 6, 9, d=3, dtype=torch.float64)
    logits = p.embeddings @ p.weight.T
    wanted = {'linear, torch': torch.nn.functional.cross_entropy(logits, p.labels),
              'linear, ours, hard': soft_target_info_nce(logits, p.labels),
              'linear, ours, one lam': soft_target_info_nce(logits, mixed_targets(p)[0]),
              'linear, ours, lam per sample': soft_target_info_nce(logits, mixed_targets(p, per_sample=True)[0])}
    for name, value in wanted.items():
        torch.testing.assert_close(PROVIDERS[name].build(p)(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('kind,targets', [('class ids', lambda p: torch.eye(p.K, dtype=p.dtype)[p.labels]),
                                          ('eight classes', None), ('probabilities', lambda p: p.dense_targets)])
def test_linear_cross_entropies_are_those_of_the_logits(kind, targets):
    "Ours and PyTorch's two, in float64, value and gradients, against the sum over classes written out."
    p = Problem(6, 6, 9, d=3, dtype=torch.float64)
    dense = p.sparse_targets.dense() if targets is None else targets(p)
    wanted = -(dense*(p.embeddings @ p.weight.T).log_softmax(1)).sum()/6
    gradients = torch.autograd.grad(wanted, p.leaves)
    names = [n for n in available(linear=True) if n.endswith(kind) and 'cross-entropy' in n or
             kind == 'class ids' and n in ('linear, torch', 'linear, F.linear_cross_entropy')]
    if kind == 'probabilities': names.append('linear, torch, probabilities')
    assert len(names) >= (1 if targets is None else 2)
    for name in names:
        torch.testing.assert_close(PROVIDERS[name].build(p)(), wanted, rtol=1e-12, atol=1e-12)
        found = timed_call(PROVIDERS[name].build(p), p.leaves, 'both')()
        torch.testing.assert_close(found, gradients, rtol=1e-11, atol=1e-11)


def test_peers_of_linear_heads_are_listed_and_left_out_without_a_gpu_or_their_package(monkeypatch):
    peers = {'linear, cut-cross-entropy', 'linear, Liger'}
    assert peers < set(PROVIDERS) and not peers & set(available(linear=True))
    monkeypatch.setattr(PROVIDERS['linear, cut-cross-entropy, compiled'], 'module', 'no_module_of_this_name')
    assert 'linear, cut-cross-entropy, compiled' not in available(linear=True)


def test_providers_that_need_a_gpu_or_a_missing_module_are_left_out(monkeypatch):
    assert not [n for n in available('cpu') if 'tf32' in n or 'Triton' in n]
    assert [n for n in available('cuda') if 'tf32' in n] and [n for n in available('cuda') if 'Triton' in n]
    monkeypatch.setitem(PROVIDERS, 'absent', Provider(None, {}, {}, module='no_module_of_this_name'))
    assert 'absent' not in available('cpu')


# ---- memory and time
def test_memory_of_known_allocations():
    def mib(n=1): return torch.empty(n*2**18)
    def in_turn():
        a = mib(4); del a
        c = mib(2); return mib(1)
    assert memory(in_turn) == dict(peak_mib=4, held_mib=1)
    assert memory(lambda: [mib(3), mib(2)]) == dict(peak_mib=5, held_mib=5)
    kept = mib(8)
    assert memory(lambda: kept.zero_())['peak_mib'] < .001  # in place: nothing beyond what was there


def test_memory_of_forward_and_backward():
    "x*x keeps nothing new; its sum's gradient needs the gradient, and the products that add up to it."
    x = torch.ones(2**20, requires_grad=True)
    fn = lambda: (x*x).sum()
    forward, backward, both = (memory(timed_call(fn, [x], mode)) for mode in MODES)
    assert abs(forward['peak_mib']-4) < .01 and forward['held_mib'] < .01
    assert 8 <= backward['peak_mib'] < 12.1 and backward['held_mib'] == 4 and both['peak_mib'] >= backward['peak_mib']


def test_memory_of_a_sparse_gradient_counts_what_is_stored():
    w = torch.zeros(1000, 4, requires_grad=True)
    call = timed_call(lambda: torch.nn.functional.embedding(torch.tensor([1, 5]), w, sparse=True).sum(), [w], 'both')
    assert memory(call)['held_mib'] == (2*8 + 2*4*4)/2**20


def test_counts_by_hand():
    p = Problem(2, 3, 5, d=7)
    assert count({'NMK': 1, 'NK': 4, 'M': 2, 'Kd': 1, '': 9}, p) == 30 + 4*10 + 2*3 + 35 + 9


@pytest.mark.parametrize('name', ['cross-entropy, class ids', 'cross-entropy, probabilities', 'published form',
                                  'matmul', 'timm SoftTargetCrossEntropy', 'the two products alone', 'ours, hard',
                                  'ours, one lam', 'ours, lam per sample', 'ours, dense', 'ours, closed form',
                                  'ours, cross-entropy, class ids', 'ours, cross-entropy, probabilities',
                                  'ours, cross-entropy, one lam'])
@pytest.mark.parametrize('n,m,k', [(128, 128, 100), (64, 512, 50)])
def test_numbers_held_are_an_upper_bound(name, n, m, k):
    "What a size is skipped for is not less than what the provider takes, inputs included."
    if 'timm' in name: pytest.importorskip('timm')
    p = Problem(n, m, k)
    call = timed_call(PROVIDERS[name].build(p), p.leaves, 'both')
    call()
    inputs = p.logits.numel() + (p.dense_targets.numel() if 'dense_targets' in vars(p) else 0)  # made where used
    mib = 4/2**20
    assert inputs*mib + memory(call)['peak_mib'] <= 1.05*count(PROVIDERS[name].numbers, p)*mib + .05


def test_times_are_in_milliseconds():
    times = durations(lambda: time.sleep(.002), seconds=.5)
    assert len(times) >= 2 and 2 <= min(times) < 200
    assert len(durations(lambda: time.sleep(.02), seconds=.001)) == 1  # a long call counts once


def test_the_timer_of_the_process_counts_its_work_and_no_waiting():
    def work(): sum(range(200_000))
    asleep, busy = (durations(call, seconds=.05, timer='process') for call in (lambda: time.sleep(.01), work))
    assert max(asleep) < 5 and min(busy) > .2
    assert environment('cpu', 'process')['timer'] == 'process' and environment('cpu')['timer'] == 'clock'


def test_measure_gives_quantiles_in_order_and_the_mode_that_was_asked_for():
    x, calls = torch.ones(10, requires_grad=True), []
    for mode in MODES:
        row = measure(dict(f=lambda: (x**2).sum()), [x], mode, rounds=2, seconds=.005)['f']
        assert row['status'] == 'ok' and 0 < row['p20_ms'] <= row['p50_ms'] <= row['p80_ms'] and row['repeats'] >= 2
        assert row['held_mib']*2**20 == (4 if mode == 'forward' else 40)


def test_providers_take_turns():
    order = []
    x = torch.ones(1, requires_grad=True)
    def f(name): order.append(name); time.sleep(.02); return x.sum()
    measure({n: lambda n=n: f(n) for n in 'ab'}, [x], 'forward', rounds=2, seconds=.001)
    assert ''.join(order) == 'aabb' + 'abab'  # warm-up and memory, then one long call a turn


def test_a_context_holds_forward_and_backward_and_is_left():
    seen = []
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): seen.append(torch.get_float32_matmul_precision()); return x.sum()
        @staticmethod
        def backward(ctx, g): seen.append(torch.get_float32_matmul_precision()); return g.expand(2)
    x = torch.ones(2, requires_grad=True)
    measure(dict(f=lambda: Square.apply(x)), [x], 'both', rounds=1, seconds=.001, contexts=dict(f=tf32_products))
    assert set(seen) == {'high'} and torch.get_float32_matmul_precision() == 'highest'


def test_checks_are_off_while_measuring_and_on_again():
    seen = []
    x = torch.ones(1, requires_grad=True)
    measure(dict(f=lambda: (seen.append(value_checks()), x.sum())[1]), [x], rounds=1, seconds=.001)
    assert seen and not any(seen) and value_checks()


@pytest.mark.parametrize('call,message', [
    (lambda: timed_call(None, [], 'train'), "mode must be one of forward, backward, both, got 'train'"),
    (lambda: measure({}, [], 'train'), "mode must be one of"),
    (lambda: durations(lambda: 0, timer='sun'), "timer must be 'events', 'graph' or 'process', got 'sun'"),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message): call()


# ---- failures are rows
NOTHING, ONE = {}, {'': 1}  # numbers held, operations


def boom(error):
    def build(p):
        p.leaves
        def run(): raise error
        return run
    return build


@pytest.mark.parametrize('error,status', [
    (RuntimeError('no luck in /some/folder/file.py\nmore'), 'error: RuntimeError: no luck in file.py'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried'), 'out of memory'),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), 'out of memory'),
    (MemoryError(), 'out of memory'),
])
@pytest.mark.parametrize('when', ['build', 'call'])
def test_a_provider_that_fails_gives_a_status_and_no_number(monkeypatch, error, status, when):
    def fails(p): raise error
    monkeypatch.setitem(PROVIDERS, 'bad', Provider(fails if when == 'build' else boom(error), NOTHING, ONE))
    rows = measure_size(Problem(4, 4, 3), ['bad', 'matmul'], environment(), {}, rounds=1, seconds=.001)
    bad, good = ([r for r in rows if r['provider'] == name] for name in ('bad', 'matmul'))
    assert {r['status'] for r in bad} == {status} and len(bad) == 3
    assert all(r.get(c) is None for r in bad for c in NUMBERS)
    assert len(good) == 3 and all(r['status'] == 'ok' and r['p50_ms'] > 0 for r in good)


def test_an_interruption_is_no_row(monkeypatch):
    monkeypatch.setitem(PROVIDERS, 'bad', Provider(boom(KeyboardInterrupt()), NOTHING, ONE))
    with pytest.raises(KeyboardInterrupt):
        measure_size(Problem(4, 4, 3), ['bad'], environment(), {}, rounds=1, seconds=.001)


def test_too_large_and_too_slow_are_not_tried(monkeypatch):
    calls = []
    def build(p): calls.append(1); return lambda: p.logits.sum()
    monkeypatch.setitem(PROVIDERS, 'x', Provider(build, {'': 2**30}, {'N': 10}))
    rows = measure_size(Problem(4, 4, 3), ['x'], environment(), {}, budget=2**31)
    assert {r['status'] for r in rows} == {'skipped: needs 4 GiB'} and not any('p50_ms' in r for r in rows)
    rows = measure_size(Problem(4, 4, 3), ['x'], environment(), dict(x=(10, 1.)), budget=2**40, limit=3.9)
    assert {r['status'] for r in rows} == {'skipped: over the time budget'} and not calls
    last = dict(x=(10, 1.))
    rows = measure_size(Problem(4, 4, 3), ['x'], environment(), last, budget=2**40, limit=4.1, rounds=1, seconds=.001)
    assert {r['status'] for r in rows} == {'ok'} and last['x'][0] == 40 and last['x'][1] < 1
    assert skip_reason(PROVIDERS['x'], Problem(4, 4, 3, device='cuda'), budget=0) == ''  # there it is tried


# ---- the ledger
def row(**more):
    size = dict(N=1, M=1, K=2, d=0, dtype='float32')
    return dict(provider='p', mode='both', p50_ms=1.23456, status='ok', date='2000-01-01') | size | environment() | more


def test_rows_replace_those_with_the_same_key(tmp_path):
    path = tmp_path/'bench.csv'
    assert read_rows(path) == {}
    add_rows(path, [row(), row(N=10), row(N=9)])
    add_rows(path, [row(p50_ms=2.), row(card='other')])
    rows = list(read_rows(path).values())
    assert len(rows) == 4 and [r['p50_ms'] for r in rows if r['N'] == '1' and r['card'] != 'other'] == ['2']
    assert [r['N'] for r in rows if r['card'] != 'other'] == ['1', '9', '10'] and list(rows[0]) == BENCH_COLUMNS
    assert [p.name for p in tmp_path.iterdir()] == ['bench.csv']
    assert rows[0]['peak_mib'] == '' and '1.235' in {r['p50_ms'] for r in rows}


def test_another_file_is_not_overwritten(tmp_path):
    path = tmp_path/'bench.csv'
    path.write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='bench.csv must have the columns provider, mode'): add_rows(path, [row()])
    assert path.read_text() == 'a,b\n1,2\n'


@pytest.fixture
def counted(monkeypatch):
    "A single provider, whose calls are counted."
    calls = []
    def build(p): calls.append(p.N); return lambda: p.logits.sum()
    for name in list(PROVIDERS): monkeypatch.delitem(PROVIDERS, name)
    monkeypatch.setitem(PROVIDERS, 'x', Provider(build, NOTHING, ONE))
    return calls


def test_the_ledger_resumes(tmp_path, counted, capsys, monkeypatch):
    path, how = tmp_path/'bench.csv', dict(rounds=1, seconds=.001)
    fill_ledger([Problem(2, 2, 3)], path, **how)
    fill_ledger([Problem(2, 2, 3), Problem(4, 4, 3)], path, **how)
    assert counted == [2, 4] and 'in the ledger' in capsys.readouterr().out and len(read_rows(path)) == 6
    fill_ledger([Problem(2, 2, 3)], path, fresh=True, **how)
    assert counted == [2, 4, 2] and len(read_rows(path)) == 6
    fill_ledger([Problem(2, 2, 3, dtype=torch.float64)], path, **how)
    assert counted == [2, 4, 2, 2] and len(read_rows(path)) == 9
    real = bench.environment
    monkeypatch.setattr(bench, 'environment', lambda *a: real(*a) | dict(torch='0.0'))
    fill_ledger([Problem(2, 2, 3)], path, **how)
    assert counted[-1] == 2 and len(counted) == 5
    assert len(read_rows(path)) == 9  # another version takes the place of the old rows


def test_the_version_changes_with_every_module_of_a_loss(tmp_path, monkeypatch):
    "The code that is measured stands in files and in folders; other modules do not count."
    package = tmp_path/'softnce'
    (package/'contrast').mkdir(parents=True)
    for name in ('losses.py', 'peers.py', 'contrast/sums.py'): (package/name).write_text('1')
    monkeypatch.setattr(bench.softnce, '__file__', str(package/'__init__.py'))
    seen = [environment()['softnce']]
    for name in ('peers.py', 'losses.py', 'contrast/sums.py', 'contrast/new.py'):
        (package/name).write_text('2')
        seen.append(environment()['softnce'])
    assert seen[0] == seen[1] and len(set(seen)) == 4


def test_a_size_that_breaks_off_leaves_the_finished_ones(tmp_path, counted, monkeypatch):
    path, how = tmp_path/'bench.csv', dict(rounds=1, seconds=.001)
    real = PROVIDERS['x'].build
    def build(p):
        if p.N == 4: raise KeyboardInterrupt
        return real(p)
    monkeypatch.setitem(PROVIDERS, 'x', Provider(build, NOTHING, ONE))
    with pytest.raises(KeyboardInterrupt): fill_ledger([Problem(2, 2, 3), Problem(4, 4, 3)], path, **how)
    assert {r['N'] for r in read_rows(path).values()} == {'2'}
    monkeypatch.setitem(PROVIDERS, 'x', Provider(real, NOTHING, ONE))
    fill_ledger([Problem(2, 2, 3), Problem(4, 4, 3)], path, **how)
    assert counted == [2, 4] and {r['N'] for r in read_rows(path).values()} == {'2', '4'}


def check_format(rows):
    "What every row of a ledger must be."
    for r in rows:
        assert list(r) == BENCH_COLUMNS
        assert r['mode'] in MODES and r['device'] in ('cpu', 'cuda') and r['timer'] in TIMERS
        assert r['provider'] and r['card']
        assert all(int(r[k]) > 0 for k in ('N', 'M', 'K', 'threads'))
        assert int(r['M']) >= int(r['N']) and int(r['d']) >= 0
        time.strptime(r['date'], '%Y-%m-%d')
        if r['status'] == 'ok':
            assert 0 < float(r['p20_ms']) <= float(r['p50_ms']) <= float(r['p80_ms'])
            assert float(r['peak_mib']) >= 0 and int(r['repeats']) >= 1
        else:
            assert r['status'] == 'out of memory' or r['status'].startswith(('skipped: ', 'error: ')), r['status']
            assert all(r[c] == '' for c in NUMBERS)


def test_format_of_measured_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(PROVIDERS, 'bad', Provider(boom(RuntimeError('x')), NOTHING, ONE))
    for name in [n for n in PROVIDERS if 'compiled' in n]: monkeypatch.delitem(PROVIDERS, name)
    fill_ledger([Problem(4, 4, 5), Problem(4, 4, 5, d=2)], tmp_path/'bench.csv', rounds=1, seconds=.001)
    rows = list(read_rows(tmp_path/'bench.csv').values())
    assert len(rows) == 3*(len(available()) + len(available(linear=True)))
    check_format(rows)


@pytest.mark.skipif(not LEDGER.exists(), reason='results/bench.csv has not been made')
def test_format_of_the_committed_ledger():
    rows = list(csv.DictReader(LEDGER.open(newline='', encoding='utf-8')))
    assert rows and len(read_rows(LEDGER)) == len(rows)
    check_format(rows)


@pytest.mark.slow
def test_the_compiled_form_is_the_loss():
    p = Problem(6, 12, 5)
    compiled, plain = (PROVIDERS[name].build(p) for name in ('matmul, compiled', 'matmul'))
    rows = measure(dict(c=compiled), p.leaves, 'backward', rounds=1, seconds=.001)
    assert rows['c']['status'] == 'ok', rows
    torch.testing.assert_close(compiled(), plain())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('timer', ['events', 'graph'])
def test_every_row_on_a_gpu_is_measured(timer, tmp_path):
    problems = [Problem(64, 128, 50, device='cuda'), Problem(64, 64, 50, d=32, device='cuda', dtype=torch.bfloat16)]
    fill_ledger(problems, tmp_path/'bench.csv', timer=timer, rounds=1, seconds=.01)
    rows = list(read_rows(tmp_path/'bench.csv').values())
    check_format(rows)
    assert {r['status'] for r in rows} == {'ok'}
