"softnce.graphs.tissue: the files of the generator, its geometry by brute force, its arguments."
import tempfile

import numpy as np
import pytest
import torch
h5py = pytest.importorskip('h5py')
pytest.importorskip('torch_geometric')
from graph_oracle import VALID
from softnce.graphs import tissue as module
from softnce.graphs.celltype import STAGES
from softnce.graphs.specimen import read_specimen
from softnce.graphs.tissue import (contacts, growth_directions, make_specimen, make_tissue, random_walk_centrality,
                                   reference_system, write_specimen)


def test_files_have_the_benchmarks_keys_types_and_order(tissue):
    root, paths = tissue
    assert len(paths) == 18 and {p.parent.name for p in paths} == set(STAGES)
    assert (root/'SYNTHETIC.txt').read_text().startswith('Synthetic')
    for path in paths[::5]:
        with h5py.File(path) as f:
            ids, pairs, labels = f['cell_ids'][()], f['edges_ids'][()], f['cell_labels'][()]
            assert ids.dtype == np.uint32 and (np.diff(ids.astype(int)) > 0).all() and pairs.dtype == np.int32
            assert (pairs[:, 0] < pairs[:, 1]).all() and len(np.unique(pairs, axis=0)) == len(pairs)
            assert set(pairs.ravel()) == {0, *ids} and set(labels) <= {1, 2, 3, 4, 5, 6, 7, 8, 10, 14}
            assert f.attrs['synthetic'] and f['cell_samples/hollow_fps_samples_grs'].shape[::2] == (len(ids), 3)
            axis = f.attrs['global_reference_system_axis']
            np.testing.assert_allclose(axis @ axis.T, np.eye(3), atol=1e-12)
            assert np.linalg.det(axis) > 0
            label = dict(zip(ids, labels)) | {0: 0}
            np.testing.assert_array_equal(f['edges_labels'][()], [label[a] == label[b] for a, b in pairs])
            first, third = (f[f'cell_features/lrs_proj_axis{k}_grs'][()] for k in (1, 3))
            np.testing.assert_array_equal(third, first)


def test_specimens_depend_on_the_seed_and_not_on_the_others(tissue, tmp_path):
    root, paths = tissue
    for path, p in zip(make_tissue(tmp_path, per_stage=1, cells=(50, 90), seed=1)[:3], STAGES):
        a, b = (read_specimen(q) for q in (path, root/path.relative_to(tmp_path)))
        assert torch.equal(a.x, b.x) and torch.equal(a.edge_attr, b.edge_attr) and path.parent.name == p
    other = make_tissue(tmp_path/'other', per_stage=1, cells=(50, 90), seed=2)[0]
    assert read_specimen(other).x.shape != a.x.shape or not torch.equal(read_specimen(other).x, a.x)


def test_five_specimens_a_stage_are_one_of_each_fold():
    made = []
    with pytest.MonkeyPatch.context() as m, tempfile.TemporaryDirectory() as tmp:
        m.setattr(module, 'make_specimen', lambda *a, **kw: (None, None))
        m.setattr(module, 'write_specimen', lambda path, *a: made.append(path))
        make_tissue(tmp, per_stage=5)
    assert len(made) == 45
    for valid in VALID:
        assert sorted(p.parent.name for p in made if f'{p.parent.name}_{p.stem}' in valid) == sorted(STAGES)


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
    pairs, of, points = contacts(volume)
    assert [tuple(p) for p in pairs] == sorted(count) and np.bincount(of).tolist() == [count[k] for k in sorted(count)]
    for e, key in enumerate(sorted(count)): np.testing.assert_allclose(points[of == e].mean(0), place[key]/count[key])


def test_random_walk_centrality_is_networkxs():
    networkx = pytest.importorskip('networkx')
    for seed in range(4):
        g = networkx.connected_watts_strogatz_graph(15, 4, .4, seed=seed)
        want = networkx.current_flow_betweenness_centrality(g)
        got = random_walk_centrality(np.array(g.edges), 15)
        np.testing.assert_allclose(got, [want[i] for i in range(15)], atol=1e-12)


def test_a_dome_above_a_stalk_gives_its_reference_system():
    """Stalk at the origin, L1 around (0, 0, 10), layers and nucellus on the z axis: axis 1 points down, axis 2 is
    perpendicular, the system right-handed."""
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
