"""Data of semi-supervised training: images without labels, splits that name them, the pool, two views."""
