"softnce.graphs.tissue, softnce.graphs.models, softnce.graphs.augment: the generator, the networks by hand, the augmentations, resumption to the bit."
import numpy as np, pytest, torch
h5py = pytest.importorskip('h5py')
pytest.importorskip('torch_geometric')
from graph_oracle import read
from softnce.graphs.celltype import EDGE_FEATURES, NODE_FEATURES, RAW, STAGES, CellTypeGraph, both_directions, columns, evaluate_graphs, evaluate_specimens, read_specimen
from softnce.graphs.augment import (AddEdges, AddNoise, DropEdges, DropFeatures, GraphBatches, MaskColumns, RandomBasis, augment, random_rotation)
from softnce.graphs.models import GCN, DeeperGCN
from softnce.losses import NLL, SoftDistributionInfoNCE, SoftTargetInfoNCE
from softnce.noise import empirical_noise
from softnce.graphs.tissue import contacts, growth_directions, make_specimen, make_tissue, random_walk_centrality, reference_system, write_specimen
from softnce.training import TrainConfig, fit
from torch_geometric.data import Batch


@pytest.fixture(scope='module')
def graph(tissue): return read_specimen(tissue[1][-1])


# ---- the generator

def test_files_have_the_benchmarks_keys_types_and_order(tissue):
    root, paths = tissue
    assert len(paths) == 18 and {p.parent.name for p in paths} == set(STAGES) and (root/'SYNTHETIC.txt').read_text().startswith('Synthetic')
    for path in paths[::5]:
        with h5py.File(path) as f:
            ids, pairs = f['cell_ids'][()], f['edges_ids'][()]
            assert ids.dtype == np.uint32 and (np.diff(ids.astype(int)) > 0).all() and pairs.dtype == np.int32
            assert (pairs[:, 0] < pairs[:, 1]).all() and len(np.unique(pairs, axis=0)) == len(pairs) and set(pairs.ravel()) == {0, *ids}
            assert set(f['cell_labels'][()]) <= {1, 2, 3, 4, 5, 6, 7, 8, 10, 14} and f.attrs['synthetic'] and f['cell_samples/hollow_fps_samples_grs'].shape[::2] == (len(ids), 3)
            axis = f.attrs['global_reference_system_axis']
            np.testing.assert_allclose(axis @ axis.T, np.eye(3), atol=1e-12)
            assert np.linalg.det(axis) > 0
            label = dict(zip(ids, f['cell_labels'][()])) | {0: 0}
            np.testing.assert_array_equal(f['edges_labels'][()], [label[a] == label[b] for a, b in pairs])
            np.testing.assert_array_equal(f['cell_features/lrs_proj_axis3_grs'][()], f['cell_features/lrs_proj_axis1_grs'][()])


def test_specimens_depend_on_the_seed_and_not_on_the_others(tissue, tmp_path):
    root, paths = tissue
    for path, p in zip(make_tissue(tmp_path, per_stage=1, cells=(50, 90), seed=1)[:3], STAGES):
        a, b = (read_specimen(q) for q in (path, root/path.relative_to(tmp_path)))
        assert torch.equal(a.x, b.x) and torch.equal(a.edge_attr, b.edge_attr) and path.parent.name == p
    other = make_tissue(tmp_path/'other', per_stage=1, cells=(50, 90), seed=2)[0]
    assert read_specimen(other).x.shape != a.x.shape or not torch.equal(read_specimen(other).x, a.x)


def test_five_specimens_a_stage_are_one_of_each_fold():
    from softnce.graphs import tissue
    made = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tissue, 'make_specimen', lambda *a, **kw: (None, None)); m.setattr(tissue, 'write_specimen', lambda path, *a: made.append(path))
        import tempfile
        with tempfile.TemporaryDirectory() as tmp: make_tissue(tmp, per_stage=5)
    from graph_oracle import VALID
    assert len(made) == 45
    for valid in VALID: assert sorted(p.parent.name for p in made if f'{p.parent.name}_{p.stem}' in valid) == sorted(STAGES)


