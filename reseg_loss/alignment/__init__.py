"""ReSeg-UNet: a teacher that runs on label maps, and the loss that aligns a model's features with the teacher's."""
