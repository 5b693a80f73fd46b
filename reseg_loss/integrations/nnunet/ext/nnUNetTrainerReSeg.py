"""What nnU-Net finds through nnUNet_extTrainer. It imports every file of this folder: none may need another package."""

from reseg_loss.integrations.nnunet.trainer import nnUNetTrainerReSeg

__all__ = ["nnUNetTrainerReSeg"]
