"""The Snakefile on a real Slurm: `make test-cluster`.

Needs root on Debian (tests/cluster/slurm installs and starts Slurm), or a script of your own in SOFTNCE_SLURM that
takes the same words: up, lose NODE, return NODE, down. Runs are walks: seconds long, a checkpoint a step.
"""
import json, os, random, re, shutil, subprocess, sys, threading, time
from pathlib import Path

import pandas as pd
import pytest
import yaml

REPO, HERE = Path(__file__).parents[2], Path(__file__).parent
SLURM = os.environ.get('SOFTNCE_SLURM', str(HERE/'slurm'))
QUICK = ['--slurm-status-command', 'squeue', '--slurm-init-seconds-before-status-checks', '3',
         '--seconds-between-status-checks', '3']
SNAKEMAKE, SOFTNCE = [Path(sys.executable).with_name(name) for name in ('snakemake', 'softnce')]


def sh(*cmd, check=True, **kw):
    done = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, **kw)
    assert not check or done.returncode == 0, f'{cmd}: {done.stdout}{done.stderr}'
    return done.stdout.strip()


@pytest.fixture(scope='module')
def slurm():
    """A Slurm with partitions gpu and spot on nodes n1 and n2.

    A process of its own starts it, and takes it down when this one ends, in whatever way: then the pipe is closed."""
    keep = '"$0" up || exit; echo ready; read _; exec "$0" down'
    keeper = subprocess.Popen(['sh', '-c', keep, SLURM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              start_new_session=True)
    while (line := keeper.stdout.readline()) not in ('ready\n', ''):
        if m := re.match(r'export (\w+)=(.*)', line): os.environ[m[1]] = m[2]
    assert line == 'ready\n', f'{SLURM} up failed: see above'
    yield
    keeper.stdin.close()
    assert keeper.wait(60) == 0, f'{SLURM} down failed'


@pytest.fixture
def hurry(slurm):
    "Requeued jobs need not wait their two minutes."
    end = threading.Event()
    def loop():
        while not end.wait(1):
            for line in sh('squeue', '-h', '-t', 'PD', '-o', '%A %r', check=False).splitlines():
                job, reason = line.split(' ', 1)
                if reason == 'BeginTime': sh('scontrol', 'update', f'jobid={job}', 'StartTime=now', check=False)
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    yield
    end.set()
    thread.join()
    sh('scancel', '--me', check=False)


class Project:
    "A folder with the Snakefile and a config of walks."
    def __init__(self, folder, gpu=1, **parameters):
        self.folder, self.log = folder, folder/'head.log'
        shutil.copy(REPO/'Snakefile', folder)
        shutil.copytree(REPO/'profiles', folder/'profiles')
        for name in ('walk', 'walks'): shutil.copy(HERE/f'{name}.ipynb', folder)
        config = {'targets': {'table1': {'notebook': 'walks.ipynb', 'parameters': parameters}},
                  'resources': {'walk': {'gpu': gpu, 'mem_mb': 200, 'runtime': 10}}}
        (folder/'walks.yaml').write_text(yaml.safe_dump(config))
    def snakemake(self, *args, profile='slurm', **kw):
        quick = QUICK if profile == 'slurm' else []
        ends_with_us = 'setpriv', '--pdeathsig', 'KILL'
        command = [*ends_with_us, SNAKEMAKE, '--profile', f'profiles/{profile}', '--configfile', 'walks.yaml', *quick,
                   *args]
        with self.log.open('a') as log:
            return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, **kw)
    def softnce(self, *args): return sh(SOFTNCE, *args, cwd=self.folder)
    def attempts(self):
        "One row per start of a walk, newest last: where, at which step; `finished` is True in the row of an end."
        rows = [dict(id=p.parent.name, **json.loads(line)) for p in self.folder.glob('runs/walk/*/attempts.jsonl')
                for line in p.read_text().splitlines()]
        return sorted(rows, key=lambda r: r.get('at') or r.get('finished'))
    def metrics(self):
        rows = [json.loads(p.read_text()) for p in self.folder.glob('runs/walk/*/metrics.json')]
        return {row['seed']: row['x'] for row in rows}
    def state(self): return f"{self.log.read_text()[-6000:]}\n{sh('squeue', check=False)}"
    def wait_for(self, condition, seconds=400):
        end = time.monotonic()+seconds
        while not (found := condition()):
            assert time.monotonic() < end, f'never got there:\n{self.state()}\n{self.attempts()}'
            time.sleep(.3)
        return found
    def finish(self, head, code=0, seconds=600):
        try: head.wait(seconds)
        except subprocess.TimeoutExpired: head.kill()
        assert head.returncode == code, f'exit {head.returncode}:\n{self.state()}'


