"""LEAF's alternative codec: a pretrained autoencoder of images, if it fits the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.kl_codec import KLCodec
from nnunet_diffext.pretrained.autoencoder import CHANNELS as COLOURS
from nnunet_diffext.pretrained.autoencoder import autoencoder_from_config

_RANGES = {
    "ZScoreNormalization": (-3.0, 3.0), "CTNormalization": (-3.0, 3.0),
    "RGBTo01Normalization": (0.0, 1.0), "RescaleTo01Normalization": (0.0, 1.0),
}  # fmt: skip
"""What becomes black and white, by nnU-Net's normalisation."""


def kl_codec(
    config: Mapping[str, Any] | None,
    architecture: Architecture,
    label_space: LabelSpace,
    image_channels: int,
    normalization_schemes: Sequence[str],
) -> KLCodec:
    """The codec around an autoencoder of this configuration; its weights come from a checkpoint.

    Args:
        config: of diffusers' ``AutoencoderKL``.
        architecture: what nnU-Net planned.
        label_space: heads.
        image_channels: that the network sees.
        normalization_schemes: of nnU-Net, for every channel of the image.
    Raises:
        ValueError: the plan is not 2D, or has no stage at the autoencoder's resolution; or its image encoder, for
            colours in [-1, 1], would not see all channels, or not in a known range.
    """
    if config is None:
        raise ValueError(
            "Token 'kl8': the plans hold no 'codec_config'. A LEAFTrainer_kl8 training writes it when it loads the "
            "autoencoder; plan without this token."
        )
    if architecture.dim != 2:
        raise ValueError("Token 'kl8': the autoencoder is for 2D images. Use the 2d configuration, or leave 'kl8' out.")
    if image_channels > COLOURS:
        raise ValueError(
            f"Token 'kl8': the pretrained image encoder sees {COLOURS} channels, this dataset has {image_channels}. "
            "Leave 'kl8' out and train a MaskAutoencoderTrainer instead."
        )
    ranges = {_RANGES.get(scheme) for scheme in normalization_schemes}
    if len(ranges) > 1 or None in ranges:
        raise ValueError(
            "Token 'kl8': the pretrained image encoder needs channels that are all z-scores or all in [0, 1], not "
            f"{', '.join(normalization_schemes)}. Change the names of the channels in dataset.json and plan again, or "
            "leave 'kl8' out."
        )
    stride = 2 ** (len(config["block_out_channels"]) - 1)
    level = architecture.level_within(stride)
    if architecture.stride_of(level) != (stride, stride):
        raise ValueError(
            f"Token 'kl8': the autoencoder has stride {stride}, but no stage above the deepest of this plan has: their "
            f"strides are {[architecture.stride_of(i) for i in range(len(architecture.strides))]}. Leave 'kl8' out, or "
            "plan with larger patches."
        )
    return KLCodec(
        autoencoder_from_config(config), label_space, channels=config["latent_channels"], stride=(stride, stride),
        level=level, image_range=ranges.pop(),
    )  # fmt: skip
