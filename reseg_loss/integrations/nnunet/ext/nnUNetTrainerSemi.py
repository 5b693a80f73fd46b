"""What nnU-Net finds through nnUNet_extTrainer, as the other file of this folder."""

from reseg_loss.integrations.nnunet.semi import nnUNetTrainerSemi

__all__ = ["nnUNetTrainerSemi"]
