"softnce.graphs.celltype: folds as listed, the data set and its cache, the download, the evaluation by hand."
import hashlib, http.server, math, shutil, threading, warnings
from functools import partial

import numpy as np
import pytest
import torch
h5py = pytest.importorskip('h5py')
pytest.importorskip('torch_geometric')
from graph_oracle import FIELDS, SIMPLE, VALID, accuracies, read, write_random_specimen
from softnce.graphs import celltype
from softnce.graphs.augment import GraphBatches
from softnce.graphs.celltype import (RAW, STAGES, CellTypeGraph, download_ovules, evaluate_graphs, evaluate_specimens,
                                     specimen_accuracy, split_names)
from softnce.graphs.models import DeeperGCN
from softnce.losses import SoftTargetInfoNCE
from softnce.noise import ClosedForm, empirical_noise
from softnce.training import TrainConfig


# ---- folds

def test_folds_are_the_listed_ones_in_their_order():
    everything = {f'{stage}_{s}' for stage, stacks in STAGES.items() for s in stacks}
    assert len(everything) == 84 and [len(s) for s in STAGES.values()] == [10, 7, 10, 9, 10, 10, 9, 9, 10]
    for k, valid in enumerate(VALID):
        parts = split_names(k)
        assert parts['valid'] == valid
        assert set(parts['train']) == everything - set(valid) and len(parts['train']) == 84 - len(valid)
    assert sorted(sum(VALID, [])) == sorted(everything) and [len(v) for v in VALID] == [18, 18, 17, 17, 14]


def test_the_simple_split_is_the_listed_one():
    parts = split_names(None)
    assert parts['valid'] == SIMPLE['valid'] and parts['test'] == SIMPLE['test']
    assert [len(v) for v in parts.values()] == [53, 9, 22] and len(set(sum(parts.values(), []))) == 84


def test_folds_leave_numpys_generator_alone():
    np.random.seed(3); before = np.random.get_state()[1].copy()
    split_names(0)
    assert (np.random.get_state()[1] == before).all()


# ---- the data set

@pytest.fixture
def few(tmp_path):
    "Three specimens of fold 0: one to validate on, with a second file of the same specimen, two to train on."
    for seed, name in enumerate(['2-III/406.h5', '2-III/406_ct.h5', '2-IV/404.h5', '3-VI/555_ct.h5']):
        write_random_specimen(tmp_path/RAW/name, seed, n=20+seed)
    return tmp_path


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_a_split_holds_its_files_in_order_with_copies_together(few):
    valid, train = CellTypeGraph(few, 0, 'valid'), CellTypeGraph(few, fold=0)
    assert [g.stack for g in valid] == ['406', '406_ct'] == [g.stack for g in CellTypeGraph(few, 0, 'val')]
    assert [g.stack for g in train] == ['404', '555_ct'] and not train.synthetic
    assert len(valid.missing) == 17 and len(train.missing) == 64
    assert torch.equal(train.labels, torch.cat([read(few/RAW/p)['y'] for p in ('2-IV/404.h5', '3-VI/555_ct.h5')]))


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_the_cache_gives_the_same_and_notices_changes(few, monkeypatch):
    first = CellTypeGraph(few)
    with monkeypatch.context() as m:
        m.setattr(celltype, 'read_specimen', None) # reading again would fail
        again = CellTypeGraph(few)
        fields = FIELDS + ['com_moments', 'contact_moments']
        assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again) for k in fields)
        assert [(g.stage, g.stack, g.synthetic) for g in again] == [(g.stage, g.stack, g.synthetic) for g in first]
    write_random_specimen(few/RAW/'2-IV'/'404.h5', 77, n=25)
    assert CellTypeGraph(few)[0].num_nodes == 25
    next((few/'processed_softnce').rglob('404.pt')).write_bytes(b'cut short')
    assert CellTypeGraph(few)[0].num_nodes == 25


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_symmetric_transform_and_errors_of_the_data_set(few):
    assert CellTypeGraph(few, symmetric=True)[0].is_undirected() and CellTypeGraph(few)[0].is_directed()
    assert CellTypeGraph(few, transform=lambda g: g.num_nodes)[1] == 23
    allowed = r"split must be one of \['train', 'valid'\] for fold=0, got 'test'"
    with pytest.raises(ValueError, match=allowed): CellTypeGraph(few, 0, 'test')
    with pytest.raises(ValueError, match="fold must be 0 to 4, or None"): CellTypeGraph(few, fold=7)
    none = "root has no file for split 'valid' of fold 3: none of its 17 specimens"
    with pytest.raises(ValueError, match=none): CellTypeGraph(few, fold=3, split='valid')
    (few/RAW/'2-IV'/'404.h5').write_bytes(b'')
    with pytest.raises(ValueError, match="404.h5: not a readable"): CellTypeGraph(few)


