"""The trainers, found by name: ``nnunet_diffext.trainers.DMEDSegTrainer_noCACL`` is made on demand (PEP 562)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from nnunet_diffext.variants import parse_tokens, split_name

TRAINERS: dict[str, str] = {
    "DMEDSegTrainer": "nnunet_diffext.trainers.dmed",
    "LEAFTrainer": "nnunet_diffext.trainers.leaf",
    "M4oEPretrainTrainer": "nnunet_diffext.trainers.m4oe_pretraining",
    "M4oETrainer": "nnunet_diffext.trainers.m4oe",
    "MaskAutoencoderTrainer": "nnunet_diffext.trainers.autoencoder",
    "PGRDTrainer": "nnunet_diffext.trainers.pgrd",
    "TextDiffSegTrainer": "nnunet_diffext.trainers.textdiffseg",
    "nnUNetTrainer": "nnunet_diffext.trainers.stock",
}
"""Base trainer name -> module. A module is imported only when one of its trainers is asked for."""

_variants: dict[str, type] = {}


def find_trainer(name: str) -> type:
    """The trainer class called ``name``: a base trainer, or a base trainer with variant tokens.

    Raises:
        AttributeError: if the name does not start with one of :data:`TRAINERS`.
        UnknownTokenError, SettingsError: if it does, but a token is wrong.
    """
    parts = split_name(name, TRAINERS)
    if parts is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; known trainers: {', '.join(TRAINERS)}")
    base_name, tokens = parts
    base = getattr(import_module(TRAINERS[base_name]), base_name)
    if not tokens:
        return base
    if name not in _variants:
        overrides = parse_tokens(base.Settings, tokens, name)
        base.Settings(**overrides)  # a value out of range is reported here, before anything is built
        attributes = {"overrides": overrides, "base_name": base_name, "__module__": __name__, "__doc__": base.__doc__}
        _variants[name] = type(name, (base,), attributes)
    return _variants[name]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return find_trainer(name)
