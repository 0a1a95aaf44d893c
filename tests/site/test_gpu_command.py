"""`make gpu` without a card: the same command at toy sizes, by Triton's interpreter."""
import csv
import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton')
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def command():
    spec = importlib.util.spec_from_file_location('gpu_command', ROOT/'tools'/'gpu.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path):
    with open(path, newline='', encoding='utf-8') as f: return list(csv.DictReader(f))


def arguments(folder, *only, minutes=20):
    return ['--device', 'cpu', '--toy', '--minutes', str(minutes), '--results', str(folder),
            '--runs', str(folder/'runs'), '--only', *only]


def test_rows_say_where_and_when_and_a_second_call_goes_on(command, tmp_path, capsys):
    "Values of constants and a size of the benchmark; nothing twice."
    command.main(arguments(tmp_path, 'tune', 'bench'))
    tuned, timed, calls = (rows(tmp_path/f'{name}.csv') for name in ('tuning', 'bench', 'cards'))
    assert {r['status'] for r in tuned} == {'ok'} and {r['constant'] for r in tuned} == {'PAIR_BLOCKS', 'TILE'}
    ours = {r['provider']: r['status'] for r in timed if r['provider'].startswith(('ours', 'linear, ours'))}
    assert set(ours.values()) == {'ok'} and 'linear, ours, cross-entropy, one lam' not in ours and len(ours) > 10
    for row in (*tuned, *timed, *calls):
        assert row['card'] and row['torch'] and row['triton'] and row['softnce'] and row['date'].count('-') == 2
    assert {(r['stage'], r['outcome']) for r in calls} == {('tune', 'ok'), ('bench', 'ok')} and 'driver' in calls[0]
    command.main(arguments(tmp_path, 'tune', 'bench'))
    assert rows(tmp_path/'tuning.csv') == tuned and rows(tmp_path/'bench.csv') == timed
    assert 'in the ledger' in capsys.readouterr().out


def test_no_size_is_begun_when_the_time_is_over(command, tmp_path):
    command.main(arguments(tmp_path, 'bench', minutes=0))
    assert not (tmp_path/'bench.csv').exists()
    assert rows(tmp_path/'cards.csv')[0]['outcome'] == 'goes on in the next call'


def test_what_is_cut_off_goes_on_and_what_is_done_is_not_run_again(command, tmp_path):
    call = command.Call(command.parsed(arguments(tmp_path, 'train')))
    once = [sys.executable, '-c', f'open({str(tmp_path/"count")!r}, "a").write("x")']
    call.command('tests', 'quick', once)
    call.command('tests', 'quick', once)
    assert (tmp_path/'count').read_text() == 'x'
    call.command('tests', 'bad', [sys.executable, '-c', 'raise SystemExit(3)'])
    call.end = command.time.monotonic() + 6
    call.command('tests', 'slow', [sys.executable, '-c', 'import time; time.sleep(60)'])
    assert [r['outcome'] for r in rows(tmp_path/'cards.csv')] == ['ok', 'failed with 3', 'goes on in the next call']


def test_without_a_card_it_says_what_to_do(command, monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='--device cpu --toy'): command.main([])


@pytest.mark.slow
def test_kernels_and_trainings(command, tmp_path):
    "The two stages that start processes of their own."
    command.main(arguments(tmp_path, 'tests', 'train'))
    assert [(r['stage'], r['what'], r['outcome']) for r in rows(tmp_path/'cards.csv')] == [
        ('tests', 'kernels', 'ok'), ('train', 'steps of ViT-B/16', 'ok'), 
        ('train', 'digits, soft_target_info_nce', 'ok'), ('train', 'digits, nll', 'ok')]
    assert {r['part'] for r in rows(tmp_path/'throughput.csv')} == {'step', 'pipeline'}
    assert {r['loss'] for r in rows(tmp_path/'card_images.csv')} >= {'soft_target_info_nce', 'nll'}
