"What every rank of ranks.ipynb does: add up the ranks, and say where they are."
import os

import torch
import torch.distributed as dist


def total(fail):
    dist.init_process_group('gloo')
    rank, where = dist.get_rank(), [None]*dist.get_world_size()
    if rank == fail: raise RuntimeError(f'rank {rank} has no data')
    t = torch.tensor([rank])
    dist.all_reduce(t)
    dist.all_gather_object(where, os.environ['SLURMD_NODENAME'])
    dist.destroy_process_group()
    return t.item(), where
