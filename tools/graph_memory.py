"""Time and peak memory of a training epoch of the 32-layer DeeperGCN on 84 full-size synthetic specimens; a row for results/graphs_memory.csv.

    python tools/graph_memory.py TISSUE                                  makes the specimens there first (minutes), then one epoch
    python tools/graph_memory.py TISSUE --batch-size 2 --steps 1         one step only
    python tools/graph_memory.py TISSUE --batch-size 2 --steps 1 --keep  the same without checkpointing
"""
import argparse, csv, platform, resource, time
from pathlib import Path

import torch
from common import ROOT
from softnce.graphs.augment import GraphBatches, augment
from softnce.graphs.models import DeeperGCN
from softnce.graphs.celltype import read_specimen
from softnce.losses import SoftTargetInfoNCE
from softnce.noise import empirical_noise
from softnce.graphs.tissue import make_tissue

CELLS = 250, 1900


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20  # GiB


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tissue")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--keep", action="store_true", help="no checkpointing")
    args = parser.parse_args()
    torch.set_num_threads(1); torch.manual_seed(0)
    graphs = [read_specimen(p, symmetric=True) for p in make_tissue(args.tissue, cells=CELLS)]
    model = DeeperGCN(depth=32, hidden=128, checkpointing=not args.keep)
    loss, optimizer = SoftTargetInfoNCE(noise_probs=empirical_noise(torch.cat([g.y for g in graphs]), 9)), torch.optim.AdamW(model.parameters())
    transform, order = augment(), torch.randperm(len(graphs)).tolist()
    before, start, cpu, steps, cells, edges = peak(), time.perf_counter(), time.process_time(), 0, 0, 0
    for at in range(0, len(graphs), args.batch_size):
        batch, targets = next(iter(GraphBatches([transform(graphs[i]) for i in order[at:at+args.batch_size]], args.batch_size, epsilon=.1)))
        optimizer.zero_grad()
        loss(model(batch), targets).backward()
        optimizer.step()
        steps, cells, edges = steps+1, cells+batch.num_nodes, edges+batch.num_edges
        print(f"step {steps}: {batch.num_nodes} cells, {batch.num_edges} directed edges, peak {peak():.2f} GiB, {time.perf_counter()-start:.0f} s", flush=True)
        if steps == args.steps: break
    row = dict(data="synthetic", depth=32, hidden=128, checkpointing=not args.keep, batch_size=args.batch_size, steps=steps, specimens=min(len(graphs), steps*args.batch_size), cells=cells,
               directed_edges=edges, seconds=round(time.perf_counter()-start), cpu_seconds=round(time.process_time()-cpu), peak_gib=round(peak(), 2), peak_before_gib=round(before, 2),
               threads=1, torch=torch.__version__, machine=platform.machine())
    path = ROOT/"results"/"graphs_memory.csv"
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as f:
        w = csv.DictWriter(f, row)
        if new: w.writeheader()
        w.writerow(row)
    print(row)


if __name__ == "__main__": main()
