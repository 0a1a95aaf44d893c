"""experiments/graphs: a run that is killed and started again ends with the numbers of one that was not; a damaged file
stops it with its name."""
import json, os, shutil, signal, subprocess, sys, time

import pandas as pd
import pytest
for name in ('h5py', 'torch_geometric', 'papermill'): pytest.importorskip(name)
from softnce.graphs.celltype import RAW

TINY = """losses=['nll','soft_distribution_info_nce','soft_target_info_nce'] folds=[1] per_stage=2 cells=[40,60]
    depth=2 hidden=8 batch_size=3 epochs_hard=4 epochs_soft=4""".split()
RUN = [sys.executable, '-c', 'from softnce.runs.cli import main; main()', 'run', 'graphs']
TEST = [*RUN, *[a for p in TINY for a in ('-p', p)]]


def start(out, *more):
    return subprocess.Popen([*TEST, *more, '--out', str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)


def finished(process):
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize('rows,sign', [(2, signal.SIGKILL), (6, signal.SIGTERM)])
def test_a_killed_run_ends_like_the_others(tmp_path, rows, sign):
    finished(start(tmp_path/'whole'))
    process = start(tmp_path/'cut')
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None: # until that many epochs are logged
        history = list((tmp_path/'cut').rglob('history.csv'))
        if history and history[0].read_text().count('\n') > rows: break
        time.sleep(.05)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, sign) if sign == signal.SIGKILL else process.send_signal(sign)
    process.wait(120)
    assert not list((tmp_path/'cut').rglob('metrics.json'))
    again = finished(start(tmp_path/'cut', '--wait'))  # the orphaned kernel holds the lock until it notices
    assert 'resuming' in again
    whole, cut = (json.loads(next((tmp_path/n).rglob('metrics.json')).read_text()) for n in ('whole', 'cut'))
    assert cut == whole and len(whole) == 3*9 and all(r['synthetic'] for r in whole)
    a, b = (pd.read_csv(next((tmp_path/n).rglob('history.csv'))) for n in ('whole', 'cut'))
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.slow
def test_a_damaged_file_stops_the_run_with_its_name(tissue, tmp_path):
    shutil.copytree(tissue[0]/RAW, tmp_path/'data'/RAW)
    bad = sorted((tmp_path/'data'/RAW/'3-I').glob('*.h5'))[0]
    bad.write_bytes(bad.read_bytes()[:2000])
    process = start(tmp_path/'runs', '-p', f"data_root={tmp_path/'data'}")
    said = process.communicate()[0]
    assert process.returncode == 1 and f'{bad.name}: not a readable HDF5 file' in said, said


def test_a_fold_that_synthetic_tissue_does_not_have(tmp_path):
    done = subprocess.run([*RUN, '-p', 'folds=[0,3]', '--out', str(tmp_path)], capture_output=True, text=True)
    said = 'folds must be below per_stage=3 on synthetic tissue, got [0, 3]'
    assert done.returncode == 2 and said in done.stderr, done.stderr  # before anything starts
