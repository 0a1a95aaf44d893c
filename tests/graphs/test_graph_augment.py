"softnce.graphs.augment: what each transform may change, a rotation against a file, batches, resumption to the bit."
import numpy as np
import pytest
import torch
pytest.importorskip('h5py')
pytest.importorskip('torch_geometric')
from softnce.graphs.augment import (AddEdges, AddNoise, DropEdges, DropFeatures, GraphBatches, MaskColumns, RandomBasis,
                                    augment, random_rotation)
from softnce.graphs.celltype import CellTypeGraph, evaluate_graphs
from softnce.graphs.models import DeeperGCN
from softnce.graphs.specimen import EDGE_FEATURES, NODE_FEATURES, both_directions, columns, read_specimen
from softnce.graphs.tissue import make_specimen, write_specimen
from softnce.losses import NLL, SoftDistributionInfoNCE, SoftTargetInfoNCE
from softnce.noise import empirical_noise
from softnce.training import TrainConfig, fit


@pytest.fixture(scope='module')
def graph(tissue): return read_specimen(tissue[1][-1])


@pytest.mark.parametrize('symmetric', [False, True])
def test_edge_dropout_keeps_features_with_their_edges(graph, symmetric):
    g = both_directions(graph) if symmetric else graph
    kept = [DropEdges(.1)(g) for _ in range(60)]
    def with_features(d): return zip(d.edge_index.T.tolist(), d.edge_attr.tolist(), d.edge_y.tolist())
    known = {tuple(e): (a, s) for e, a, s in with_features(g)}
    for k in kept[:3]:
        assert all(known[tuple(e)] == (a, s) for e, a, s in with_features(k))
        assert k.is_undirected() == symmetric
    share = np.mean([1-k.num_edges/g.num_edges for k in kept])
    assert abs(share-.1) < 5*np.sqrt(.09/graph.num_edges/60)
    assert g.num_edges == graph.num_edges*(1+symmetric) # the graph itself is untouched


@pytest.mark.parametrize('symmetric', [False, True])
def test_added_edges_are_new_and_carry_features_of_edges(graph, symmetric):
    g = both_directions(graph) if symmetric else graph
    m = AddEdges(.1)(g)
    e, old = g.num_edges, {tuple(v) for v in g.edge_index.T.tolist()}
    new = [tuple(v) for v in m.edge_index[:, e:].T.tolist()]
    assert torch.equal(m.edge_index[:, :e], g.edge_index) and all(a != b for a, b in new)
    assert not old & set(new) and not {(b, a) for a, b in new} & old
    assert len(set(new)) == len(new) and .06*e < len(new) <= .1*e+1 and m.is_undirected() == symmetric
    rows = {tuple(a) for a in g.edge_attr.tolist()}
    assert all(tuple(a) in rows for a in m.edge_attr[e:].tolist())
    assert all(int(s) == int(g.y[a] == g.y[b]) for (a, b), s in zip(new, m.edge_y[e:]))


def test_feature_dropout_masking_and_noise(graph):
    zero = (graph.x == 0).float().mean()
    entries = torch.stack([DropFeatures(.1)(graph).x == 0 for _ in range(30)]).float().mean() - zero*.9
    assert abs(entries-.1) < .01
    masked = torch.stack([(MaskColumns(.1)(graph).x == 0).all(0) for _ in range(300)]).float().mean()
    assert abs(masked - .9*(graph.x == 0).all(0).float().mean() - .1) < 5*np.sqrt(.09/300/74)
    kept = (masked := MaskColumns(.5)(graph)).x != 0
    assert torch.equal(masked.x[kept], graph.x[kept])
    noise = [AddNoise(.1)(graph) for _ in range(5)]
    for k in ('x', 'edge_attr'): assert abs(torch.stack([n[k]-graph[k] for n in noise]).std()-.1) < .003
    assert all(torch.equal(n.y, graph.y) and torch.equal(n.edge_index, graph.edge_index) for n in noise)


def rotated_pair(tmp_path, seed):
    "One specimen in its reference system and in a rotated one, through generator and reader; and the rotation."
    R = random_rotation()
    for name, turn in (('a', None), ('b', R.numpy())):
        arrays = make_specimen(seed % 9, 70, np.random.default_rng(seed), axis_turn=turn)
        write_specimen(tmp_path/f'{name}.h5', *arrays)
    return read_specimen(tmp_path/'a.h5'), read_specimen(tmp_path/'b.h5'), R


