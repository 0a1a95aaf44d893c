"""The benchmark's format, read and written literally: file to tensors feature by feature, folds as lists, evaluation by
loops. Shares no line with the package."""
import h5py
import numpy as np
import torch

FIELDS = 'x edge_attr edge_index y edge_y origin axis'.split()

# name, columns in the file, letters of what is done with them: Z z-score, U unit rows, A absolute value, H one-hot
NODES = """com_grs 3 Z
lrs_orientation_axis1_grs 6 U
lrs_orientation_axis2_grs 6 U
lrs_orientation_axis3_grs 6 U
pca_orientation_axis1_grs 6 U
pca_orientation_axis2_grs 6 U
pca_orientation_axis3_grs 6 U
degree_centrality 1 Z
rw_centrality 1 Z
hops_to_bg 1 H
volume_um 1 Z
surface_um 1 Z
length_axis1_grs 1 Z
length_axis2_grs 1 Z
length_axis3_grs 1 Z
lrs_axis12_dot_grs 1 A
lrs_axis2_angle_grs 1 A
lrs_proj_axis1_grs 3 A
lrs_proj_axis2_grs 3 A
lrs_proj_axis3_grs 3 A
pca_proj_axis1_grs 3 A
pca_proj_axis2_grs 3 A
pca_proj_axis3_grs 3 A
pca_explained_variance_grs 3 Z"""
EDGES = """surface_um 1 Z
com_distance_um 1 Z
com_grs 3 Z
lrs_dot_axis1_grs 1 AZ
lrs_dot_axis2_grs 1 AZ
lrs_dot_axis3_grs 1 AZ
lrs_proj_grs 3 AZ"""


def transform(letter, a):
    if letter == 'Z': return (a - np.mean(a)) / (np.std(a) + 1e-16)
    if letter == 'U': return a / (np.linalg.norm(a, axis=-1, keepdims=True) + 1e-16)
    if letter == 'A': return np.abs(a)
    assert a.dtype.kind in 'iu'
    out = np.zeros((len(a), 5))
    for row, v in enumerate(a): out[row, min(int(v) - int(a.min()), 4)] = 1
    return out


def block(group, table):
    parts = []
    for line in table.splitlines():
        name, _, letters = line.split()
        a = group[name][()]
        for letter in letters: a = transform(letter, a)
        if a.ndim == 1: a = a[:, np.newaxis]
        parts.append(torch.tensor(a, dtype=torch.float32))
    return torch.cat(parts, dim=1)


def read(path):
    "x, edge_attr, edge_index, y, edge_y, origin, axis."
    to_class = {1: 0, 2: 1, 3: 2, 4: 3, 14: 3, 5: 4, 6: 5, 7: 6, 8: 7, 10: 8}
    with h5py.File(path, 'r') as f:
        x, edge_attr = block(f['cell_features'], NODES), block(f['edges_features'], EDGES)
        where = {int(c): i for i, c in enumerate(f['cell_ids'][()])}
        kept, index, same = [], [], []
        for n, ((a, b), s) in enumerate(zip(f['edges_ids'][()], f['edges_labels'][()])):
            if a == 0 or b == 0: continue
            kept.append(n); index.append([where[int(a)], where[int(b)]]); same.append(int(s))
        y = torch.tensor([to_class[int(r)] for r in f['cell_labels'][()]], dtype=torch.int64)
        origin = np.asarray(f.attrs.get('global_reference_system_origin', np.zeros(3)))
        axis = np.asarray(f.attrs.get('global_reference_system_axis', np.eye(3)))
    return dict(x=x, edge_attr=edge_attr[kept], edge_index=torch.tensor(index, dtype=torch.int64).T, y=y,
                edge_y=torch.tensor(same, dtype=torch.int64), origin=torch.tensor(origin), axis=torch.tensor(axis))


def random_features(table, rows, rng, dtype):
    "name -> array; every fourth one is float64 whatever `dtype` says."
    for i, line in enumerate(table.splitlines()):
        name, width, letters = line.split()
        scale, shift = 10**rng.uniform(-3, 4), rng.normal()*10**rng.uniform(-1, 3)
        a = (rng.normal(size=(rows, int(width)))*scale + shift).astype(np.float64 if i % 4 == 3 else dtype)
        if letters == 'H': a = rng.integers(1, 9, (rows, 1)).astype(np.int32)
        yield name, a[:, 0] if width == '1' else a


