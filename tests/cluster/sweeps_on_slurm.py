"""The Snakefile on a real Slurm: `make test-cluster`. Needs root on Debian (tests/cluster/slurm installs and starts Slurm), or a script of
your own in SOFTNCE_SLURM that takes the same words: up, lose NODE, return NODE, down. Runs are walks: seconds long, a checkpoint a step."""
import json, os, random, re, shutil, subprocess, sys, threading, time
from pathlib import Path

import pandas as pd
import pytest
import yaml

REPO, HERE = Path(__file__).parents[2], Path(__file__).parent
SLURM = os.environ.get('SOFTNCE_SLURM', str(HERE/'slurm'))
QUICK = ['--slurm-status-command', 'squeue', '--slurm-init-seconds-before-status-checks', '3', '--seconds-between-status-checks', '3']


def sh(*cmd, check=True, **kw):
    done = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, **kw)
    assert not check or done.returncode == 0, f'{cmd}: {done.stdout}{done.stderr}'
    return done.stdout.strip()


@pytest.fixture(scope='module')
def slurm():
    "A Slurm with partitions gpu and spot on nodes n1 and n2."
    for line in sh(SLURM, 'up').splitlines():
        if m := re.match(r'export (\w+)=(.*)', line): os.environ[m[1]] = m[2]
    yield
    sh(SLURM, 'down')


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
        for name in ('Snakefile', 'profiles'): (shutil.copytree if (REPO/name).is_dir() else shutil.copy)(REPO/name, folder/name)
        for name in ('walk', 'walks'): shutil.copy(HERE/f'{name}.ipynb', folder)
        self.config = {'targets': {'table1': {'notebook': 'walks.ipynb', 'parameters': parameters}}, 'resources': {'walk': {'gpu': gpu, 'mem_mb': 200, 'runtime': 10}}}
        (folder/'walks.yaml').write_text(yaml.safe_dump(self.config))
    def snakemake(self, *args, profile='slurm', **kw):
        command = [Path(sys.executable).with_name('snakemake'), '--profile', f'profiles/{profile}', '--configfile', 'walks.yaml', *(QUICK if profile == 'slurm' else []), *args]
        with self.log.open('a') as log: return subprocess.Popen(list(map(str, command)), cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, **kw)
    def softnce(self, *args): return sh(Path(sys.executable).with_name('softnce'), *args, cwd=self.folder)
    def attempts(self):
        "One row per start of a walk, newest last: where, at which step; `finished` is True in the row of an end."
        rows = [dict(id=p.parent.name, **json.loads(line)) for p in self.folder.glob('runs/walk/*/attempts.jsonl') for line in p.read_text().splitlines()]
        return sorted(rows, key=lambda r: r.get('at') or r.get('finished'))
    def metrics(self): return {m['seed']: m['x'] for p in self.folder.glob('runs/walk/*/metrics.json') for m in [json.loads(p.read_text())]}
    def wait_for(self, condition, seconds=400):
        end = time.monotonic()+seconds
        while not (found := condition()):
            assert time.monotonic() < end, f'never got there:\n{self.log.read_text()[-6000:]}\n{sh("squeue", check=False)}\n{self.attempts()}'
            time.sleep(.3)
        return found
    def finish(self, head, code=0, seconds=600):
        try: head.wait(seconds)
        except subprocess.TimeoutExpired: head.kill()
        assert head.returncode == code, f'exit {head.returncode}:\n{self.log.read_text()[-6000:]}\n{sh("squeue", check=False)}'


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
    assert 'Nothing to be done' in project.log.read_text() and {p: p.stat().st_mtime_ns for p in tmp_path.glob('runs/*/*/*')} == before


