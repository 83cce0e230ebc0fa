"""Vision tasks on the same trainer: learned feature-wise transformation, Meta-Weight-Net, illustrations (not built yet)."""
