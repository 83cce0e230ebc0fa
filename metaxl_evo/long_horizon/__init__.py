"""Tasks over long horizons that are not of images."""
