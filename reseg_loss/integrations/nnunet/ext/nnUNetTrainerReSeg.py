"""What nnU-Net finds through nnUNet_extTrainer. It imports every file of this folder, so there is only this one."""

from reseg_loss.integrations.nnunet.trainer import nnUNetTrainerReSeg

__all__ = ["nnUNetTrainerReSeg"]
