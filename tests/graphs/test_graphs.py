"softnce.graphs.celltype: tensors to the bit, folds as listed, evaluation by hand, and errors that name file and key."
import hashlib, http.server, math, shutil, threading, warnings
from functools import partial
import numpy as np, pytest, torch
h5py = pytest.importorskip('h5py')
pytest.importorskip('torch_geometric')
from graph_oracle import SIMPLE, VALID, accuracies, read
from softnce.graphs import celltype as graphs
from softnce.graphs.celltype import (CLASSES, EDGE_FEATURES, NODE_FEATURES, RAW, STAGES, CellTypeGraph, both_directions, download_ovules, read_specimen,
    specimen_accuracy, split_names)

FIELDS = 'x edge_attr edge_index y edge_y origin axis'.split()
RAW_WIDTH = dict(hops_to_bg=1)


def write(path, seed, n=40, ids=None, dtype=np.float32, attributes=True):
    "A file in the benchmark's format with random numbers in place of features: a connected graph, background edges, gaps in the ids."
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(np.arange(1, 1500), n, replace=False)) if ids is None else ids
    pairs = {(ids[i], ids[rng.integers(i)]) for i in range(1, n)} | {tuple(rng.choice(ids, 2, replace=False)) for _ in range(3*n)} | {(0, i) for i in ids[::3]}
    pairs = np.array(sorted({(min(p), max(p)) for p in pairs}))
    pairs = pairs[rng.permutation(len(pairs))]
    labels = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 10, 14], n)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, 'w') as f:
        f['cell_ids'], f['cell_labels'], f['edges_ids'] = ids.astype(np.uint32), labels.astype(np.uint32), pairs.astype(np.int32)
        f['edges_labels'] = rng.integers(0, 2, len(pairs)).astype(np.int32)
        for group, features, rows in (('cell_features', NODE_FEATURES, n), ('edges_features', EDGE_FEATURES, len(pairs))):
            for i, (name, (width, maps)) in enumerate(features.items()):
                scale, shift = 10**rng.uniform(-3, 4), rng.normal()*10**rng.uniform(-1, 3)
                a = rng.normal(size=(rows, width))*scale + shift
                if maps == 'onehot': a = rng.integers(1, 9, rows).astype(np.int32)
                elif width == 1: a = a[:, 0]
                a = a if maps == 'onehot' else a.astype(np.float64 if i % 4 == 3 else dtype)
                f.create_dataset(f'{group}/{name}', data=a, compression='gzip')
        f['cell_samples/hollow_fps_samples_grs'] = rng.normal(size=(n, 5, 3))
        if attributes: f.attrs['global_reference_system_origin'], f.attrs['global_reference_system_axis'] = rng.normal(size=3), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return path


@pytest.fixture
def file(tmp_path): return write(tmp_path/'3-I'/'439_ct.h5', 0)


# ---- the reader, to the bit

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_tensors_equal_a_literal_reading_to_the_bit(tmp_path, seed, dtype):
    path = write(tmp_path/'2-IV'/'404.h5', seed, n=17+90*seed, dtype=dtype, attributes=seed % 2 == 0)
    data, want = read_specimen(path), read(path)
    for name in FIELDS:
        assert data[name].dtype == want[name].dtype and torch.equal(data[name], want[name]), name
    assert data.x.shape == (17+90*seed, 74) and data.edge_attr.shape[1] == 11 and (data.stage, data.stack, data.synthetic) == ('2-IV', '404', False)


def test_a_synthetic_specimen_too(tissue):
    for path in tissue[1][::4]:
        data, want = read_specimen(path), read(path)
        assert all(torch.equal(data[k], want[k]) for k in FIELDS) and data.synthetic


def test_ids_in_any_order_are_mapped_by_position(tmp_path):
    ids = np.random.default_rng(5).permutation(np.arange(3, 43))
    path = write(tmp_path/'a.h5', 1, ids=ids)
    assert torch.equal(read_specimen(path).edge_index, read(path)['edge_index'])


def test_statistics_of_edge_features_include_the_background(file):
    "Dropping the background before the z-score gives other numbers: the order of the steps is tested, not only their sum."
    data = read_specimen(file)
    with h5py.File(file) as f: a, keep = f['edges_features/surface_um'][()], (f['edges_ids'][()] != 0).all(1)
    after = (a[keep] - a[keep].mean())/(a[keep].std()+1e-16)
    assert 0 < keep.sum() < len(keep) and not np.allclose(data.edge_attr[:, 0], after, atol=1e-3)


def test_symmetric_is_an_option_and_adds_the_reverse_edges(file):
    one, two = read_specimen(file), read_specimen(file, symmetric=True)
    e = one.num_edges
    assert torch.equal(two.edge_index[:, :e], one.edge_index) and torch.equal(two.edge_index[:, e:], one.edge_index.flip(0))
    for name in ('edge_attr', 'edge_y'): assert torch.equal(two[name], torch.cat([one[name], one[name]]))
    assert torch.equal(two.x, one.x) and both_directions(one).num_edges == 2*e == 2*one.num_edges and one.is_directed() and two.is_undirected()


