"softnce.graphs: the folder is light, and offers the names of its modules."
import subprocess, sys

import pytest

HEAVY = ('torch', 'torch_geometric', 'h5py', 'scipy', 'softnce.graphs.specimen', 'softnce.graphs.celltype')


def python(code):
    "What a fresh interpreter prints, line by line."
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_folder_loads_nothing_heavy():
    assert python(f"import sys, softnce.graphs; print([m for m in {HEAVY} if m in sys.modules])") == ['[]']


def test_the_names_users_hold_on_to_come_from_the_folder_and_h5py_waits_for_a_file():
    for name in ('h5py', 'torch_geometric'): pytest.importorskip(name)
    loaded, names = python("import sys\nfrom softnce.graphs import CellTypeGraph, read_specimen, make_tissue\n"
                           "print('h5py' in sys.modules)\nimport softnce.graphs as g\nprint(*g.__all__)")
    assert loaded == 'False' and set(names.split()) == {
        'CLASSES', 'NODE_FEATURES', 'EDGE_FEATURES', 'read_specimen',
        'CellTypeGraph', 'download_ovules', 'evaluate_specimens', 'evaluate_graphs', 'make_tissue',
        'GCN', 'DeeperGCN', 'DropEdges', 'AddEdges', 'DropFeatures', 'MaskColumns', 'AddNoise', 'RandomBasis',
        'augment', 'GraphBatches'}