@pytest.mark.parametrize('stage', [0, 4, 8])
def test_the_smallest_specimens_have_every_part_a_reader_needs(tmp_path, stage):
    "Also where hardly a point of the cloud falls into the embryo sac."
    for seed in range(4):
        write_specimen(tmp_path/f'{seed}.h5', *make_specimen(stage, 20, np.random.default_rng([1, stage, seed])))
        data = read_specimen(tmp_path/f'{seed}.h5')
        assert (data.y == 7).sum() == 1 and data.num_nodes > 9 and (data.y == 6).any()


def test_contacts_by_brute_force():
    rng = np.random.default_rng(0)
    volume = np.zeros((5, 6, 7), int); volume[1:4, 1:5, 1:6] = rng.integers(0, 4, (3, 4, 5))
    count, place = {}, {}
    for at in np.ndindex(volume.shape):
        for k in range(3):
            to = list(at); to[k] += 1
            if to[k] == volume.shape[k] or volume[at] == volume[tuple(to)]: continue
            key = tuple(sorted((volume[at], volume[tuple(to)])))
            count[key] = count.get(key, 0)+1; place[key] = place.get(key, 0) + (np.array(at)+to)/2
    pairs, of, points = contacts(volume, np.ones(3))
    assert [tuple(p) for p in pairs] == sorted(count) and np.bincount(of).tolist() == [count[k] for k in sorted(count)]
    for e, key in enumerate(sorted(count)): np.testing.assert_allclose(points[of == e].mean(0), place[key]/count[key])


def test_random_walk_centrality_is_networkxs():
    networkx = pytest.importorskip('networkx')
    for seed in range(4):
        g = networkx.connected_watts_strogatz_graph(15, 4, .4, seed=seed)
        want = networkx.current_flow_betweenness_centrality(g)
        np.testing.assert_allclose(random_walk_centrality(np.array(g.edges), 15), [want[i] for i in range(15)], atol=1e-12)


def test_a_dome_above_a_stalk_gives_its_reference_system():
    "Stalk at the origin, L1 around (0, 0, 10), layers and nucellus on the z axis: axis 1 points down, axis 2 is perpendicular, the system right-handed."
    com = np.array([[-3., 0, 0], [-3.2, 0, .4], [1, 0, 10], [-1, 0, 10], [0, 0, 8], [0, 0, 11], [0, 0, 14]])
    origin, axis = reference_system(com, np.array([7, 7, 1, 1, 2, 3, 5]))
    np.testing.assert_allclose(origin, [0, 0, 10])
    np.testing.assert_allclose(axis[0], [0, 0, -1], atol=1e-12)
    np.testing.assert_allclose(axis[1], [1, 0, 0], atol=1e-2)
    np.testing.assert_allclose(np.cross(axis[0], axis[1]), axis[2], atol=1e-12)


def test_growth_direction_is_the_most_opposite_pair():
    com = np.array([[0., 0, 0], [1, 0, 0], [-1, .2, 0], [0, 1, 0], [0, -3, 0]])
    axis, cosine = growth_directions(com, np.array([1, 1, 1, 1, 2]), [[1, 2, 3, 4]] + [[0]]*4)
    np.testing.assert_allclose(axis[0], [1, 0, 0]); np.testing.assert_allclose(cosine[0], -1/np.sqrt(1.04))
    np.testing.assert_allclose(axis[1], [1, 0, 0]); assert cosine[1] == 1


@pytest.mark.parametrize('kw', [dict(cells=(10, 50)), dict(cells=(90, 60)), dict(per_stage=0)])
def test_the_generators_arguments_are_checked(tmp_path, kw):
    with pytest.raises(ValueError, match=f"{list(kw)[0]} must be"): make_tissue(tmp_path, **kw)


# ---- the networks

