"""What is to be done on a card, in calls of some minutes that go on where the last one stopped: `make gpu`.

    python tools/gpu.py                        on the card that is there, nine minutes
    python tools/gpu.py --minutes 30 --only bench train
    python tools/gpu.py --device cpu --toy --results DIR    the same way at toy sizes, by Triton's interpreter

Stages, in order; each ends when the time is over and goes on in the next call:

    tests   every kernel against its plain formula, on the card
    tune    the constants of the kernels that only a card can choose, into results/tuning.csv
    bench   time and memory of the losses and their peers, into results/bench.csv, a size at a time
    train   steps of ViT-B/16 and the runs of the list that come next, into results/

Every row says on which card, with which driver and versions, and when; results/cards.csv has a row for each stage of
each call. What is done for this card and this code is not done again.
"""
import argparse
import contextlib
import csv
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARD = ['device', 'card', 'capability', 'driver', 'cuda', 'torch', 'triton', 'softnce']
STAGE_COLUMNS = ['date', 'stage', 'what', 'outcome', 'seconds', *CARD]
TUNE_COLUMNS = ['date', 'constant', 'value', 'N', 'K', 'p50_ms', 'status', *CARD]

# rows, classes of logits; rows, classes, width of linear heads: the sizes of the page of the benchmark and the peers'
SIZES = [(1024, 200), (1024, 1000), (2048, 1000), (4096, 1000), (8192, 1000), (32768, 1000), (8192, 21841),
         (32768, 21841)]
HEADS = [(8192, 10_000, 256), (8192, 100_000, 256), (8192, 1_000_000, 256), (8192, 10_000_000, 256),
         (4096, 21841, 768), (4096, 262144, 768), (8192, 128256, 4096)]
TOY_SIZES, TOY_HEADS = [(4, 6)], [(4, 6, 2)]
# products that a card alone has, of a linear head: no kernel of ours
ON_A_CARD = 'tests/losses/test_linear.py::test_a_weight_in_bfloat16_is_multiplied_as_it_is_on_a_card'

TINY = '-p dataset=tiny_imagenet -p recipe=tiny_imagenet -p model=resnet18_64 -p image_size=64'.split()
LOSSES = 'soft_target_info_nce', 'soft_target_cross_entropy', 'soft_distribution_info_nce', 'info_nce', 'nll'
LOSS_OF_TOYS = 'soft_target_info_nce', 'nll'


def trainings(toy, tiny):
    "Name and arguments of `softnce run` of each training, the next to be done first."
    if toy:
        small = ('-p epochs=1 -p warmup_epochs=0 -p limit=4 -p classes=2 -p width=2 -p batch_size=4 '
                 '-p num_workers=0').split()
        return [(f'digits, {loss}', ['images', *small, '-p', f'loss={loss}']) for loss in LOSS_OF_TOYS]
    data = ['-p', f'root={Path(tiny).resolve()}']
    def run(loss, seed): return ['images', *TINY, *data, '-p', f'loss={loss}', '-p', f'seed={seed}']
    return [(f'Tiny ImageNet, {loss}, seed {seed}', run(loss, seed))
            for seed in range(5) for loss in LOSSES]


# ------------------------------------------------------------------ where, and what is known
def where(device):
    "What a row says of the card, the driver and the versions."
    import torch
    from softnce.experiments.bench import environment
    env, driver, capability = environment(device), '', ''
    if device == 'cuda':
        capability = '.'.join(map(str, torch.cuda.get_device_capability()))
        asked = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        with contextlib.suppress(OSError, IndexError):
            driver = subprocess.run(asked, capture_output=True, text=True).stdout.split()[0]
    return {k: env[k] for k in ('device', 'card', 'torch', 'triton', 'softnce')} | dict(
        capability=capability, driver=driver, cuda=torch.version.cuda or '')


def read(path):
    if not path.exists(): return []
    with open(path, newline='', encoding='utf-8') as f: return list(csv.DictReader(f))


def add(path, columns, **row):
    "One row more, at once: a call may be cut off at any time."
    new = not path.exists()
    with open(path, 'a', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, columns, lineterminator='\n')
        if new: writer.writeheader()
        writer.writerow({c: row.get(c, '') for c in columns})


def same_card(row, here): return all(row[k] == here[k] for k in ('card', 'torch', 'triton', 'softnce'))


