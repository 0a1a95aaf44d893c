"softnce.graphs.specimen: tensors to the bit, and errors that name file and key."
import numpy as np
import pytest
import torch
h5py = pytest.importorskip('h5py')
pytest.importorskip('torch_geometric')
from graph_oracle import EDGES, FIELDS, NODES, read, write_random_specimen
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
    (_set('cell_labels', 3, 9), r"key 'cell_labels' must hold integers among \[0, 1, .*, 10, 14\], got \[9\]"),
    (_set('cell_labels', 3, 11), r"key 'cell_labels' must hold integers among \[0, 1, .*, 10, 14\], got \[11\]"),
    (_set('edges_ids', (0, 1), 5000), r"key 'edges_ids' names ids that are not in 'cell_ids': \[5000\]"),
    (_set('edges_ids', 0, (0, 5000)), r"key 'edges_ids' names ids that are not in 'cell_ids': \[5000\]"),
    (_set('cell_ids', 0, 0), r"key 'cell_ids' must hold integers from 1 to 9223372036854775807, got \[0\]"),
    (_set('cell_ids', slice(2), 7), r"key 'cell_ids' must hold different ids, got more than once \[7\]"),
    (_cut, "key 'edges_ids' gives a disconnected graph: 2 parts of"),
    (_set('cell_features/volume_um', 2, np.nan), "key 'cell_features/volume_um' must be finite, got 1 values"),
    (_replace('cell_features/hops_to_bg', lambda a: a.astype(np.float32)),
     "key 'cell_features/hops_to_bg' must hold integers, got float32"),
    (_replace('cell_features/com_grs', lambda a: a[:-1]),
     r"key 'cell_features/com_grs' must have shape \(N, 3\) with N = 40, got \(39, 3\)"),
    (_replace('edges_features/com_grs', lambda a: a[:, :2]),
     r"key 'edges_features/com_grs' must have shape \(E0, 3\) with E0 = \d+, got \(\d+, 2\)"),
    (_replace('cell_labels', lambda a: a[:-2]), r"key 'cell_labels' must have shape \(N,\) with N = 40, got \(38,\)"),
    (_replace('edges_labels', lambda a: a[:-2]), r"key 'edges_labels' must have shape \(E0,\) with E0 = "),
    (_replace('cell_ids', lambda a: a[:0]), r"key 'cell_ids' must have shape \(N,\) with N of at least 1, got \(0,\)"),
    (_replace('edges_ids', lambda a: a.T), r"key 'edges_ids' must have shape \(E0, 2\) .*, got \(2, \d+\)"),
    (_replace('cell_labels', lambda a: a+.7), "key 'cell_labels' must hold integers, got float64")])
def test_what_is_wrong_is_named(file, edit, message):
    with h5py.File(file, 'r+') as f: edit(f)
    with pytest.raises(ValueError, match=f"439_ct.h5: {message}"): read_specimen(file)


# every key of the format, by what it holds
IDS = ['cell_ids', 'edges_ids']
INTEGERS = [*IDS, 'cell_labels', 'edges_labels', 'cell_features/hops_to_bg']
FEATURES = [f'{group}/{line.split()[0]}' for group, table in (('cell_features', NODES), ('edges_features', EDGES))
            for line in table.splitlines()]
ALL = list(dict.fromkeys(INTEGERS + FEATURES))
FLOATS = [key for key in ALL if key not in INTEGERS]


def _ragged(f, key, a):
    "Rows of different lengths."
    made = f.create_dataset(key, (len(a),), dtype=h5py.vlen_dtype('f8'))
    for i in range(len(a)): made[i] = np.arange(i % 3)


def _unreadable(f, key, a): f[key] = h5py.SoftLink('/nowhere')


def _as(make):
    def write(f, key, a): f[key] = make(a)
    return write


DAMAGES = { # what is done to a key: which keys, how, what the message says
    'text': (ALL, _as(lambda a: np.full(a.shape, 'a', 'S2')), 'must hold (integers|numbers), got text'),
    'strings': (ALL, _as(lambda a: np.full(a.shape, 'a', object)), 'must hold (integers|numbers), got objects'),
    'ragged': (ALL, _ragged, 'must hold (integers|numbers), got objects'),
    'bool': (ALL, _as(lambda a: a > 0), 'must hold (integers|numbers), got bool'),
    'complex': (ALL, _as(lambda a: a + 1j), 'must hold (integers|numbers), got complex'),
    'records': (ALL, _as(lambda a: a.astype([('x', 'f4')])), 'must hold (integers|numbers), got '),
    'group': (ALL, lambda f, key, a: f.create_group(key), 'must be a dataset, got <HDF5 group'),
    'nothing': (ALL, _as(lambda a: h5py.Empty(a.dtype)), 'must hold data, got an empty dataset'),
    'missing': (ALL, lambda f, key, a: None, 'missing keys|is missing'),
    'dangling': (ALL, _unreadable, 'cannot be read: '),
    'scalar': (ALL, _as(lambda a: a.flat[0]), r'must have shape .*, got \(\)'),
    'one more axis': (ALL, _as(lambda a: a[..., None, None]), r'must have shape .*, got \('),
    'one row less': ([k for k in ALL if k not in IDS], _as(lambda a: a[1:]), r'must have shape .* = \d+, got \('),
    'no rows': (ALL, _as(lambda a: a[:0]), r'must have shape .*, got \(0,'),
    'one column more': (ALL, _as(lambda a: np.c_[a, a.reshape(len(a), -1)[:, :1]]), r'must have shape .*, got \('),
    'floats': (INTEGERS, _as(lambda a: a.astype(np.float64)), 'must hold integers, got float64'),
    'negative': (INTEGERS, _as(lambda a: -a.astype(int) - 1), r'must hold integers .*, got \[-'),
    'beyond int64': (INTEGERS, _as(lambda a: a.astype('u8') + np.uint64(2**63)), r'must hold integers .*, got \[92'),
    'long double': (FLOATS, _as(lambda a: a.astype(np.longdouble)), 'must hold numbers, got float128'),
    'nan': (FLOATS, _as(lambda a: np.where(np.arange(len(a)) == 3, np.nan, a.T).T), 'must be finite, got'),
    'inf': (FLOATS, _as(lambda a: np.where(np.arange(len(a)) == 3, np.inf, a.T).T), 'must be finite, got')}


