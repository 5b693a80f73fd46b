"""nnU-Net v2: `-tr nnUNetTrainerReSeg`, once the line of `python -m reseg_loss.integrations.nnunet` is run."""
