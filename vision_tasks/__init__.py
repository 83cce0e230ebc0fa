"""Vision tasks on the same trainer: Meta-Weight-Net, learned noise on features, a learned angle, a weight an image."""
