"""Model folders of tiny networks with random weights: not planned, not trained, otherwise as nnU-Net leaves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

BALL = {"background": 0, "ball": 1}
THREE = {"background": 0, "ball": 1, "core": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
DATASET = "Dataset871_Predict"


def plans_json(
    patch: Sequence[int],
    spacing: Sequence[float],
    channels: int,
    reader: str,
    transpose: Sequence[int],
    pointwise: bool = False,
) -> dict[str, Any]:
    """Plans of one configuration, with nnU-Net's own preprocessing, and of a cascade on top of it."""
    dim = len(patch)
    kernel, stride = (1, 1) if pointwise else (3, 2)
    norm = None if pointwise else f"torch.nn.modules.instancenorm.InstanceNorm{dim}d"
    kwargs = {
        "n_stages": 2, "features_per_stage": [4, 8], "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [[kernel] * dim] * 2, "strides": [[1] * dim, [stride] * dim], "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1], "conv_bias": True, "norm_op": norm,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "batch_dice": False,
        "patch_size": list(patch),
        "spacing": list(spacing)[-dim:],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": kwargs,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    name = "2d" if dim == 2 else "3d_fullres"
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": reader,
        "label_manager": "LabelManager",
        "transpose_forward": list(transpose),
        "transpose_backward": [list(transpose).index(a) for a in range(3)],
        "foreground_intensity_properties_per_channel": {str(c): {} for c in range(channels)},
        "configurations": {
            name: configuration,
            "3d_cascade_fullres": {"inherits_from": name, "previous_stage": "3d_lowres"},
        },
    }


def make_model(
    results: Path,
    *,
    patch: Sequence[int] = (16, 16, 16),
    spacing: Sequence[float] = (1, 1, 1),
    channels: int = 1,
    labels: Mapping[str, Any] = BALL,
    folds: Sequence[int | str] = (0,),
    trainer: str = "nnUNetTrainer",
    mirror: Sequence[int] | None = None,
    reader: str = "SimpleITKIO",
    ending: str = ".nii.gz",
    transpose: Sequence[int] = (0, 1, 2),
    configuration: str | None = None,
    pointwise: bool = False,
    more_plans: Mapping[str, Any] | None = None,
    sharpness: float = 8.0,
    seed: int = 0,
) -> Path:
    """Write a model folder below ``results`` and return it. ``sharpness`` scales the logits; a ``pointwise``
    network sees single voxels only, so overlapping tiles agree."""
    configuration = configuration or ("2d" if len(patch) == 2 else "3d_fullres")
    folder = results / DATASET / f"{trainer}__nnUNetPlans__{configuration}"
    folder.mkdir(parents=True)
    dataset_json: dict[str, Any] = {
        "channel_names": {str(c): f"MR{c}" for c in range(channels)},
        "labels": dict(labels),
        "numTraining": 4,
        "file_ending": ending,
    }
    if any(isinstance(v, list) for v in labels.values()):
        dataset_json["regions_class_order"] = [
            v[0] if isinstance(v, list) else v for name, v in labels.items() if name not in ("background", "ignore")
        ]
    content = {**plans_json(patch, spacing, channels, reader, transpose, pointwise), **(more_plans or {})}
    (folder / "plans.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    plans = PlansManager(content)
    planned = plans.get_configuration(configuration)
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    inputs = determine_num_input_channels(plans, planned, dataset_json)
    cls = recursive_find_trainer_class_by_name(trainer)
    for index, fold in enumerate(folds):
        torch.manual_seed(seed + index)
        network = cls.build_network_architecture(plans, planned, inputs, heads, enable_deep_supervision=False)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if ".seg_layers." in name:
                    parameter.mul_(sharpness)
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": network.state_dict(),
            "trainer_name": trainer,
            "init_args": {"configuration": configuration},
            "inference_allowed_mirroring_axes": None if mirror is None else tuple(mirror),
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def preprocess_like_nnunet(
    model: Path, raw: Path, preprocessed: Path, folds: Sequence[Mapping[str, list[str]]]
) -> None:
    """What ``nnUNetv2_preprocess`` leaves for the model's configuration: data, references and the split."""
    plans = PlansManager(str(model / "plans.json"))
    configuration = plans.get_configuration(model.name.split("__")[-1])
    dataset_json = json.loads((model / "dataset.json").read_text())
    folder = preprocessed / DATASET
    (folder / configuration.data_identifier).mkdir(parents=True)
    shutil.copytree(raw / "labelsTr", folder / "gt_segmentations")
    preprocessor = configuration.preprocessor_class(verbose=False)
    for label in sorted((raw / "labelsTr").iterdir()):
        case = label.name.removesuffix(dataset_json["file_ending"])
        files = [str(f) for f in sorted((raw / "imagesTr").glob(f"{case}_*"))]
        data, seg, properties = preprocessor.run_case(files, str(label), plans, configuration, dataset_json)
        target = str(folder / configuration.data_identifier / case)
        nnUNetDatasetBlosc2.save_case(data.astype(np.float32), seg, properties, target)
    (folder / "splits_final.json").write_text(json.dumps(list(folds)))
