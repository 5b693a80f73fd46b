"""nnU-Net v2: two trainers for `-tr`, once the line of `python -m reseg_loss.integrations.nnunet` is run."""
