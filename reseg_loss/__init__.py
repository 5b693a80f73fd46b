"""Training-time losses for U-shaped segmentation networks, among them ReSeg-UNet (Li et al., MICCAI 2025)."""

from .alignment.losses import CrossAlignmentLoss, ReconLoss
from .alignment.settings import PRESETS, Settings
from .alignment.teacher import Teacher
from .alignment.wrapper import ReSegWrapper
from .common.batches import batches
from .consistency import CutMixConsistency
from .errors import ReSegError, TapError
from .recording.extractor import FeatureExtractor, Features
from .semi import SemiSupervised
from .supervision import DeepSupervision
from .taps import Level, Tap, TapPlan, find_taps

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CrossAlignmentLoss",
    "CutMixConsistency",
    "DeepSupervision",
    "FeatureExtractor",
    "Features",
    "Level",
    "ReSegError",
    "ReSegWrapper",
    "ReconLoss",
    "SemiSupervised",
    "Settings",
    "Tap",
    "TapError",
    "TapPlan",
    "Teacher",
    "batches",
    "find_taps",
]
