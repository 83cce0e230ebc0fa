"""Vision tasks on the same trainer: learned feature-wise transformation, Meta-Weight-Net (not built yet)."""
