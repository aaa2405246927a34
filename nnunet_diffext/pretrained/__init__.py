"""Weights that others trained: text encoders, vision-transformer teachers, image autoencoders.

transformers, timm and diffusers are imported by the functions that need them. What is loaded is frozen, float32 and in
eval mode; files are read without running code that they may hold; weights that a file lacks are an error, never random.
Loading leaves the state of torch's random generator as it was.
"""

from __future__ import annotations

import textwrap


class PretrainedError(ValueError):
    """Pretrained weights are missing or do not fit; the message says where to get them, or how to do without."""


def reason(error: Exception) -> str:
    """What another library says, as one line without full stop: its first line, and the next one behind a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return textwrap.shorten(text, 400, placeholder=" ...").rstrip(".")
