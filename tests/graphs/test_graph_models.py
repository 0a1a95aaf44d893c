"softnce.graphs.models: a layer by hand, what is trained, checkpointing, graphs of a batch apart."
import pytest
import torch
pytest.importorskip('h5py')
pytest.importorskip('torch_geometric')
from softnce.graphs.models import GCN, DeeperGCN
from softnce.graphs.specimen import both_directions, read_specimen
from torch_geometric.data import Batch


@pytest.fixture(scope='module')
def graph(tissue): return read_specimen(tissue[1][-1])


def test_a_deeper_gcn_layer_by_hand(graph):
    "Two layers, evaluated node by node from the formulas."
    torch.manual_seed(1)
    model = DeeperGCN(depth=2, hidden=8).double().eval()
    for layer, t in zip(model.layers, (.7, 2.)): layer.conv.aggr_module.t.data.fill_(t)
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
    trained = [p.grad for n, p in model.named_parameters() if n != 'layers.0.norm.weight']
    assert all(g is not None and g.isfinite().all() for g in trained)
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
    alone = torch.cat([m(g) for g in graphs])
    torch.testing.assert_close(m(Batch.from_data_list(graphs)), alone, rtol=1e-4, atol=1e-5)
