"""Frozen vision transformers of timm, whose patch tokens LEAF aligns its features with (eq. 5; DINOv2 in the paper)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_diffext.checkpoints import CheckpointError, read_safely
from nnunet_diffext.losses.alignment import axial_slices
from nnunet_diffext.pretrained import PretrainedError, reason

VARIABLE = "nnUNet_diffext_teacher"
DEFAULT_TEACHER = "vit_small_patch14_reg4_dinov2.lvd142m"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Names of the weights in a folder of timm."""
PERCENTILES = (0.005, 0.995)
ROUNDING = 1e-5
"""A channel whose values differ by less than this share of them is constant."""


class PatchTeacher(nn.Module):
    """A frozen vision transformer that gives one token per image patch. Stays frozen, float32 and in eval mode.

    Args:
        vit: model of timm with a patch embedding of square patches and 3 input channels, made for any image size.
        mean: per channel, of images in [0, 1].
        std: likewise.
    Attributes:
        patch: side of a patch in pixels.
        channels: D, width of a token.
    Raises:
        PretrainedError: not such a model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vit: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        embedding = getattr(vit, "patch_embed", None)
        sides = set(getattr(embedding, "patch_size", ()))
        if len(sides) != 1 or not hasattr(vit, "num_prefix_tokens") or embedding.proj.weight.shape[1] != 3:
            raise PretrainedError(
                f"{type(vit).__name__} cannot be a teacher: it must be a vision transformer of timm with square "
                "patches and 3 input channels."
            )
        self.patch: int = sides.pop()
        self.channels: int = vit.num_features
        self.vit = vit
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.float().requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> PatchTeacher:
        """Stay in eval mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised patch tokens, without class and register tokens.

        Args:
            images: ``(B, 3, patch * h, patch * w)`` in [0, 1], any h and w, see :func:`teacher_images`.
        Returns:
            float32 ``(B, D, h, w)``; the token at (i, j) is that of the patch at (i, j).
        Raises:
            ValueError: other channels, or sides that are no multiples of the patch.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % self.patch or images.shape[3] % self.patch:
            raise ValueError(
                f"expected images (B, 3, {self.patch} h, {self.patch} w), got {tuple(images.shape)}; make them with "
                "teacher_images"
            )
        with torch.autocast(images.device.type, enabled=False):
            tokens = self.vit.forward_features((images.float() - self.mean) / self.std)
        h, w = images.shape[2] // self.patch, images.shape[3] // self.patch
        return tokens[:, self.vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, (h, w))

    def pair(
        self, image: Tensor, features: Tensor, slices: int, keys: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features and tokens of the same places; of volumes, on axial slices.

        Args:
            image: ``(B, C, *patch)``, normalised by nnU-Net.
            features: ``(B, F, *grid)`` of the student, for whose grid the image is resized.
            slices: at most this many per volume, drawn at random.
            keys: not used.
        Returns:
            ``(N, F, h, w)`` and ``(N, D, h, w)``.
        """
        image, features = axial_slices(image, features, slices)
        return features, self(teacher_images(image, features.shape[2:], self.patch))


@torch.no_grad()
def teacher_images(image: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """A training patch as the teacher sees it: three channels in [0, 1], one teacher patch per point of the grid.

    Every channel of every sample is rescaled by itself from its percentiles 0.5 and 99.5 to [0, 1] (z-scores of
    modalities have no common scale); a constant one becomes 0. Of more than three channels the first three are taken;
    of fewer, the first one is repeated in front: ``(a, a, a)``, ``(a, a, b)``.

    Args:
        image: ``(B, C, H, W)``, normalised by nnU-Net.
        grid: h, w of the features to align.
        patch: of the teacher.
    Returns:
        float32 ``(B, 3, patch * h, patch * w)``, resized with antialiased bicubic interpolation.
    Raises:
        ValueError: not an image of two dimensions.
    """
    if image.ndim != 4:
        raise ValueError(
            f"the teacher takes 2D images (B, C, H, W), got {tuple(image.shape)}; use a 2d configuration or slices"
        )
    image = image[:, :3].float()
    levels = torch.tensor(PERCENTILES, device=image.device)
    low, high = torch.quantile(image.flatten(2), levels, dim=2)[..., None, None]
    constant = high - low <= ROUNDING * torch.maximum(low.abs(), high.abs())
    image = torch.where(constant, 0.0, (image - low) / (high - low)).clamp(0, 1)
    image = image[:, [max(0, i + image.shape[1] - 3) for i in range(3)]]
    size = (patch * grid[0], patch * grid[1])
    return F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def load_teacher(name: str = DEFAULT_TEACHER) -> PatchTeacher:
    """A teacher with pretrained weights, never with random ones.

    Where from: the variable ``nnUNet_diffext_teacher``, which names a weights file for ``name`` or a folder in timm's
    ``local-dir`` layout (``config.json`` and weights, any architecture); without it, timm downloads ``name``, or takes
    what it downloaded before.

    Args:
        name: architecture and tag in timm.
    Raises:
        PretrainedError: no weights there, weights of another architecture, an unsafe file, or no vision transformer.
    """
    given = os.environ.get(VARIABLE)
    try:
        with torch.random.fork_rng(devices=[]):  # models are initialised at random before they are loaded
            vit = _from_path(Path(given), name) if given else _from_hub(name)
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(vit)
        return PatchTeacher(vit, config["mean"], config["std"])
    except Exception as error:  # hubs and timm raise many kinds
        where = f"{VARIABLE}={given}" if given else f"the hub ({name})"
        raise PretrainedError(
            f"The teacher from {where} cannot be loaded: {reason(error)}. Ways out: connect to the network once "
            f"without {VARIABLE}, so that {name} is downloaded and kept; set {VARIABLE} to a file with the weights of "
            f"{name} (.safetensors, .pth or .pt), or to a folder in timm's layout (config.json and weights), which may "
            "hold any vision transformer, also one of your own; or train M4oEPretrainTrainer on this dataset, a masked "
            "autoencoder that needs no labels, and use the token ownTeacher of LEAFTrainer; or train with its token "
            "noAlign, which needs no teacher."
        ) from error


def _from_hub(name: str) -> nn.Module:
    """timm loads strictly as long as the classifier is the one of the weights; it is removed afterwards."""
    import timm

    vit = timm.create_model(name, pretrained=True, dynamic_img_size=True)
    vit.reset_classifier(0)
    return vit


def _from_path(path: Path, name: str) -> nn.Module:
    if path.is_file():
        return _with_weights(path, name, {}, None)
    if not path.is_dir():
        raise PretrainedError("there is no such file or folder")
    file = path / "config.json"
    if not file.is_file():
        raise PretrainedError(f"{file} does not exist")
    config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "architecture" not in config:
        raise PretrainedError(f"{file} has no key 'architecture', which timm writes")
    weights = next((path / n for n in WEIGHTS_FILES if (path / n).is_file()), None)
    if weights is None:
        raise PretrainedError(f"none of the files {', '.join(WEIGHTS_FILES)} is there")
    return _with_weights(weights, config["architecture"], config.get("model_args") or {}, config.get("pretrained_cfg"))


def _with_weights(file: Path, name: str, arguments: Mapping[str, Any], config: dict[str, Any] | None) -> nn.Module:
    """An architecture with the weights of a file, converted by timm (which knows the names of DINOv2's own files) and
    loaded strictly but for the classifier."""
    import timm

    state = _read_weights(file)
    arguments = {**arguments, "num_classes": 0, "dynamic_img_size": True}
    blank = timm.create_model(name, pretrained=False, pretrained_cfg=config, **arguments)
    _check_patch(state, blank, file)
    classifier = blank.pretrained_cfg.get("classifier") or ()
    for head in (classifier,) if isinstance(classifier, str) else classifier:
        for kind in ("weight", "bias"):
            state.pop(f"{head}.{kind}", None)
    if not state:  # timm would take this for no weights at all, and download others
        raise PretrainedError(f"{file} holds no weights")
    # timm skips the strict check where the number of classes differs from that of the weights.
    overlay = {"state_dict": state, "num_classes": 0, "source": "", "custom_load": False}
    try:
        vit = timm.create_model(
            name, pretrained=True, pretrained_cfg=config, pretrained_cfg_overlay=overlay, **arguments
        )
    except RuntimeError as error:
        raise PretrainedError(f"{file} holds other weights than those of {name}: {reason(error)}") from error
    vit.pretrained_cfg.pop("state_dict", None)
    return vit


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name, also from checkpoints that hold them under "model" or "state_dict"."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        content = read_safely(file)
    except CheckpointError as error:
        raise PretrainedError(reason(error)) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise PretrainedError(f"{file} holds no table of weights by name")
    return dict(content)


def _check_patch(state: Mapping[str, Tensor], vit: nn.Module, file: Path) -> None:
    """timm would resample weights for another patch size, and say so in its log only."""
    own = tuple(vit.patch_embed.proj.weight.shape[-2:])
    for key, value in state.items():
        if key.endswith("patch_embed.proj.weight") and tuple(value.shape[-2:]) != own:
            raise PretrainedError(
                f"{file} was trained with patches of {tuple(value.shape[-2:])} pixels, the architecture has {own}"
            )