def test_missing_specimens_are_a_warning(few):
    said = "64 of the 66 specimens of split 'train', fold 0, have no file"
    with pytest.warns(UserWarning, match=said): CellTypeGraph(few)


# ---- download

@pytest.fixture
def server(few):
    "The files as an archive behind a small web server: its address and checksum."
    archive = shutil.make_archive(few/'web'/'label_grs_surface', 'zip', few/RAW.parent, RAW.name)
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=few/'web'))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    with open(archive, 'rb') as f: md5 = hashlib.md5(f.read()).hexdigest()
    yield f'http://127.0.0.1:{httpd.server_port}/label_grs_surface.zip', md5
    httpd.shutdown()


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_download_checks_and_unpacks(server, tmp_path, monkeypatch):
    url, md5 = server
    wrong = f"checksum of .* must be md5 {'0'*32}, got {md5}"
    with pytest.raises(ValueError, match=wrong): download_ovules(tmp_path/'new', url, '0'*32)
    assert not list((tmp_path/'new').rglob('*.h5')) and not (tmp_path/'new'/RAW).exists()
    monkeypatch.setattr(download_ovules, '__defaults__', (url, md5))
    assert len(CellTypeGraph(tmp_path/'new', download=True)) == 2
    left = [p for p in (tmp_path/'new'/RAW.parent).iterdir() if p.name != RAW.name]
    assert not left
    monkeypatch.setattr(download_ovules, '__defaults__', ('http://127.0.0.1:9/none.zip', md5))
    assert len(CellTypeGraph(tmp_path/'new', download=True)) == 2 # already there


def test_download_without_a_connection_or_of_something_else(server, tmp_path):
    url, _ = server
    said = "cannot download .*none.zip.*Fetch it by hand .Zenodo record 6374104. and unpack it to"
    with pytest.raises(RuntimeError, match=said):
        download_ovules(tmp_path/'a', url.replace('label_grs_surface', 'none'))
    with pytest.raises(RuntimeError, match="cannot download http://127.0.0.1:9"):
        download_ovules(tmp_path/'a', 'http://127.0.0.1:9/x.zip')
    other = tmp_path/'other'/'readme.txt'
    other.parent.mkdir(); other.write_text('nothing')
    z = shutil.make_archive(tmp_path/'z', 'zip', other.parent)
    with open(z, 'rb') as f: md5 = hashlib.md5(f.read()).hexdigest()
    with pytest.raises(ValueError, match="has no folder of a stage"): download_ovules(tmp_path/'a', f'file://{z}', md5)


# ---- evaluation

