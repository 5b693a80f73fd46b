"""A training-time regularizer for U-shaped segmentation networks (ReSeg-UNet, Li et al., MICCAI 2025)."""

from .errors import ReSegError, TapError
from .features import FeatureExtractor, Features
from .losses import CrossAlignmentLoss, ReconLoss
from .settings import PRESETS, Settings
from .supervision import DeepSupervision
from .taps import Level, Tap, TapPlan, find_taps
from .teacher import Teacher
from .unlabelled import CutMixConsistency
from .wrapper import ReSegWrapper

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
    "Settings",
    "Tap",
    "TapError",
    "TapPlan",
    "Teacher",
    "find_taps",
]
