"""Seeding, the hypothesis profile and the markers of the whole suite."""
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'  # read when Triton is first imported

settings.register_profile('softnce', derandomize=True, database=None, deadline=None, max_examples=20,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile('softnce')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes more than about 5 s; run with -m slow')


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same global random state and leaves the default dtype as it found it."
    before = torch.get_default_dtype()
    torch.distributions.Distribution.set_default_validate_args(True)  # torch.compile turns it off for good
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope='session')
def tissue(tmp_path_factory):
    "A data root with two small synthetic specimens per stage, and the paths."
    pytest.importorskip('h5py')
    from softnce.graphs.tissue import make_tissue
    root = tmp_path_factory.mktemp('tissue')
    return root, make_tissue(root, per_stage=2, cells=(50, 90), seed=1)


@pytest.fixture(scope='session')
def pool():
    "Four processes for the tests of many devices, started by the first that asks."
    from pool import Pool
    workers = Pool(4)
    yield workers
    workers.close()