def test_a_deeper_gcn_layer_by_hand(graph):
    "Two layers, evaluated node by node from the formulas."
    torch.manual_seed(1)
    model = DeeperGCN(depth=2, hidden=8).double().eval()
    model.layers[0].conv.aggr_module.t.data.fill_(.7); model.layers[1].conv.aggr_module.t.data.fill_(2.)
    g = both_directions(graph).clone(); g.x, g.edge_attr = g.x.double(), g.edge_attr.double()
    def conv(layer, x, e):
        total = torch.zeros_like(x)
        for i in range(len(x)):
            into = (g.edge_index[1] == i).nonzero().flatten()
            m = (x[g.edge_index[0, into]] + e[into]).relu() + 1e-7
            total[i] = ((layer.conv.aggr_module.t*m).softmax(0)*m).sum(0)
        return layer.conv.mlp(x + total)
    x, e = model.nodes(g.x), model.edges(g.edge_attr)
    x = conv(model.layers[0], x, e)
    x = x + conv(model.layers[1], model.layers[1].norm(x).relu(), e)
    torch.testing.assert_close(model(g), model.head(model.layers[0].norm(x).relu()), rtol=0, atol=1e-9)


def test_depth_temperatures_and_edge_features_are_used(graph):
    model = DeeperGCN(depth=32, hidden=8)
    model(graph).square().sum().backward()
    assert len(model.layers) == 32 and all(l.conv.aggr_module.t.grad.abs() > 0 for l in model.layers)
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n != 'layers.0.norm.weight')
    assert model.edges.weight.grad.abs().sum() > 0


def test_checkpointing_changes_nothing_but_memory(graph):
    out = []
    for checkpointing in (True, False):
        torch.manual_seed(0)
        model = DeeperGCN(depth=5, hidden=8, checkpointing=checkpointing, dropout=.3)
        value = model(graph); value.square().mean().backward()
        out.append([value, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*out))


@pytest.mark.parametrize('model', [GCN, lambda: DeeperGCN(depth=3, hidden=8)])
def test_graphs_of_a_batch_do_not_see_each_other(tissue, model):
    graphs = [read_specimen(p) for p in tissue[1][:3]]
    torch.manual_seed(0)
    m = model().eval()
    torch.testing.assert_close(m(Batch.from_data_list(graphs)), torch.cat([m(g) for g in graphs]), rtol=1e-4, atol=1e-5)


# ---- the augmentations

@pytest.mark.parametrize('symmetric', [False, True])
def test_edge_dropout_keeps_features_with_their_edges(graph, symmetric):
    g = both_directions(graph) if symmetric else graph
    kept = [DropEdges(.1)(g) for _ in range(60)]
    known = {tuple(e): (a.tolist(), int(s)) for e, a, s in zip(g.edge_index.T.tolist(), g.edge_attr, g.edge_y)}
    for k in kept[:3]:
        assert all(known[tuple(e)] == (a.tolist(), int(s)) for e, a, s in zip(k.edge_index.T.tolist(), k.edge_attr, k.edge_y))
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
    assert torch.equal(m.edge_index[:, :e], g.edge_index) and not old & set(new) and not {(b, a) for a, b in new} & old and all(a != b for a, b in new)
    assert len(set(new)) == len(new) and .06*e < len(new) <= .1*e+1 and m.is_undirected() == symmetric
    rows = {tuple(a) for a in g.edge_attr.tolist()}
    assert all(tuple(a) in rows for a in m.edge_attr[e:].tolist())
    assert all(int(s) == int(g.y[a] == g.y[b]) for (a, b), s in zip(new, m.edge_y[e:]))


def test_feature_dropout_masking_and_noise(graph):
    entries = torch.stack([DropFeatures(.1)(graph).x == 0 for _ in range(30)]).float().mean() - (graph.x == 0).float().mean()*.9
    assert abs(entries-.1) < .01
    columns = torch.stack([(MaskColumns(.1)(graph).x == 0).all(0) for _ in range(300)]).float().mean() - .9*(graph.x == 0).all(0).float().mean()
    assert abs(columns-.1) < 5*np.sqrt(.09/300/74)
    kept = (masked := MaskColumns(.5)(graph)).x != 0
    assert torch.equal(masked.x[kept], graph.x[kept])
    noise = [AddNoise(.1)(graph) for _ in range(5)]
    for k in ('x', 'edge_attr'): assert abs(torch.stack([n[k]-graph[k] for n in noise]).std()-.1) < .003
    assert all(torch.equal(n.y, graph.y) and torch.equal(n.edge_index, graph.edge_index) for n in noise)