def test_label_zero_is_class_zero_with_a_warning(file):
    with h5py.File(file, 'r+') as f: f['cell_labels'][:3] = 0
    with pytest.warns(UserWarning, match="3 cells have label 0"): data = read_specimen(file)
    assert data.y[:3].tolist() == [0, 0, 0]


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

def _cut(f): # the first cell loses all its edges but those to the background
    p, c = f['edges_ids'][()], f['cell_ids'][0]
    p[(p == c).any(1)] = 0, c
    f['edges_ids'][...] = p

@pytest.mark.parametrize('edit,message', [
    *[(_delete(k), f"missing keys .*{k}") for k in graphs.KEYS],
    (_delete('cell_features/rw_centrality'), "key 'cell_features/rw_centrality' is missing"),
    (_delete('edges_features/lrs_proj_grs'), "key 'edges_features/lrs_proj_grs' is missing"),
    (_set('cell_labels', 3, 9), r"key 'cell_labels' has unknown labels \[9\]"),
    (_set('cell_labels', 3, 11), r"key 'cell_labels' has unknown labels \[11\]"),
    (_set('edges_ids', (0, 1), 5000), r"key 'edges_ids' names ids that are not in 'cell_ids': \[5000\]"),
    (_set('cell_ids', 0, 0), "key 'cell_ids' must hold different ids without 0"),
    (_cut, "key 'edges_ids' gives a disconnected graph: 2 parts of"),
    (_set('cell_features/volume_um', 2, np.nan), "key cell_features/'volume_um' must be finite, got"),
    (_replace('cell_features/hops_to_bg', lambda a: a.astype(np.float32)), "key cell_features/'hops_to_bg': must hold integers, got float32"),
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
    with h5py.File(file) as f: at, size = (lambda c: (c.byte_offset, c.size))(f['cell_features/com_grs'].id.get_chunk_info(0))
    content = bytearray(file.read_bytes())
    content[at:at+size] = bytes(size)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="439_ct.h5: key 'cell_features/com_grs' cannot be read"): read_specimen(file)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.h5: not a readable HDF5 file"): read_specimen(tmp_path/'none.h5')


# ---- folds

def test_folds_are_the_listed_ones_in_their_order():
    everything = {f'{stage}_{s}' for stage, stacks in STAGES.items() for s in stacks}
    assert len(everything) == 84 and [len(s) for s in STAGES.values()] == [10, 7, 10, 9, 10, 10, 9, 9, 10]
    for k, valid in enumerate(VALID):
        parts = split_names(k)
        assert parts['valid'] == valid and set(parts['train']) == everything - set(valid) and len(parts['train']) == 84 - len(valid)
    assert sorted(sum(VALID, [])) == sorted(everything) and [len(v) for v in VALID] == [18, 18, 17, 17, 14]


def test_the_simple_split_is_the_listed_one():
    parts = split_names(None)
    assert parts['valid'] == SIMPLE['valid'] and parts['test'] == SIMPLE['test'] and [len(v) for v in parts.values()] == [53, 9, 22]
    assert len(set(sum(parts.values(), []))) == 84


def test_folds_leave_numpys_generator_alone():
    np.random.seed(3); before = np.random.get_state()[1].copy()
    split_names(0)
    assert (np.random.get_state()[1] == before).all()


# ---- the data set

@pytest.fixture
def few(tmp_path):
    "Three files of fold 0: one to validate on, with a second file of the same specimen, two to train on."
    for seed, name in enumerate(['2-III/406.h5', '2-III/406_ct.h5', '2-IV/404.h5', '3-VI/555_ct.h5']): write(tmp_path/RAW/name, seed, n=20+seed)
    return tmp_path


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_a_split_holds_its_files_in_order_with_copies_together(few):
    valid, train = CellTypeGraph(few, 0, 'valid'), CellTypeGraph(few, fold=0)
    assert [g.stack for g in valid] == ['406', '406_ct'] and [g.stack for g in train] == ['404', '555_ct'] and not train.synthetic
    assert [g.stack for g in CellTypeGraph(few, 0, 'val')] == ['406', '406_ct'] and len(valid.missing) == 17 and len(train.missing) == 64
    assert torch.equal(train.labels, torch.cat([read(few/RAW/p)['y'] for p in ('2-IV/404.h5', '3-VI/555_ct.h5')]))


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_the_cache_gives_the_same_and_notices_changes(few, monkeypatch):
    first = CellTypeGraph(few)
    with monkeypatch.context() as m:
        m.setattr(graphs, 'read_specimen', None) # reading again would fail
        again = CellTypeGraph(few)
        assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again) for k in FIELDS + ['com_moments', 'contact_moments'])
        assert [(g.stage, g.stack, g.synthetic) for g in again] == [(g.stage, g.stack, g.synthetic) for g in first]
    write(few/RAW/'2-IV'/'404.h5', 77, n=25)
    assert CellTypeGraph(few)[0].num_nodes == 25
    next((few/'processed_softnce').rglob('404.pt')).write_bytes(b'cut short')
    assert CellTypeGraph(few)[0].num_nodes == 25


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_symmetric_transform_and_errors_of_the_data_set(few):
    assert CellTypeGraph(few, symmetric=True)[0].is_undirected() and CellTypeGraph(few)[0].is_directed()
    assert CellTypeGraph(few, transform=lambda g: g.num_nodes)[1] == 23
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'valid'\] for fold=0, got 'test'"): CellTypeGraph(few, 0, 'test')
    with pytest.raises(ValueError, match="fold must be 0 to 4, or None"): CellTypeGraph(few, fold=7)
    with pytest.raises(ValueError, match="root has no file for split 'valid' of fold 3: none of its 17 specimens"): CellTypeGraph(few, fold=3, split='valid')
    (few/RAW/'2-IV'/'404.h5').write_bytes(b'')
    with pytest.raises(ValueError, match="404.h5: not a readable"): CellTypeGraph(few)


