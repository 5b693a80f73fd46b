"""nnU-Net v2: `-tr nnUNetTrainerReSeg`, once `python -m reseg_loss.nnunet` has told nnU-Net where it is."""
