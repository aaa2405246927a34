"""A complete semi-supervised training on data made here: stock nnU-Net commands, both trainers, pictures, a table."""
