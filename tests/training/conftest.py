"Data that several tests of the training loop share."
import pytest


@pytest.fixture(scope='module')
def splits():
    pytest.importorskip('sklearn'); pytest.importorskip('accelerate')
    from softnce.vision.images import digits
    return digits()