def test_a_failing_run_leaves_the_others(hurry, tmp_path):
    project = Project(tmp_path, seeds=[0, 1], steps=6, fail_at=[-1, 3])
    project.finish(project.snakemake(), code=1)
    assert project.metrics() == {s: undisturbed(s, 6) for s in (0, 1)}
    assert not list(tmp_path.glob('runs/walks/*/metrics.json')), 'no figure without its runs'
    text = project.softnce('status', 'runs', '--errors')
    assert text.count('Traceback') == text.count('cell 4 of 5: RuntimeError: the step 3 that fails') == 2 and text.endswith('RuntimeError: the step 3 that fails')
    assert re.search(r'5 runs: .*2 done', project.softnce('status', 'runs', '--config', 'walks.yaml')) and '2 failed' in project.softnce('status', 'runs')


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
        return {p.parent.name for p in tmp_path.glob('runs/walk/*/history.csv') if 3 < p.read_text().count('\n') < steps-20
                and json.loads((p.parent/'attempts.jsonl').read_text().splitlines()[-1]).get('job') in jobs}
    # a job of the gpu partition takes node n1: its runs checkpoint and go back to the queue
    preempted = project.wait_for(lambda: running('n1'))
    sh('sbatch', '-p', 'gpu', '-w', 'n1', '--gpus=8', '-J', 'urgent', '-o', '/dev/null', '--wrap', 'sleep 5', cwd=tmp_path)
    project.wait_for(lambda: all('stopped and unfinished' in (tmp_path/f'runs/walk/{i}/log.txt').read_text() for i in preempted))
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
    starts = {i: [a['start'] for a in attempts if a['id'] == i and 'start' in a] for i in {a['id'] for a in attempts}}
    ends = [a['id'] for a in attempts if 'finished' in a]
    assert len(ends) == len(set(ends)) == len(starts) == 12, 'twelve runs, each finished once'
    for i in starts: assert (tmp_path/f'runs/walk/{i}/log.txt').read_text().count(': finished') == 1
    assert all(len(starts[i]) >= 2 and starts[i][-1] > 0 for i in preempted | lost), (preempted, lost, starts)
    assert 'jobs of an earlier Snakemake are still in the queue' in project.log.read_text()
    # and what it did not change
    assert project.metrics() == {s: undisturbed(s, steps) for s in range(12)}
    for p in tmp_path.glob('runs/walk/*/history.csv'):  # a row after the last checkpoint may come twice, never out of step
        rows = pd.read_csv(p).drop_duplicates()
        assert rows['step'].tolist() == list(range(1, steps+1))
    print(f'starts of the runs: {starts}; preempted {sorted(preempted)}, lost {sorted(lost)}, {in_queue} jobs in the queue when the head was killed')


def test_one_run_on_two_nodes(hurry, tmp_path):
    "The notebook on the first node, its other ranks on the second; an error there is the error of the run."
    for name in ('ranks.ipynb', 'ranks_job.py'): shutil.copy(HERE/name, tmp_path)
    softnce = Path(sys.executable).with_name('softnce')
    def submit(fail): return sh('sbatch', '--wait', '-N', 2, '--ntasks-per-node=1', '--gpus-per-node=2', '-o', tmp_path/'job.txt',
                                '--wrap', f'{softnce} run ranks.ipynb -p fail={fail}', cwd=tmp_path, check=False)
    submit(-1)
    rows = [json.loads(p.read_text()) for p in tmp_path.glob('runs/ranks/*/metrics.json')]
    assert rows == [dict(total=0+1+2+3, where='n1 n1 n2 n2')], (tmp_path/'job.txt').read_text()
    submit(3)
    text = sh(softnce, 'status', 'runs', '--errors', cwd=tmp_path)
    logs = '\n'.join(p.read_text(errors='replace') for p in tmp_path.glob('runs/ranks/*/nodes-*/agent*.log'))
    assert 'rank 3 of 4 failed' in text and text.endswith('RuntimeError: rank 3 has no data'), text+logs


def test_images_on_two_nodes_are_images_on_one(hurry, tmp_path):
    "Two ranks train to the same numbers, whether on one node or on two."
    softnce = Path(sys.executable).with_name('softnce')
    for nodes, processes in ((2, 1), (1, 2)):
        sh('sbatch', '--wait', '-N', nodes, '--ntasks-per-node=1', '-c', processes, '-o', tmp_path/f'job{nodes}.txt',
           '--wrap', f'{softnce} run images -p epochs=1 -p warmup_epochs=0 -p device=cpu -p nodes={nodes} -p processes={processes}', cwd=tmp_path, check=False)
    found = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob('runs/images/*/metrics.json')}
    assert len(found) == 2, [(tmp_path/f'job{n}.txt').read_text() for n in (1, 2)]
    one, two = found.values()
    assert one == two
