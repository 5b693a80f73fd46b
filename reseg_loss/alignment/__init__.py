"""ReSeg-UNet: a teacher of label maps, and the loss that aligns a model's features with its own."""
