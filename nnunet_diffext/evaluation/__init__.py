"""Metrics of finished predictions, in the units and with the options that are stated beside the numbers."""