class Call:
    "One call of the command: its time, its card, and the files it writes."
    def __init__(self, options):
        self.options, self.here = options, where(options.device)
        self.results, self.toy = Path(options.results).resolve(), options.toy
        self.results.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60*options.minutes
    def left(self): return self.end - time.monotonic()
    def note(self, stage, what, outcome, seconds):
        row = dict(date=f'{datetime.now(timezone.utc):%F}', stage=stage, what=what, outcome=outcome,
                   seconds=round(seconds), **self.here)
        add(self.results/'cards.csv', STAGE_COLUMNS, **row)
        print(f'   {what}: {outcome}, {seconds:.0f} s', flush=True)
    def done(self, stage, what):
        rows = read(self.results/'cards.csv')
        return any(r['stage'] == stage and r['what'] == what and r['outcome'] == 'ok' and same_card(r, self.here)
                   for r in rows)
    def command(self, stage, what, command, **env):
        "Runs a command for at most the time that is left, and notes how it ended."
        if self.done(stage, what): return print(f'   {what}: done before')
        if self.left() < 5: return print(f'   {what}: no time left')
        begin = time.monotonic()
        try: code = subprocess.run(command, cwd=ROOT, env=os.environ | env, timeout=self.left()).returncode
        except subprocess.TimeoutExpired: code = None
        outcome = {0: 'ok', None: 'goes on in the next call'}.get(code, f'failed with {code}')
        self.note(stage, what, outcome, time.monotonic() - begin)


# ------------------------------------------------------------------ the stages
def tests(call):
    "Every kernel against its plain formula, and the products of linear heads: tests that use the card if there is one."
    chosen = ['-k', 'test_class_sums and classes or test_same_bits'] if call.toy else []
    env = {} if call.options.device == 'cuda' else dict(TRITON_INTERPRET='1')
    call.command('tests', 'kernels', [sys.executable, '-m', 'pytest', '-q', '-m', 'not slow', '-p', 'no:cacheprovider',
                                      'tests/contrast/test_triton.py', ON_A_CARD, *chosen], **env)


def constants(toy):
    "Module, name and values to be tried of what only a card can choose; the first is what is there."
    from softnce.contrast import triton_candidates, triton_common, triton_pairs
    blocks = triton_pairs.PAIR_BLOCKS
    tried = [(triton_pairs, 'PAIR_BLOCKS', [blocks, blocks | dict(BLOCK_J=32), blocks | dict(BLOCK_N=128)]),
             (triton_candidates, 'TILE', [1024, 2048, 512]),
             (triton_candidates, 'COMPARISONS', [2**25, 2**27, 0]),
             (triton_common, 'OF_CLUSTER', [{4: 2**13, 8: 2**11}, {4: 2**12, 8: 2**11}]),
             (triton_common, 'NEXT_BLOCKS', [{4: 2**11, 8: 2**10}, {4: 2**12, 8: 2**11}])]
    return [(m, n, values[:2]) for m, n, values in tried[:2]] if toy else tried


def tune(call):
    "Each value of each constant, with the others as they are."
    from softnce.experiments.bench_forms import Problem
    path = call.results/'tuning.csv'
    have = {(r['constant'], r['value'], r['N'], r['K']) for r in read(path) if same_card(r, call.here)}
    begin, tried = time.monotonic(), 0
    for module, name, values in constants(call.toy):
        for value in values:
            for N, K in TOY_SIZES if call.toy else [(1024, 1000), (8192, 1000), (4096, 50_000)]:
                if (name, str(value), str(N), str(K)) in have: continue
                if call.left() < 20 and not call.toy: return print('   the rest in the next call')
                found = timed(module, name, value, Problem(N, N, K, device=call.options.device), call.options.device)
                tried += 1
                add(path, TUNE_COLUMNS, date=f'{datetime.now(timezone.utc):%F}', constant=name, value=value, N=N, K=K,
                    **found, **call.here)
    if tried: call.note('tune', f'{tried} rows', 'ok', time.monotonic() - begin)


