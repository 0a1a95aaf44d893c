"Worker processes that are started once, and form a gloo group of any size up to theirs for one task after the other."
import datetime
import multiprocessing
import os
import tempfile
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait


def in_group(task, rank, size, store, timeout, args):
    "In a worker: the task, between the start and the end of its process group."
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=size,
                            timeout=datetime.timedelta(seconds=timeout))
    dist.barrier()  # gloo: a rank that leaves while another still connects makes that one wait until the timeout
    try: return task(rank, *args)
    finally: dist.destroy_process_group()  # also where the task raised: the others' collectives then fail too


def ready(task):
    "In a worker: what the task needs is imported, that of its module by unpickling it."
    import torch  # noqa: F401


class Pool:
    "`size` ranks. What a task raises on any of them is raised here; ranks that do not come back are replaced."
    def __init__(self, size):
        self.workers = [ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) for _ in range(size)]
        self.pids = [pid.result() for pid in [w.submit(os.getpid) for w in self.workers]]

    def run(self, size, task, *args, timeout=60):
        "`[task(rank, *args) for each rank]` in a group of `size`; the task is a function of a module."
        for r in [w.submit(ready, task) for w in self.workers[:size]]: r.result(120)  # no part of the timeout
        with tempfile.TemporaryDirectory() as folder:
            ranks = [w.submit(in_group, task, r, size, f'{folder}/store', timeout, args)
                     for r, w in enumerate(self.workers[:size])]
            late = wait(ranks, timeout=2*timeout).not_done  # a collective call gives up after one timeout
            if late: self.kill()
            errors = [e for e in (r.exception() for r in ranks) if e is not None]
        if any(isinstance(e, BrokenExecutor) for e in errors): self.__init__(len(self.workers))
        # the cause, rather than what it did to the others
        if errors: raise next((e for e in errors if 'gloo' not in str(e)), errors[0])
        return [r.result() for r in ranks]

    def kill(self):
        for child in multiprocessing.active_children():
            if child.pid in self.pids: child.kill()

    def close(self):
        self.kill()  # they hold nothing
        for w in self.workers: w.shutdown()
