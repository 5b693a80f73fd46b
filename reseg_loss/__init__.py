"""A training-time regularizer for U-shaped segmentation networks (ReSeg-UNet, Li et al., MICCAI 2025)."""

__version__ = "0.1.0"