def rotated_pair(tmp_path, seed, fix=True):
    "The same specimen in its reference system and in a rotated one, through the whole generator and reader; and the rotation."
    R = random_rotation()
    for name, turn in (('a', None), ('b', R.numpy())):
        write_specimen(tmp_path/f'{name}.h5', *make_specimen(seed % 9, 70, np.random.default_rng(seed), axis_turn=turn))
    return read_specimen(tmp_path/'a.h5'), read_specimen(tmp_path/'b.h5'), R


@pytest.mark.parametrize('seed', range(3))
def test_a_rotated_basis_equals_a_file_written_in_it(tmp_path, seed):
    """All columns but those of two kinds: axis 2 is chosen between two directions by the first global axis, so that axes 2 and 3 may differ in the file;
    and lengths along them, which are then measured between other samples."""
    torch.manual_seed(seed)
    a, b, R = rotated_pair(tmp_path, seed)
    turned, at, of = RandomBasis(R)(a), columns(NODE_FEATURES), columns(EDGE_FEATURES)
    loose = [n for n in at if 'lrs_orientation_axis2' in n or 'lrs_orientation_axis3' in n or n in ('length_axis2_grs', 'length_axis3_grs', 'lrs_axis12_dot_grs')]
    for name, c in at.items():
        if name not in loose: torch.testing.assert_close(turned.x[:, c], b.x[:, c], rtol=0, atol=2e-3, msg=lambda m: f'{name}: {m}')
    for name in ('surface_um', 'com_distance_um', 'com_grs', 'lrs_dot_axis1_grs', 'lrs_proj_grs'):
        torch.testing.assert_close(turned.edge_attr[:, of[name]], b.edge_attr[:, of[name]], rtol=0, atol=2e-3, msg=lambda m: f'{name}: {m}')
    axes = torch.cat([turned.x[:, at['lrs_orientation_axis2_grs']], b.x[:, at['lrs_orientation_axis2_grs']]], 1)
    assert ((axes[:, :6]-axes[:, 6:]).abs().max(1).values < 2e-3).float().mean() > .5 # where the choice is the same, so is the column
    torch.testing.assert_close(turned.axis, b.axis); torch.testing.assert_close(turned.com_moments, b.com_moments, rtol=1e-4, atol=1e-3)
    assert (a.x[:, :3]-b.x[:, :3]).abs().max() > .3 and torch.equal(a.edge_index, b.edge_index)


def test_a_rotation_works_on_symmetric_graphs_and_is_undone_by_its_inverse(graph):
    R = random_rotation()
    e = graph.num_edges
    one, two = RandomBasis(R)(graph), RandomBasis(R)(both_directions(graph))
    torch.testing.assert_close(two.edge_attr[:e], one.edge_attr); torch.testing.assert_close(two.edge_attr[e:], one.edge_attr); torch.testing.assert_close(two.x, one.x)
    back = RandomBasis(R.T)(one)
    torch.testing.assert_close(back.x, graph.x, rtol=0, atol=1e-3); torch.testing.assert_close(back.edge_attr, graph.edge_attr, rtol=0, atol=1e-3)


def test_rotations_are_uniform():
    "Every entry has mean zero and variance 1/3, and no reflection is drawn."
    R = torch.stack([random_rotation() for _ in range(2000)])
    assert (torch.linalg.det(R) > 0).all() and R.mean(0).abs().max() < 5*(1/3/2000)**.5 and (R.square().mean(0)-1/3).abs().max() < .04


# ---- batches, evaluation and training