def undisturbed(seed, steps):
    "Where a walk ends that nobody disturbs: the steps of walk.ipynb, added up in one go."
    x = 0.
    for step in range(steps): x += random.Random(f'{seed} {step}').gauss(0, 1)
    return x


def test_four_runs_have_their_own_gpus(hurry, tmp_path):
    "Two nodes, 8 GPUs each, 4 runs of 4: all at once, no GPU twice."
    project = Project(tmp_path, gpu=4, seeds=[0, 1, 2, 3], steps=40)
    project.finish(project.snakemake('table1'))
    starts = [a for a in project.attempts() if 'gpus' in a]
    assert len(starts) == 4
    used = [(a['node'], gpu) for a in starts for gpu in a['gpus'].split(',')]
    assert len(used) == len(set(used)) == 16, used
    ends = [a['finished'] for a in project.attempts() if 'finished' in a]
    assert max(a['at'] for a in starts) < min(ends), 'they did not overlap'
    assert project.metrics() == {s: undisturbed(s, 40) for s in range(4)}
    table = pd.read_csv(next(tmp_path.glob('runs/walks/*/ends.csv')))
    assert table['x'].tolist() == pytest.approx([undisturbed(s, 40) for s in range(4)], abs=1e-12)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob('runs/*/*/*')}
    project.finish(project.snakemake('table1'))
    assert 'Nothing to be done' in project.log.read_text()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob('runs/*/*/*')} == before


def test_a_failing_run_leaves_the_others(hurry, tmp_path):
    project = Project(tmp_path, seeds=[0, 1], steps=6, fail_at=[-1, 3])
    project.finish(project.snakemake(), code=1)
    assert project.metrics() == {s: undisturbed(s, 6) for s in (0, 1)}
    assert not list(tmp_path.glob('runs/walks/*/metrics.json')), 'no figure without its runs'
    text = project.softnce('status', 'runs', '--errors')
    error = 'RuntimeError: the step 3 that fails'
    assert text.count('Traceback') == text.count(f'cell 4 of 5: {error}') == 2 and text.endswith(error)
    assert re.search(r'5 runs: .*2 done', project.softnce('status', 'runs', '--config', 'walks.yaml'))
    assert '2 failed' in project.softnce('status', 'runs')


def test_a_wrong_partition(hurry, tmp_path):
    project = Project(tmp_path, seeds=[0])
    head = project.snakemake('--default-resources', 'slurm_partition=gpus')
    project.finish(head, code=1)
    assert "there is no partition 'gpus' on this cluster; it has: gpu, spot" in project.log.read_text()
    assert not (tmp_path/'runs').exists() or not list(tmp_path.glob('runs/*/*/metrics.json'))