def timed(module, name, value, problem, device):
    "The median of a step with one value of a constant: of in-batch targets of one lambda, and of a cross-entropy."
    from softnce.contrast import set_backend
    from softnce.experiments.bench_forms import PROVIDERS
    from softnce.experiments.bench_measure import durations, timed_call
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        with set_backend('triton'):
            steps = [timed_call(PROVIDERS[p].build(problem), problem.leaves, 'both')
                     for p in ('ours, one lam', 'ours, lam per sample', 'ours, cross-entropy, one lam')]
            times = [statistics.median(durations(step, device, .05)) for step in steps]
        return dict(p50_ms=f'{sum(times):.4g}', status='ok')
    except Exception as error: return dict(status=f'error: {type(error).__name__}: {str(error).splitlines()[0][:80]}')
    finally: setattr(module, name, before)


def bench(call):
    "The ledger of the benchmark, a size at a time."
    import torch
    from softnce.contrast import set_backend
    from softnce.experiments.bench import fill_ledger
    from softnce.experiments.bench_forms import Problem
    device, begin = call.options.device, time.monotonic()
    sizes, heads = (TOY_SIZES, TOY_HEADS) if call.toy else (SIZES, HEADS)
    problems = [Problem(n, n, k, device=device) for n, k in sizes]
    dtype = torch.bfloat16 if device == 'cuda' else torch.float32
    problems += [Problem(n, n, k, d, device, dtype) for n, k, d in heads]
    how = dict(rounds=1, seconds=.001) if call.toy else {}
    with set_backend('triton' if device == 'cpu' else None):  # kernels also where there is no card
        complete = fill_ledger(problems, call.results/'bench.csv', ('both',) if call.toy else ('forward', 'both'),
                               until=call.end, **how)
    outcome = 'ok' if complete else 'goes on in the next call'
    call.note('bench', f'{len(problems)} sizes', outcome, time.monotonic() - begin)


def train(call):
    "Steps of ViT-B/16, then the trainings of the list, each by `softnce run`: it resumes, and skips what is done."
    if not importlib.util.find_spec('papermill'): return call.note('train', 'all', 'skipped: papermill is missing', 0)
    runs = Path(call.options.runs).resolve()
    run = [sys.executable, '-c', 'from softnce.runs.cli import main; main()', 'run']
    toy = '-p anyway=true -p model=small_cnn -p image_size=8 -p classes=3 -p batch_size=2 -p precision=fp32'
    toy += ' -p compile=false -p steps=1 -p pipeline_images=4 -p workers=[0] -p losses=["nll"]'
    steps = [*run, 'throughput', '-p', f'results={call.results}', '--out', str(runs)]
    call.command('train', 'steps of ViT-B/16', steps + toy.split()*call.toy)
    if not call.toy and not Path(call.options.tiny).exists():
        return call.note('train', 'Tiny ImageNet', f'skipped: {call.options.tiny} is not there', 0)
    for what, arguments in trainings(call.toy, call.options.tiny):
        if call.left() > 5: call.command('train', what, [*run, *arguments, '--out', str(runs)])
    collect = [sys.executable, '-c', 'from softnce.runs import collect; import sys; '
               'collect(sys.argv[1], mixed=True).to_csv(sys.argv[2], index=False)']
    if (runs/'images').exists(): subprocess.run([*collect, runs/'images', call.results/'card_images.csv'], cwd=ROOT)


STAGES = dict(tests=tests, tune=tune, bench=bench, train=train)


def parsed(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda')
    parser.add_argument('--minutes', type=float, default=9., help='of this call')
    parser.add_argument('--only', nargs='+', choices=list(STAGES), default=list(STAGES))
    parser.add_argument('--toy', action='store_true', help='sizes for trying the command out')
    parser.add_argument('--results', default=ROOT/'results')
    parser.add_argument('--runs', default=ROOT/'runs', help='folder of the trainings')
    parser.add_argument('--tiny', default=ROOT/'data'/'tiny-imagenet-200.zip', help='Tiny ImageNet: zip file or folder')
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parsed(arguments)
    if options.device == 'cpu': os.environ['TRITON_INTERPRET'] = '1'  # before Triton is imported
    import torch
    if options.device == 'cuda' and not torch.cuda.is_available():
        sys.exit('no card: torch sees none. To try it out: python tools/gpu.py --device cpu --toy --results DIR')
    call = Call(options)
    print(', '.join(f'{k} {v}' for k, v in call.here.items() if v), flush=True)
    for name in options.only:
        print(f'== {name}', flush=True)
        STAGES[name](call)


if __name__ == '__main__': main()
