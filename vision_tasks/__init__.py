"""Vision tasks on the same trainer: Meta-Weight-Net, learned feature-wise transformation, the rotation transformer."""
