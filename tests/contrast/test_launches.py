"Operations that a loss issues on a card, and the largest array of them: counted without a card (`count_launches`)."
import csv
import os

import pytest
import torch

pytest.importorskip('triton')
if torch.cuda.is_available(): pytest.skip('counts launches of the interpreter', allow_module_level=True)
os.environ['TRITON_INTERPRET'] = '1'

import count_launches as c

AT_1024_ROWS = 8  # at so few rows a launch takes longer than what it does
MORE = {  # why: on the page of the kernels
    ('in batch', 'one lambda smoothed', 1000): 9, ('in batch', 'one lambda', 100): 10, ('in batch', 'dense', 1000): 9,
    ('mean over the draw', 'one lambda', 1000): 13, ('drawn', 'one lambda', 1000): 14}


def test_operations_are_those_of_the_committed_table():
    with open(c.LEDGER, newline='', encoding='utf-8') as f: kept = list(csv.DictReader(f))
    assert [{k: str(v) for k, v in row.items()} for row in c.rows()] == kept


def test_no_loss_issues_more_than_it_may():
    for row in c.rows():
        allowed = MORE.get((row['loss'], row['targets'], row['classes']), AT_1024_ROWS)
        assert row['forward'] + row['backward'] <= allowed, row


@pytest.mark.parametrize('dtype', c.DTYPES.values())
@pytest.mark.parametrize('loss, targets, K', [case for case in c.CASES if case[:2] != ('cross-entropy', c.ids)])
def test_no_array_is_larger_than_the_logits(loss, targets, K, dtype):
    "So 16-bit logits are read, and their gradient is written, in 16 bits; and there is no array of rows x candidates."
    _, _, largest, logits = c.counted(loss, targets, 8192, K//2, dtype)
    block = 2**23 if (loss, targets) == ('in batch', c.dense) else 0  # of candidate scores between two products
    assert largest <= max(logits, block)


def test_a_launch_and_a_large_array_would_be_seen():
    with c.Counted() as seen: (torch.ones(4, 5, dtype=torch.bfloat16).float() + 1).t()
    assert seen.names == ['ones', '_to_copy', 'add'] and max(seen.sizes) == 80
