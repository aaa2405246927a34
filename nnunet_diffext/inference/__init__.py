"""Predictions beyond nnU-Net's segmentation."""
