"""Plans, networks, trainers and batches of a few kilobytes, made by hand: no data set, no planning, no loaders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.dmed import DMEDNet
from nnunet_diffext.trainers import find_trainer

DATASET = "Dataset999_Tiny"
UNETS = "dynamic_network_architectures.architectures.unet"
BINARY = {"background": 0, "ball": 1}


@dataclass(frozen=True)
class Kind:
    """What nnU-Net might plan. ``strides`` and ``patch`` have one entry per axis."""

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    residual: bool = False
    features: tuple[int, ...] = (8, 16, 32)

    @property
    def dim(self) -> int:
        return len(self.patch)

    @property
    def configuration(self) -> str:
        return "2d" if self.dim == 2 else "3d_fullres"


KINDS = {
    "2d": Kind((16, 24), ((1, 1), (2, 2), (2, 2))),
    "2d-resenc": Kind((16, 24), ((1, 1), (2, 2), (2, 1)), residual=True),
    "3d": Kind((8, 12, 16), ((1, 1, 1), (2, 2, 2), (2, 2, 2))),
    "3d-aniso": Kind((6, 16, 12), ((1, 1, 1), (1, 2, 2), (2, 2, 2))),
    "3d-aniso-resenc": Kind((6, 16, 12), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), residual=True),
    "2d-deep": Kind((64, 64), ((1, 1), *((2, 2),) * 5), features=(4, 8, 8, 8, 8, 8)),
    "2d-shallow": Kind((16, 16), ((1, 1), (2, 2)), features=(8, 16)),
}


def arch_block(kind: Kind) -> dict[str, Any]:
    """The ``architecture`` block of a configuration, as nnU-Net's planners write it."""
    n = len(kind.features)
    flat = kind.dim == 3  # nnU-Net does not convolve along axes that it does not pool yet
    kernels = [[1 if s == 1 and flat and level else 3 for s in stride] for level, stride in enumerate(kind.strides)]
    blocks = {"n_blocks_per_stage": [1, 2, 2, 2, 2, 2][:n]} if kind.residual else {"n_conv_per_stage": [2] * n}
    return {
        "network_class_name": f"{UNETS}.{'ResidualEncoderUNet' if kind.residual else 'PlainConvUNet'}",
        "arch_kwargs": {
            "n_stages": n,
            "features_per_stage": list(kind.features),
            "conv_op": f"torch.nn.modules.conv.Conv{kind.dim}d",
            "kernel_sizes": kernels,
            "strides": [list(s) for s in kind.strides],
            **blocks,
            "n_conv_per_stage_decoder": [1 if kind.residual else 2] * (n - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{kind.dim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def make_plans(kind: str | Kind, *, batch_dice: bool = False) -> dict[str, Any]:
    """A plans dictionary with one configuration, as ``nnUNetv2_train`` hands it to a trainer."""
    kind = KINDS[kind] if isinstance(kind, str) else kind
    axes = list(range(3))
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner",
        "original_median_shape_after_transp": [16, 16, 16],
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "transpose_forward": axes,
        "transpose_backward": axes,
        "continue_training": False,
        "configurations": {
            kind.configuration: {
                "data_identifier": "nnUNetPlans_tiny",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(kind.patch),
                "spacing": [1.0] * kind.dim,
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "batch_dice": batch_dice,
                "architecture": arch_block(kind),
            }
        },
    }


def make_dataset_json(
    labels: Mapping[str, int | Sequence[int]] | None = None,
    channels: int = 1,
    diffext: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``dataset.json``; labels that are lists are regions."""
    labels = {k: v if isinstance(v, int) else list(v) for k, v in (labels or BINARY).items()}
    regions = [v for k, v in labels.items() if v != 0 and k != "ignore"]
    has_regions = any(not isinstance(v, int) for v in regions)
    return {
        "channel_names": {str(c): f"MR{c}" for c in range(channels)},
        "labels": labels,
        "numTraining": 8,
        "file_ending": ".nii.gz",
        **({"regions_class_order": [v if isinstance(v, int) else v[-1] for v in regions]} if has_regions else {}),
        **({} if diffext is None else {"diffext": dict(diffext)}),
    }


def make_architecture(kind: str | Kind) -> Architecture:
    """The planned U-Net of a kind."""
    block = arch_block(KINDS[kind] if isinstance(kind, str) else kind)
    return Architecture.from_plans(block["network_class_name"], block["arch_kwargs"], block["_kw_requires_import"])


def make_net(kind: str | Kind, *, heads: int = 2, channels: int = 1, regions: bool = False, **kwargs: Any) -> DMEDNet:
    """A seeded :class:`DMEDNet`."""
    torch.manual_seed(0)
    return DMEDNet(make_architecture(kind), channels, LabelSpace(heads, regions), **kwargs)


def make_trainer(
    tokens: str = "",
    kind: str | Kind = "2d",
    *,
    base: str = "DMEDSegTrainer",
    labels: Mapping[str, int | Sequence[int]] | None = None,
    channels: int = 1,
    batch_dice: bool = False,
    plans: dict[str, Any] | None = None,
    fold: int | str = 0,
    diffext: Mapping[str, Any] | None = None,
) -> Any:
    """A trainer on the CPU, not initialised yet. The nnU-Net folders of the environment are used."""
    folder = Path(os.environ["nnUNet_preprocessed"]) / DATASET / "nnUNetPlans_tiny"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case_000.b2nd").touch()
    name = "_".join([base, *([tokens] if tokens else [])])
    kind = KINDS[kind] if isinstance(kind, str) else kind
    torch.manual_seed(0)
    return find_trainer(name)(
        plans or make_plans(kind, batch_dice=batch_dice), kind.configuration, fold,
        make_dataset_json(labels, channels, diffext), torch.device("cpu"),
    )  # fmt: skip


def ready_trainer(tokens: str = "", kind: str | Kind = "2d", **kwargs: Any) -> Any:
    """As :func:`make_trainer`, with network and optimiser, in training mode."""
    trainer = make_trainer(tokens, kind, **kwargs)
    trainer.initialize()
    trainer.network.train()
    return trainer


def make_batch(trainer: Any, *, unlabeled: bool = True, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Random images; targets as nnU-Net's loader gives them, unrelated to the images."""
    generator = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    channels = trainer.num_input_channels
    space = trainer.label_space
    draw = {"generator": generator}
    data = {"data": torch.randn(batch, channels, *patch, **draw)}
    if space.regions:
        data["target"] = torch.rand(batch, space.target_channels, *patch, **draw) < 0.3
    else:
        data["target"] = torch.randint(space.num_heads, (batch, 1, *patch), **draw).short()
    if unlabeled:
        weak = torch.randn(batch, channels, *patch, **draw)
        data["unlabeled"] = torch.cat([weak, weak + 0.1 * torch.randn(weak.shape, **draw)], dim=1)
    return data


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def dice(a: Tensor, b: Tensor) -> float:
    """Dice of two boolean masks."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@torch.no_grad()
def check_extreme_images(net: nn.Module, image: Tensor) -> None:
    """nnU-Net sums Gaussian-weighted logits in half precision: of constant and of huge patches as well.

    Args:
        net: in eval mode.
        image: ``(B, C, *patch)`` with at least 3 samples.
    """
    image = image.clone()
    image[0], image[1], image[2] = 0, 1e4, 1e4 * image[2]
    out = net(image)
    assert torch.isfinite(out).all() and out.abs().max() < 800


@torch.no_grad()
def check_cases_are_independent(net: nn.Module, image: Tensor) -> None:
    """What is predicted for a case does not depend on its batch, but on the case (METHODS 3.5-5)."""
    p, alone = net.probabilities(image), net.probabilities(image[1:2])
    torch.testing.assert_close(p[1:2], alone, atol=1e-4, rtol=0)
    assert (p[0] - p[1]).abs().max() > 1e-3, "every case looks the same"
