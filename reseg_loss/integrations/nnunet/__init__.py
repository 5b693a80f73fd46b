"""nnU-Net v2: two trainers for `-tr`. First run the line that `python -m reseg_loss.integrations.nnunet` prints."""
