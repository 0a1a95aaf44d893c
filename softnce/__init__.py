"Noise contrastive estimation with soft targets: losses that take hard, smoothed, mixed and sparse targets."
__version__ = "0.1.0"

from softnce.targets import *
from softnce.noise import *
from softnce.losses import *
