"""Time and peak memory of an epoch of the 32-layer DeeperGCN on 84 full-size synthetic specimens.

Writes a row of results/graphs_memory.csv.

    python tools/graph_memory.py TISSUE                                  one epoch; makes the specimens first (minutes)
    python tools/graph_memory.py TISSUE --batch-size 2 --steps 1         one step only
    python tools/graph_memory.py TISSUE --batch-size 2 --steps 1 --keep  the same without checkpointing
"""
import argparse, csv, platform, resource, time

import torch
from common import ROOT
from softnce.graphs import DeeperGCN, GraphBatches, make_tissue, read_specimen
from softnce.graphs.augment import augment
from softnce.losses import SoftTargetInfoNCE
from softnce.noise import empirical_noise

CELLS = 250, 1900  # fewest and most of a full-size specimen
DEPTH, HIDDEN, CLASSES, EPSILON = 32, 128, 9, .1  # what is measured


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20  # GiB


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tissue")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, help="stop after so many; an epoch without it")
    parser.add_argument("--keep", action="store_true", help="no checkpointing")
    return parser.parse_args()


def batches(graphs, size):
    "An epoch of augmented graphs in random order, with smoothed targets."
    transform, order = augment(), torch.randperm(len(graphs)).tolist()
    for at in range(0, len(graphs), size):
        views = [transform(graphs[i]) for i in order[at:at+size]]
        yield next(iter(GraphBatches(views, size, epsilon=EPSILON)))


def train(graphs, batch_size, steps, checkpointing):
    "Counts of an epoch, or of its first `steps` steps, with time and memory; a line a step."
    model = DeeperGCN(depth=DEPTH, hidden=HIDDEN, checkpointing=checkpointing)
    loss = SoftTargetInfoNCE(noise_probs=empirical_noise(torch.cat([g.y for g in graphs]), CLASSES))
    optimizer = torch.optim.AdamW(model.parameters())
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    step, cells, edges = 0, 0, 0
    for step, (batch, targets) in enumerate(batches(graphs, batch_size), 1):
        optimizer.zero_grad()
        loss(model(batch), targets).backward()
        optimizer.step()
        cells, edges = cells+batch.num_nodes, edges+batch.num_edges
        print(f"step {step}: {batch.num_nodes} cells, {batch.num_edges} directed edges, peak {peak():.2f} GiB, "
              f"{time.perf_counter()-start:.0f} s", flush=True)
        if step == steps: break
    return dict(steps=step, specimens=min(len(graphs), step*batch_size), cells=cells, directed_edges=edges,
                seconds=round(time.perf_counter()-start), cpu_seconds=round(time.process_time()-cpu),
                peak_gib=round(peak(), 2), peak_before_gib=round(before, 2))


def append(row, path):
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, row)
        if new: writer.writeheader()
        writer.writerow(row)


def main():
    args = arguments()
    torch.set_num_threads(1)  # so that machines with other numbers of cores compare
    torch.manual_seed(0)
    graphs = [read_specimen(p, symmetric=True) for p in make_tissue(args.tissue, cells=CELLS)]
    counts = train(graphs, args.batch_size, args.steps, not args.keep)
    row = dict(data="synthetic", depth=DEPTH, hidden=HIDDEN, checkpointing=not args.keep, batch_size=args.batch_size,
               **counts, threads=1, torch=torch.__version__, machine=platform.machine())
    append(row, ROOT/"results"/"graphs_memory.csv")
    print(row)


if __name__ == "__main__": main()
