"""Image autoencoders of diffusers: the latent space of LEAF's masks and images (LDM-KL-8 in the paper)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nnunet_diffext.pretrained import PretrainedError, reason

CLASS = "AutoencoderKL"
CHANNELS = 3


def load_autoencoder(source: str) -> tuple[nn.Module, dict[str, Any]]:
    """A frozen ``AutoencoderKL`` and what :func:`autoencoder_from_config` needs to build it again.

    Args:
        source: hub id or local folder.
    Returns:
        the module, float32 in eval mode; its configuration, plain values without any path.
    Raises:
        PretrainedError: diffusers is not installed; the source cannot be loaded, lacks weights, is another class of
            model, or has other than 3 input and output channels.
    """
    cls = _autoencoder_class()
    try:
        written = cls.load_config(source)
        if written.get("_class_name") != CLASS:
            raise PretrainedError(f"it is a {written.get('_class_name', 'model of unknown class')}, not an {CLASS}")
        # Weights that are missing would be random.
        with torch.random.fork_rng(devices=[]):
            model, loaded = cls.from_pretrained(source, output_loading_info=True)
    except Exception as error:  # hubs, caches and parsers raise many kinds
        raise PretrainedError(_cannot_load(source, reason(error))) from error
    for key in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if loaded.get(key):
            first = sorted(map(str, loaded[key]))[0]
            raise PretrainedError(_cannot_load(source, f"its weights have {key.replace('_', ' ')}, such as {first}"))
    _check_channels(model, source)
    return _frozen(model), _plain(model.config)


def autoencoder_from_config(config: Mapping[str, Any]) -> nn.Module:
    """The same architecture, frozen and in eval mode too, with weights that are still to be loaded (from a checkpoint).

    Args:
        config: second result of :func:`load_autoencoder`.
    Raises:
        PretrainedError: diffusers is not installed, or does not know this configuration.
    """
    cls = _autoencoder_class()
    try:
        with torch.random.fork_rng(devices=[]):
            model = cls.from_config(dict(config))
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise PretrainedError(
            f"The configuration of the autoencoder cannot be built: {reason(error)}. It was written with another "
            "version of diffusers, or edited; install that version, or train again."
        ) from error
    _check_channels(model, "in the configuration")
    return _frozen(model)


def _autoencoder_class() -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise PretrainedError(
            f"Pretrained autoencoders need diffusers, which cannot be imported ({reason(error)}): "
            "pip install 'nnunet_diffext[pretrained]'"
        ) from error
    return AutoencoderKL


def _cannot_load(source: str, why: str) -> str:
    return (
        f"The autoencoder {source} cannot be loaded: {why}. Name a folder with the config.json and the weights of an "
        f"{CLASS}, or the hub id of one and connect to the network once, so that it is downloaded and kept."
    )


def _check_channels(model: nn.Module, source: str) -> None:
    channels = (model.config.in_channels, model.config.out_channels)
    if channels != (CHANNELS, CHANNELS):
        raise PretrainedError(
            f"The autoencoder {source} has {channels[0]} input and {channels[1]} output channels; it must have "
            f"{CHANNELS} of both. Use one for colour images."
        )


def _frozen(model: nn.Module) -> nn.Module:
    return model.float().eval().requires_grad_(False)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what diffusers notes for itself: version, class and the folder on this machine."""
    return json.loads(json.dumps({key: value for key, value in config.items() if not key.startswith("_")}))