def write_random_specimen(path, seed, n=40, ids=None, dtype=np.float32, attributes=True, more_pairs=3):
    """A file in the benchmark's format with random numbers in place of features: a connected graph, background edges,
    gaps in the ids."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(np.arange(1, 1500), n, replace=False)) if ids is None else ids
    pairs = {(ids[i], ids[rng.integers(i)]) for i in range(1, n)} | {(0, i) for i in ids[::3]}
    pairs |= {tuple(rng.choice(ids, 2, replace=False)) for _ in range(more_pairs*n)}
    pairs = np.array(sorted({(min(p), max(p)) for p in pairs}))
    pairs = pairs[rng.permutation(len(pairs))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, 'w') as f:
        f['cell_ids'], f['edges_ids'] = ids.astype(np.uint32), pairs.astype(np.int32)
        f['cell_labels'] = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 10, 14], n).astype(np.uint32)
        f['edges_labels'] = rng.integers(0, 2, len(pairs)).astype(np.int32)
        for group, table, rows in (('cell_features', NODES, n), ('edges_features', EDGES, len(pairs))):
            for name, a in random_features(table, rows, rng, dtype):
                f.create_dataset(f'{group}/{name}', data=a, compression='gzip')
        f['cell_samples/hollow_fps_samples_grs'] = rng.normal(size=(n, 5, 3))
        if attributes:
            f.attrs['global_reference_system_origin'] = rng.normal(size=3)
            f.attrs['global_reference_system_axis'] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return path


VALID = [fold.split() for fold in (
    """2-III_406 2-III_603_C 2-IV_473_C_2-IV 2-IV_405_B 2-V_424_B 2-V_490_B 3-I_608 3-I_440 3-II_434 3-II_526
    3-III_430 3-III_614 3-IV_539 3-IV_512 3-V_612 3-V_525 3-VI_559 3-VI_755""",
    """2-III_416_B 2-III_801_F 2-IV_405_A 2-IV_449 2-V_467 2-V_490_C 3-I_439 3-I_515 3-II_507_B 3-II_527
    3-III_495_B 3-III_616 3-IV_494 3-IV_514 3-V_492 3-V_540 3-VI_751 3-VI_756""",
    """2-III_294_E 2-III_474_B 2-IV_404 2-V_422 2-V_472_B 3-I_617_B 3-I_606 3-II_412 3-II_509
    3-III_429 3-III_528 3-IV_610 3-IV_520 3-V_613 3-V_542 3-VI_557 3-VI_753""",
    """2-III_603_A 2-III_416_A 2-IV_462 2-V_472_C 2-V_425 3-I_451 3-I_407_A 3-II_522 3-II_486_A
    3-III_611 3-III_495_A 3-IV_513_A 3-IV_410 3-V_535 3-V_464 3-VI_754 3-VI_561""",
    """2-III_294_D 2-III_473_A 2-IV_450 2-V_419 2-V_472_A 3-I_543 3-II_403 3-II_508
    3-III_428 3-III_507_A 3-IV_517 3-V_541 3-VI_555 3-VI_752""")]
SIMPLE = dict(
    valid='2-III_603_A 2-IV_462 2-V_472_C 3-I_451 3-II_522 3-III_611 3-IV_513_A 3-V_535 3-VI_754'.split(),
    test="""2-III_416_A 2-III_294_D 2-III_473_A 2-IV_450 2-V_425 2-V_419 2-V_472_A 3-I_407_A 3-I_543 3-II_486_A 3-II_403
    3-II_508 3-III_495_A 3-III_428 3-III_507_A 3-IV_410 3-IV_517 3-V_464 3-V_541 3-VI_561 3-VI_555 3-VI_752""".split())


def accuracies(predicted, labels):
    "top-1, class average as in torchmetrics 0.9 (absent but predicted counts as zero), class average of the recall."
    per, recall = [], []
    for k in range(9):
        cells = [p for p, t in zip(predicted, labels) if t == k]
        if k == 7 or (not cells and k not in predicted): continue
        per.append(sum(p == k for p in cells)/len(cells) if cells else 0.)
        if cells: recall.append(per[-1])
    mean = lambda v: sum(v)/len(v) if v else float('nan')
    top1 = mean([p == t for p, t in zip(predicted, labels)])
    return dict(top1=top1, class_average=mean(per), class_average_recall=mean(recall))