@pytest.mark.parametrize('seed', range(3))
def test_a_rotated_basis_equals_a_file_written_in_it(tmp_path, seed):
    """All columns but those of two kinds: axis 2 is chosen between two directions by the first global axis, so that
    axes 2 and 3 may differ in the file; and lengths along them, which are then measured between other samples."""
    torch.manual_seed(seed)
    a, b, R = rotated_pair(tmp_path, seed)
    turned, at, of = RandomBasis(R)(a), columns(NODE_FEATURES), columns(EDGE_FEATURES)
    loose = ['lrs_orientation_axis2_grs', 'lrs_orientation_axis3_grs', 'length_axis2_grs', 'length_axis3_grs',
             'lrs_axis12_dot_grs']
    def same(name, x, y): torch.testing.assert_close(x, y, rtol=0, atol=2e-3, msg=lambda m: f'{name}: {m}')
    for name, c in at.items():
        if name not in loose: same(name, turned.x[:, c], b.x[:, c])
    for name in ('surface_um', 'com_distance_um', 'com_grs', 'lrs_dot_axis1_grs', 'lrs_proj_grs'):
        same(name, turned.edge_attr[:, of[name]], b.edge_attr[:, of[name]])
    second = at['lrs_orientation_axis2_grs'] # where the choice is the same, so is the column
    assert ((turned.x[:, second]-b.x[:, second]).abs().max(1).values < 2e-3).float().mean() > .5
    torch.testing.assert_close(turned.axis, b.axis)
    torch.testing.assert_close(turned.com_moments, b.com_moments, rtol=1e-4, atol=1e-3)
    assert (a.x[:, :3]-b.x[:, :3]).abs().max() > .3 and torch.equal(a.edge_index, b.edge_index)


def test_a_rotation_works_on_symmetric_graphs_and_is_undone_by_its_inverse(graph):
    R = random_rotation()
    e = graph.num_edges
    one, two = RandomBasis(R)(graph), RandomBasis(R)(both_directions(graph))
    for half in (two.edge_attr[:e], two.edge_attr[e:]): torch.testing.assert_close(half, one.edge_attr)
    torch.testing.assert_close(two.x, one.x)
    back = RandomBasis(R.T)(one)
    for k in ('x', 'edge_attr'): torch.testing.assert_close(back[k], graph[k], rtol=0, atol=1e-3)


def test_rotations_are_uniform():
    "Every entry has mean zero and variance 1/3, and no reflection is drawn."
    R = torch.stack([random_rotation() for _ in range(2000)])
    assert (torch.linalg.det(R) > 0).all() and R.mean(0).abs().max() < 5*(1/3/2000)**.5
    assert (R.square().mean(0)-1/3).abs().max() < .04


# ---- batches and training

@pytest.mark.filterwarnings('ignore:.*have no file')
def test_batches_carry_smoothed_targets(tissue):
    train = CellTypeGraph(tissue[0], 0)
    batch, targets = next(iter(GraphBatches(train, 3, train=True, epsilon=.1)))
    want = torch.full((batch.num_nodes, 9), .1/9); want[torch.arange(batch.num_nodes), batch.y] += .9
    torch.testing.assert_close(targets.dense(), want)
    batch, ids = next(iter(GraphBatches(train, 3)))
    assert torch.equal(ids, batch.y) and torch.equal(ids, torch.cat([train[i].y for i in range(3)]))
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append([b.stack for b, _ in GraphBatches(train, 3, train=True)])
    assert orders[0] == orders[1] != orders[2] and len(orders[0]) == 3


class Killed(Exception): pass


@pytest.mark.filterwarnings('ignore:.*have no file')
@pytest.mark.parametrize('name', ['hard', 'soft', 'drawn'])
def test_a_killed_training_ends_with_the_same_bits(tissue, tmp_path, name):
    symmetric, epsilon = name != 'hard', None if name == 'hard' else .1
    train = CellTypeGraph(tissue[0], 0, transform=augment(), symmetric=symmetric)
    valid = CellTypeGraph(tissue[0], 0, 'valid', symmetric=symmetric)
    def make_loss():
        eta, own = empirical_noise(train.labels, 9), torch.Generator().manual_seed(5)
        return dict(hard=NLL(), soft=SoftTargetInfoNCE(noise_probs=eta),
                    drawn=SoftDistributionInfoNCE(noise_probs=eta, generator=own))[name]
    def go(folder=None, on_epoch=None, seed=0):
        torch.manual_seed(0)
        model, loss = DeeperGCN(depth=3, hidden=8), make_loss()
        torch.manual_seed(seed)
        config = TrainConfig(epochs=3, epsilon=epsilon or 0., checkpoint_dir=folder)
        batches = GraphBatches(train, 3, train=True, epsilon=epsilon), GraphBatches(valid)
        return fit(model, loss, *batches, config, on_epoch, evaluate=evaluate_graphs), model
    def stop(row):
        if row['epoch'] == 2: raise Killed
    whole, model = go()
    with pytest.raises(Killed): go(tmp_path, stop)
    again, resumed = go(tmp_path, seed=3)
    assert again == whole and again['epoch'] == 3
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values()))