def test_missing_specimens_are_a_warning(few):
    with pytest.warns(UserWarning, match="64 of the 66 specimens of split 'train', fold 0, have no file"): CellTypeGraph(few)


# ---- download

@pytest.fixture
def server(few):
    "The files as an archive behind a small web server: its address and checksum."
    archive = shutil.make_archive(few/'web'/'label_grs_surface', 'zip', few/RAW.parent, RAW.name)
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=few/'web'))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    with open(archive, 'rb') as f: yield f'http://127.0.0.1:{httpd.server_port}/label_grs_surface.zip', hashlib.md5(f.read()).hexdigest()
    httpd.shutdown()


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_download_checks_and_unpacks(server, tmp_path, monkeypatch):
    url, md5 = server
    with pytest.raises(ValueError, match=f"checksum of .* must be md5 {'0'*32}, got {md5}"): download_ovules(tmp_path/'new', url, '0'*32)
    assert not list((tmp_path/'new').rglob('*.h5')) and not (tmp_path/'new'/RAW).exists()
    monkeypatch.setattr(download_ovules, '__defaults__', (url, md5))
    assert len(CellTypeGraph(tmp_path/'new', download=True)) == 2
    assert not [p for p in (tmp_path/'new'/RAW.parent).iterdir() if p.name != RAW.name] # nothing else is left
    monkeypatch.setattr(download_ovules, '__defaults__', ('http://127.0.0.1:9/none.zip', md5))
    assert len(CellTypeGraph(tmp_path/'new', download=True)) == 2 # already there


def test_download_without_a_connection_or_of_something_else(server, tmp_path):
    url, _ = server
    with pytest.raises(RuntimeError, match="cannot download .*none.zip.*Fetch it by hand .Zenodo record 6374104. and unpack it to"): download_ovules(tmp_path/'a', url.replace('label_grs_surface', 'none'))
    with pytest.raises(RuntimeError, match="cannot download http://127.0.0.1:9"): download_ovules(tmp_path/'a', 'http://127.0.0.1:9/x.zip')
    other = tmp_path/'other'/'readme.txt'
    other.parent.mkdir(); other.write_text('nothing')
    z = shutil.make_archive(tmp_path/'z', 'zip', other.parent)
    with pytest.raises(ValueError, match="has no folder of a stage"): download_ovules(tmp_path/'a', f'file://{z}', hashlib.md5(open(z, 'rb').read()).hexdigest())


# ---- evaluation

@pytest.mark.parametrize('predicted,labels,want', [
    ([0, 0, 4, 4], [0, 0, 4, 4], (1, 1, 1)),                          # all right; absent classes are left out
    ([0, 1, 4, 4], [0, 0, 4, 4], (3/4, (1/2+1+0)/3, (1/2+1)/2)),      # one stray prediction of an absent class costs a whole class
    ([0, 7, 4, 4], [0, 0, 4, 4], (3/4, (1/2+1)/2, (1/2+1)/2)),        # a stray embryo sac does not
    ([0, 0, 4, 0], [0, 0, 4, 7], (3/4, 1, 1)),                        # the embryo sac counts in top-1 only
    ([7, 7], [7, 7], (1, math.nan, math.nan)),                        # nothing but the embryo sac: no class to average
    ([1, 0], [0, 1], (0, 0, 0))])
def test_evaluation_by_hand(predicted, labels, want):
    got = specimen_accuracy(torch.tensor(predicted), torch.tensor(labels))
    assert list(got) == ['top1', 'class_average', 'class_average_recall']
    assert list(got.values()) == pytest.approx(want, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize('seed', range(20))
def test_evaluation_equals_the_loops(seed):
    g = torch.Generator().manual_seed(seed)
    some = torch.randperm(9, generator=g)[:5]
    labels, predicted = some[torch.randint(4, (30,), generator=g)], some[torch.randint(5, (30,), generator=g)]
    assert specimen_accuracy(predicted, labels) == pytest.approx(accuracies(predicted.tolist(), labels.tolist()), abs=1e-12, nan_ok=True)


def test_the_tables_have_the_widths_of_the_format():
    assert sum(w for w, _ in NODE_FEATURES.values()) == 74 and sum(w for w, _ in EDGE_FEATURES.values()) == 11 and len(CLASSES) == 9 and len(NODE_FEATURES) == 24