@pytest.mark.parametrize('damage', DAMAGES)
def test_every_key_of_a_wrong_type_shape_or_value_is_named_with_what_came(file, damage):
    keys, make, message = DAMAGES[damage]
    with h5py.File(file) as f: good = {key: f[key][()] for key in ALL}
    for key in keys:
        with h5py.File(file, 'r+') as f:
            del f[key]
            make(f, key, good[key])
        with pytest.raises(ValueError, match=message) as e: read_specimen(file)
        said = str(e.value)
        assert said.startswith(str(file)) and f"'{key}'" in said and len(said) < len(str(file)) + 300, said
        with h5py.File(file, 'r+') as f:
            if key in f or damage == 'dangling': del f[key]
            f[key] = good[key]
    read_specimen(file) # nothing else was wrong


@pytest.mark.parametrize('name,value,message', [
    ('global_reference_system_origin', np.zeros(2), r"must have shape \(3,\), got \(2,\)"),
    ('global_reference_system_origin', np.array([0, np.nan, 0]), "must be finite"),
    ('global_reference_system_axis', np.eye(3)[:2], r"must have shape \(3, 3\), got \(2, 3\)"),
    ('global_reference_system_axis', 'x', "must hold numbers, got "),
    ('global_reference_system_axis', h5py.Empty('f8'), "must hold numbers, got objects"),
    ('synthetic', 'yes', "must hold flags, got "), ('synthetic', [True, False], r"must have shape \(\), got \(2,\)")])
def test_attributes_are_checked_too(file, name, value, message):
    with h5py.File(file, 'r+') as f: f.attrs[name] = value
    with pytest.raises(ValueError, match=f"439_ct.h5: attribute '{name}' {message}"): read_specimen(file)


def test_other_types_that_hold_the_same_numbers_give_the_same_graph(file):
    "Wider and narrower integers, the other byte order, one column as a matrix; attributes of integers."
    want = read_specimen(file)
    with h5py.File(file, 'r+') as f:
        for key, dtype in (('cell_ids', '>u8'), ('edges_ids', 'u4'), ('cell_labels', 'i1'), ('edges_labels', '>i2')):
            _replace(key, lambda a: a.astype(dtype))(f)
        _replace('cell_features/volume_um', lambda a: a[:, None])(f)
        _replace('cell_features/com_grs', lambda a: a.astype(a.dtype.newbyteorder('>')))(f)
        f.attrs['global_reference_system_origin'] = want.origin.numpy().astype('>f8')
        f.attrs['synthetic'] = 0
    got = read_specimen(file)
    assert all(got[k].dtype == want[k].dtype and torch.equal(got[k], want[k]) for k in FIELDS) and not got.synthetic


@pytest.mark.parametrize('key,dtype', [('cell_features/surface_um', np.float16), ('edges_features/com_grs', np.float32),
                                       ('cell_features/lrs_axis12_dot_grs', np.float64)])
def test_numbers_too_large_for_their_statistics_are_refused(file, key, dtype):
    "A deviation that overflows would make zeros of a column, a double beyond single precision an infinity."
    most = np.finfo(dtype).max
    def alternate(a): return np.where(np.arange(a.size).reshape(a.shape) % 2, most, -most).astype(dtype)
    with h5py.File(file, 'r+') as f: _replace(key, alternate)(f)
    with pytest.raises(ValueError, match=f"439_ct.h5: key '{key}' must be small enough for .* in {dtype.__name__}"):
        read_specimen(file)


def test_a_group_that_is_a_dataset_is_named(file):
    with h5py.File(file, 'r+') as f: del f['cell_samples']; f['cell_samples'] = np.zeros(3)
    with pytest.raises(ValueError, match="439_ct.h5: key 'cell_samples' must be a group, got <HDF5 dataset"):
        read_specimen(file)


def test_a_specimen_of_one_cell_is_a_graph(tmp_path):
    "Its only contact is the one with the background."
    path = write_random_specimen(tmp_path/'a.h5', 3, n=1, ids=np.array([5]), more_pairs=0)
    data = read_specimen(path)
    assert data.num_nodes == 1 and data.edge_index.shape == (2, 0) and data.edge_attr.shape == (0, 11)


def test_a_disconnected_graph_can_be_asked_for(file):
    with h5py.File(file, 'r+') as f: _cut(f)
    data, want = read_specimen(file, connected=False), read(file)
    assert all(torch.equal(data[k], want[k]) for k in FIELDS)


@pytest.mark.parametrize('content', [b'', b'not hdf5', None])
def test_a_corrupt_file_is_named(file, content):
    file.write_bytes(file.read_bytes()[:file.stat().st_size//2] if content is None else content)
    with pytest.raises(ValueError, match="439_ct.h5: not a readable HDF5 file"): read_specimen(file)


def test_a_file_cut_short_anywhere_is_named(file):
    whole = file.read_bytes()
    for share in range(20):
        file.write_bytes(whole[:len(whole)*share//20])
        with pytest.raises(ValueError, match="439_ct.h5: "): read_specimen(file)


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
