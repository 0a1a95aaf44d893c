"Fixtures of the tests of images."
import pytest

from pictures import tiny


@pytest.fixture(scope='session')
def small(tmp_path_factory):
    "Tiny ImageNet's layout with 14 training images a class, read."
    from softnce.vision.images import load
    return load('tiny_imagenet', tiny(tmp_path_factory.mktemp('tiny'), train=14))