@pytest.mark.parametrize('predicted,labels,want', [
    ([0, 0, 4, 4], [0, 0, 4, 4], (1, 1, 1)),                          # all right; absent classes are left out
    ([0, 1, 4, 4], [0, 0, 4, 4], (3/4, (1/2+1+0)/3, (1/2+1)/2)),      # a stray prediction costs a whole class
    ([0, 7, 4, 4], [0, 0, 4, 4], (3/4, (1/2+1)/2, (1/2+1)/2)),        # a stray embryo sac does not
    ([0, 0, 4, 0], [0, 0, 4, 7], (3/4, 1, 1)),                        # the embryo sac counts in top-1 only
    ([7, 7], [7, 7], (1, math.nan, math.nan)),                        # the embryo sac alone: no class to average
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
    want = accuracies(predicted.tolist(), labels.tolist())
    assert specimen_accuracy(predicted, labels) == pytest.approx(want, abs=1e-12, nan_ok=True)


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_evaluation_is_per_specimen_with_the_losss_read_out(tissue):
    valid = CellTypeGraph(tissue[0], 0, 'valid')
    torch.manual_seed(0)
    uneven = torch.arange(9).repeat_interleave(torch.arange(1, 10)) # class k, k+1 times
    model, eta = DeeperGCN(depth=2, hidden=8), empirical_noise(uneven, 9)
    loss, config = SoftTargetInfoNCE(noise_probs=eta), TrainConfig(epochs=2, epsilon=.4)
    model.head.weight.data *= 3
    rows = evaluate_specimens(model, loss, GraphBatches(valid, 4), config)
    mean = evaluate_graphs(model, loss, GraphBatches(valid, 4), config)
    assert len(rows) == len(valid) and model.training
    model.eval(); total = differ = 0
    for g, row in zip(valid, rows):
        s = model(g).double()-eta.double().log()
        right, naive = (.6*s+eta.double().log()).argmax(1), model(g).argmax(1)
        want = accuracies(right.tolist(), g.y.tolist())
        want |= {f'{k}_naive': v for k, v in accuracies(naive.tolist(), g.y.tolist()).items()}
        assert {k: row[k] for k in want} == pytest.approx(want, abs=1e-9)
        assert (row['stage'], row['stack'], row['cells']) == (g.stage, g.stack, g.num_nodes)
        differ += (right != naive).sum().item()
        total -= model(g).double().log_softmax(1).gather(1, g.y[:, None]).sum().item()
    assert mean['nll'] == pytest.approx(total/len(valid.labels), rel=1e-5) and differ > 0
    assert mean['class_average'] == pytest.approx(np.mean([r['class_average'] for r in rows]))


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_evaluation_reads_for_the_kind_of_the_training_targets(tissue):
    "Class weights tilt labels and leave a teacher's rows alone: by hand, two read-outs of the same logits."
    torch.manual_seed(0)
    valid, model = CellTypeGraph(tissue[0], 0, 'valid'), DeeperGCN(depth=2, hidden=8)
    eta, w = torch.linspace(1, 3, 9).double()/18, torch.linspace(1, 4, 9).double()
    loss, nll = SoftTargetInfoNCE(noise_probs=eta, noise_samples=ClosedForm(), weight=w), {}
    for kind in ('labels', 'teacher', None):
        rows = evaluate_specimens(model, loss, GraphBatches(valid, 4), TrainConfig(epochs=2, targets=kind))
        nll[kind] = sum(r['nll'] for r in rows)
    model.eval()
    want = dict.fromkeys(('labels', 'teacher'), 0.)
    for g in valid:
        p = model(g).detach().double().softmax(1)
        for name, q in (('labels', p/w), ('teacher', p)):
            q = q/q.sum(1, keepdim=True)
            want[name] -= sum(math.log(q[i, y]) for i, y in enumerate(g.y))
    assert nll['labels'] == nll[None] == pytest.approx(want['labels'], rel=1e-5)
    assert nll['teacher'] == pytest.approx(want['teacher'], rel=1e-5)
    assert abs(nll['teacher'] - nll['labels']) > 1


@pytest.mark.filterwarnings('ignore:.*have no file')
def test_votes_that_a_loss_refuses_are_read_as_labels_without_a_warning(tissue):
    "The kind has been said, so nothing asks for it."
    valid, eta = CellTypeGraph(tissue[0], 0, 'valid'), torch.full((9,), 1/9)
    model, loss = DeeperGCN(depth=2, hidden=8), SoftTargetInfoNCE(noise_probs=eta)
    loss(torch.zeros(4, 9), torch.rand(4, 9).softmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = evaluate_graphs(model, loss, GraphBatches(valid, 4), TrainConfig(epochs=2, targets='votes'))
        assert found == evaluate_graphs(model, loss, GraphBatches(valid, 4), TrainConfig(epochs=2, targets='labels'))
    with pytest.warns(UserWarning, match='probs reads targets as labels'):
        evaluate_graphs(model, loss, GraphBatches(valid, 4), TrainConfig(epochs=2))