@pytest.mark.filterwarnings('ignore:.*have no file')
def test_batches_carry_smoothed_targets(tissue):
    train = CellTypeGraph(tissue[0], 0)
    batch, targets = next(iter(GraphBatches(train, 3, train=True, epsilon=.1)))
    want = torch.full((batch.num_nodes, 9), .1/9); want[torch.arange(batch.num_nodes), batch.y] += .9
    torch.testing.assert_close(targets.dense(), want)
    batch, ids = next(iter(GraphBatches(train, 3)))
    assert torch.equal(ids, batch.y) and torch.equal(ids, torch.cat([train[i].y for i in range(3)]))
    orders = []
    for seed in (0, 0, 1): torch.manual_seed(seed); orders.append([b.stack for b, _ in GraphBatches(train, 3, train=True)])
    assert orders[0] == orders[1] != orders[2] and len(orders[0]) == 3


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_evaluation_is_per_specimen_with_the_losss_read_out(tissue):
    from graph_oracle import accuracies
    valid = CellTypeGraph(tissue[0], 0, 'valid')
    torch.manual_seed(0)
    model, eta = DeeperGCN(depth=2, hidden=8), empirical_noise(torch.arange(9).repeat_interleave(torch.arange(1, 10)), 9)
    loss, config = SoftTargetInfoNCE(noise_probs=eta), TrainConfig(epochs=2, epsilon=.4)
    model.head.weight.data *= 3
    rows, mean = evaluate_specimens(model, loss, GraphBatches(valid, 4), config), evaluate_graphs(model, loss, GraphBatches(valid, 4), config)
    assert len(rows) == len(valid) and model.training
    model.eval(); total = differ = 0
    for g, row in zip(valid, rows):
        s = model(g).double()-eta.double().log()
        right, naive = (.6*s+eta.double().log()).argmax(1), model(g).argmax(1)
        want = accuracies(right.tolist(), g.y.tolist()) | {f'{k}_naive': v for k, v in accuracies(naive.tolist(), g.y.tolist()).items()}
        assert {k: row[k] for k in want} == pytest.approx(want, abs=1e-9) and (row['stage'], row['stack'], row['cells']) == (g.stage, g.stack, g.num_nodes)
        differ += (right != naive).sum().item()
        total -= model(g).double().log_softmax(1).gather(1, g.y[:, None]).sum().item()
    assert mean['nll'] == pytest.approx(total/len(valid.labels), rel=1e-5) and mean['class_average'] == pytest.approx(np.mean([r['class_average'] for r in rows]))
    assert differ > 0


class Killed(Exception): pass


@pytest.mark.filterwarnings('ignore:.*have no file')
@pytest.mark.parametrize('name', ['hard', 'soft', 'drawn'])
def test_a_killed_training_ends_with_the_same_bits(tissue, tmp_path, name):
    train, valid = CellTypeGraph(tissue[0], 0, transform=augment(), symmetric=name != 'hard'), CellTypeGraph(tissue[0], 0, 'valid', symmetric=name != 'hard')
    def go(folder=None, on_epoch=None, seed=0):
        torch.manual_seed(0)
        eta, own = empirical_noise(train.labels, 9), torch.Generator().manual_seed(5)
        model, loss = DeeperGCN(depth=3, hidden=8), dict(hard=NLL(), soft=SoftTargetInfoNCE(noise_probs=eta), drawn=SoftDistributionInfoNCE(noise_probs=eta, generator=own))[name]
        torch.manual_seed(seed)
        epsilon = None if name == 'hard' else .1
        config = TrainConfig(epochs=3, epsilon=epsilon or 0., checkpoint_dir=folder)
        return fit(model, loss, GraphBatches(train, 3, train=True, epsilon=epsilon), GraphBatches(valid), config, on_epoch, evaluate=evaluate_graphs), model
    def stop(row):
        if row['epoch'] == 2: raise Killed
    whole, model = go()
    with pytest.raises(Killed): go(tmp_path, stop)
    again, resumed = go(tmp_path, seed=3)
    assert again == whole and again['epoch'] == 3
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values()))