def test_twelve_runs_one_preemption_one_lost_node_one_killed_head(hurry, tmp_path):
    steps = 60
    project = Project(tmp_path, gpu=4, seeds=list(range(12)), steps=steps)
    start = lambda: project.snakemake('--default-resources', 'slurm_partition=spot')
    head = start()
    def running(node):
        "Runs under way on a node, ten seconds or more from their end: what comes next hits them in the middle."
        jobs = sh('squeue', '-h', '-t', 'R', '-w', node, '-o', '%A').split()
        def job(p): return json.loads((p.parent/'attempts.jsonl').read_text().splitlines()[-1]).get('job')
        midway = [p for p in tmp_path.glob('runs/walk/*/history.csv') if 3 < p.read_text().count('\n') < steps-20]
        return {p.parent.name for p in midway if job(p) in jobs}
    # a job of the gpu partition takes node n1: its runs checkpoint and go back to the queue
    preempted = project.wait_for(lambda: running('n1'))
    urgent = ['-J', 'urgent', '-o', '/dev/null', '--wrap', 'sleep 5']
    sh('sbatch', '-p', 'gpu', '-w', 'n1', '--gpus=8', *urgent, cwd=tmp_path)
    def stopped(id): return 'stopped and unfinished' in (tmp_path/f'runs/walk/{id}/log.txt').read_text()
    project.wait_for(lambda: all(map(stopped, preempted)))
    # node n2 dies with its runs
    lost = project.wait_for(lambda: running('n2')-preempted)
    sh(SLURM, 'lose', 'n2')
    at = time.monotonic()
    # the head is killed while runs go on, and started again
    project.wait_for(lambda: running('n1'))
    head.kill()
    head.wait()
    in_queue = sh('squeue', '-h', '--me').count('softnce')
    assert in_queue
    time.sleep(max(0., 20-(time.monotonic()-at)))  # Slurm notices the loss after 15 s
    sh(SLURM, 'return', 'n2')
    assert project.snakemake('--unlock').wait() == 0
    head = start()
    project.finish(head)
    # what happened
    attempts = project.attempts()
    starts = {a['id']: [] for a in attempts}
    for a in attempts:
        if 'start' in a: starts[a['id']].append(a['start'])
    ends = [a['id'] for a in attempts if 'finished' in a]
    assert len(ends) == len(set(ends)) == len(starts) == 12, 'twelve runs, each finished once'
    for i in starts: assert (tmp_path/f'runs/walk/{i}/log.txt').read_text().count(': finished') == 1
    assert all(len(starts[i]) >= 2 and starts[i][-1] > 0 for i in preempted | lost), (preempted, lost, starts)
    assert 'jobs of an earlier Snakemake are still in the queue' in project.log.read_text()
    # and what it did not change
    assert project.metrics() == {s: undisturbed(s, steps) for s in range(12)}
    for p in tmp_path.glob('runs/walk/*/history.csv'):  # a row after the last checkpoint may come twice
        rows = pd.read_csv(p).drop_duplicates()
        assert rows['step'].tolist() == list(range(1, steps+1))
    print(f'starts of the runs: {starts}; preempted {sorted(preempted)}, lost {sorted(lost)}, '
          f'{in_queue} jobs in the queue when the head was killed')


def test_one_run_on_two_nodes(hurry, tmp_path):
    "The notebook on the first node, its other ranks on the second; an error there is the error of the run."
    for name in ('ranks.ipynb', 'ranks_job.py'): shutil.copy(HERE/name, tmp_path)
    def submit(fail):
        job = ['-o', tmp_path/'job.txt', '--wrap', f'{SOFTNCE} run ranks.ipynb -p fail={fail}']
        sh('sbatch', '--wait', '-N', 2, '--ntasks-per-node=1', '--gpus-per-node=2', *job, cwd=tmp_path, check=False)
    submit(-1)
    rows = [json.loads(p.read_text()) for p in tmp_path.glob('runs/ranks/*/metrics.json')]
    assert rows == [dict(total=0+1+2+3, where='n1 n1 n2 n2')], (tmp_path/'job.txt').read_text()
    submit(3)
    text = sh(SOFTNCE, 'status', 'runs', '--errors', cwd=tmp_path)
    logs = '\n'.join(p.read_text(errors='replace') for p in tmp_path.glob('runs/ranks/*/nodes-*/agent*.log'))
    assert 'rank 3 of 4 failed' in text and text.endswith('RuntimeError: rank 3 has no data'), text+logs


def test_images_on_two_nodes_are_images_on_one(hurry, tmp_path):
    """Two ranks train to the same numbers, whether on one node or on two; but for rounding, as a process that is alone
    on its node may use more threads."""
    for nodes, processes in ((2, 1), (1, 2)):
        settings = f'epochs=1 warmup_epochs=0 device=cpu nodes={nodes} processes={processes}'.split()
        command = ' '.join([f'{SOFTNCE} run images', *(f'-p {s}' for s in settings)])
        job = ['-o', tmp_path/f'job{nodes}.txt', '--wrap', command]
        sh('sbatch', '--wait', '-N', nodes, '--ntasks-per-node=1', '-c', processes, *job, cwd=tmp_path, check=False)
    found = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob('runs/images/*/metrics.json')}
    assert len(found) == 2, [(tmp_path/f'job{n}.txt').read_text() for n in (1, 2)]
    one, two = map(pd.DataFrame, found.values())
    pd.testing.assert_frame_equal(one, two, rtol=1e-5)
