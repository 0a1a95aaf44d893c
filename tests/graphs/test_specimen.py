"softnce.graphs.specimen: tensors to the bit, and errors that name file and key."
import numpy as np
import pytest
import torch
h5py = pytest.importorskip('h5py')
pytest.importorskip('torch_geometric')
from graph_oracle import FIELDS, read, write_random_specimen
from softnce.graphs.specimen import CLASSES, EDGE_FEATURES, KEYS, NODE_FEATURES, both_directions, read_specimen


@pytest.fixture
def file(tmp_path): return write_random_specimen(tmp_path/'3-I'/'439_ct.h5', 0)


# ---- the reader, to the bit

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_tensors_equal_a_literal_reading_to_the_bit(tmp_path, seed, dtype):
    n = 17+90*seed
    path = write_random_specimen(tmp_path/'2-IV'/'404.h5', seed, n, dtype=dtype, attributes=seed % 2 == 0)
    data, want = read_specimen(path), read(path)
    for name in FIELDS:
        assert data[name].dtype == want[name].dtype and torch.equal(data[name], want[name]), name
    assert data.x.shape == (n, 74) and data.edge_attr.shape[1] == 11
    assert (data.stage, data.stack, data.synthetic) == ('2-IV', '404', False)


def test_a_synthetic_specimen_too(tissue):
    for path in tissue[1][::4]:
        data, want = read_specimen(path), read(path)
        assert all(torch.equal(data[k], want[k]) for k in FIELDS) and data.synthetic


def test_ids_in_any_order_are_mapped_by_position(tmp_path):
    ids = np.random.default_rng(5).permutation(np.arange(3, 43))
    path = write_random_specimen(tmp_path/'a.h5', 1, ids=ids)
    assert torch.equal(read_specimen(path).edge_index, read(path)['edge_index'])


def test_statistics_of_edge_features_include_the_background(file):
    "Dropping the background before the z-score gives other numbers: the order of the steps is tested."
    data = read_specimen(file)
    with h5py.File(file) as f: a, keep = f['edges_features/surface_um'][()], (f['edges_ids'][()] != 0).all(1)
    after = (a[keep] - a[keep].mean())/(a[keep].std()+1e-16)
    assert 0 < keep.sum() < len(keep) and not np.allclose(data.edge_attr[:, 0], after, atol=1e-3)


def test_symmetric_is_an_option_and_adds_the_reverse_edges(file):
    one, two = read_specimen(file), read_specimen(file, symmetric=True)
    e = one.num_edges
    assert torch.equal(two.edge_index[:, :e], one.edge_index)
    assert torch.equal(two.edge_index[:, e:], one.edge_index.flip(0))
    for name in ('edge_attr', 'edge_y'): assert torch.equal(two[name], torch.cat([one[name], one[name]]))
    assert torch.equal(two.x, one.x) and both_directions(one).num_edges == 2*e == 2*one.num_edges
    assert one.is_directed() and two.is_undirected()


def test_label_zero_is_class_zero_with_a_warning(file):
    with h5py.File(file, 'r+') as f: f['cell_labels'][:3] = 0
    with pytest.warns(UserWarning, match="3 cells have label 0"): data = read_specimen(file)
    assert data.y[:3].tolist() == [0, 0, 0]


def test_the_tables_have_the_widths_of_the_format():
    assert sum(w for w, _ in NODE_FEATURES.values()) == 74 and sum(w for w, _ in EDGE_FEATURES.values()) == 11
    assert len(CLASSES) == 9 and len(NODE_FEATURES) == 24


# ---- errors name file and key

def _delete(key):
    def edit(f): del f[key]
    return edit


def _set(key, at, value):
    def edit(f): f[key][at] = value
    return edit


def _replace(key, make):
    def edit(f):
        a = f[key][()]; del f[key]; f[key] = make(a)
    return edit


def _cut(f):
    "The first cell loses all its edges but those to the background."
    p, c = f['edges_ids'][()], f['cell_ids'][0]
    p[(p == c).any(1)] = 0, c
    f['edges_ids'][...] = p


@pytest.mark.parametrize('edit,message', [
    *[(_delete(k), f"missing keys .*{k}") for k in KEYS],
    (_delete('cell_features/rw_centrality'), "key 'cell_features/rw_centrality' is missing"),
    (_delete('edges_features/lrs_proj_grs'), "key 'edges_features/lrs_proj_grs' is missing"),
    (_set('cell_labels', 3, 9), r"key 'cell_labels' has unknown labels \[9\]"),
    (_set('cell_labels', 3, 11), r"key 'cell_labels' has unknown labels \[11\]"),
    (_set('edges_ids', (0, 1), 5000), r"key 'edges_ids' names ids that are not in 'cell_ids': \[5000\]"),
    (_set('cell_ids', 0, 0), "key 'cell_ids' must hold different ids without 0"),
    (_cut, "key 'edges_ids' gives a disconnected graph: 2 parts of"),
    (_set('cell_features/volume_um', 2, np.nan), "key cell_features/'volume_um' must be finite, got"),
    (_replace('cell_features/hops_to_bg', lambda a: a.astype(np.float32)),
     "key cell_features/'hops_to_bg': must hold integers, got float32"),
    (_replace('cell_features/com_grs', lambda a: a[:-1]), "key cell_features/'com_grs' must have 40 rows, got shape"),
    (_replace('edges_features/com_grs', lambda a: a[:, :2]), "key edges_features/'com_grs' must give 3 columns"),
    (_replace('cell_labels', lambda a: a[:-2]), "key 'cell_labels' must have shape"),
    (_replace('edges_labels', lambda a: a[:-2]), "key 'edges_labels' must have shape")])
def test_what_is_wrong_is_named(file, edit, message):
    with h5py.File(file, 'r+') as f: edit(f)
    with pytest.raises(ValueError, match=f"439_ct.h5: {message}"): read_specimen(file)


def test_a_disconnected_graph_can_be_asked_for(file):
    with h5py.File(file, 'r+') as f: _cut(f)
    data, want = read_specimen(file, connected=False), read(file)
    assert all(torch.equal(data[k], want[k]) for k in FIELDS)


@pytest.mark.parametrize('content', [b'', b'not hdf5', None])
def test_a_corrupt_file_is_named(file, content):
    file.write_bytes(file.read_bytes()[:file.stat().st_size//2] if content is None else content)
    with pytest.raises(ValueError, match="439_ct.h5: not a readable HDF5 file"): read_specimen(file)


def test_a_file_damaged_inside_is_named_with_its_key(file):
    with h5py.File(file) as f:
        chunk = f['cell_features/com_grs'].id.get_chunk_info(0)
        at, size = chunk.byte_offset, chunk.size
    content = bytearray(file.read_bytes())
    content[at:at+size] = bytes(size)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="439_ct.h5: key 'cell_features/com_grs' cannot be read"): read_specimen(file)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.h5: not a readable HDF5 file"): read_specimen(tmp_path/'none.h5')
