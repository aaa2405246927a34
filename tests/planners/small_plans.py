"""Plans of networks that are small enough to run on a CPU."""

from __future__ import annotations

from typing import Any

DATASET_JSON: dict[str, Any] = {
    "channel_names": {"0": "MR"},
    "labels": {"background": 0, "ball": 1},
    "numTraining": 4,
    "file_ending": ".nii.gz",
}


def plans_for(
    patch_size: tuple[int, ...], batch_size: int = 2, features: tuple[int, ...] = (8, 16, 32), **more: Any
) -> dict[str, Any]:
    """Plans with one configuration, ``conf``, of a PlainConvUNet as small as a test needs."""
    dim, stages = len(patch_size), len(features)
    kwargs = {
        "n_stages": stages, "features_per_stage": list(features), "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [[3] * dim] * stages, "strides": [[1] * dim] + [[2] * dim] * (stages - 1),
        "n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1), "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "patch_size": list(patch_size), "batch_size": batch_size, "batch_dice": False,
        "architecture": architecture, **more,
    }  # fmt: skip
    names = {"dataset_name": "Dataset961_Plan", "plans_name": "x", "label_manager": "LabelManager"}
    return {**names, "configurations": {"conf": configuration}}
