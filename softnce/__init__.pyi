"""What softnce offers, for type checkers. Made by tools/stubs.py from the modules; do not edit."""
from typing import Any

__version__: str
def _lazy(package: str, *modules: str) -> Any: ...
from . import sparse as sparse
from .sparse import SparseTargets as SparseTargets
from .sparse import Targets as Targets
from .sparse import checks_values as checks_values
from .sparse import collate as collate
from .sparse import has_values as has_values
from .sparse import set_value_checks as set_value_checks
from .sparse import value_checks as value_checks
from . import targets as targets
from .targets import drawn as drawn
from .targets import mix as mix
from .targets import one_hot as one_hot
from .targets import sample_labels as sample_labels
from .targets import smooth as smooth
from . import noise as noise
from .noise import ClosedForm as ClosedForm
from .noise import ContinuousCategorical as ContinuousCategorical
from .noise import Fresh as Fresh
from .noise import InBatch as InBatch
from .noise import NoiseSource as NoiseSource
from .noise import Queue as Queue
from .noise import empirical_noise as empirical_noise
from .noise import noise_of as noise_of
from .noise import uniform_noise as uniform_noise
from . import losses as losses
from .losses import ExpectedInfoNCE as ExpectedInfoNCE
from .losses import InfoNCE as InfoNCE
from .losses import NLL as NLL
from .losses import SoftDistributionInfoNCE as SoftDistributionInfoNCE
from .losses import SoftTargetCrossEntropy as SoftTargetCrossEntropy
from .losses import SoftTargetInfoNCE as SoftTargetInfoNCE
from .losses import expected_info_nce as expected_info_nce
from .losses import info_nce as info_nce
from .losses import linear_expected_info_nce as linear_expected_info_nce
from .losses import linear_soft_target_cross_entropy as linear_soft_target_cross_entropy
from .losses import linear_soft_target_info_nce as linear_soft_target_info_nce
from .losses import nll as nll
from .losses import soft_distribution_info_nce as soft_distribution_info_nce
from .losses import soft_target_cross_entropy as soft_target_cross_entropy
from .losses import soft_target_info_nce as soft_target_info_nce
