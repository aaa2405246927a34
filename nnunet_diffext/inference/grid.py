"""Between the files of a case and the grid that the network works on, there and back, by nnU-Net's own functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager, convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_diffext.data.dataset import foreground
from nnunet_diffext.diffusion import LabelSpace


@dataclass(frozen=True)
class ModelPlans:
    """What a trained model says about its data. Picklable: worker processes get one.

    Attributes:
        plans: nnU-Net's plans.
        configuration: the one of the model.
        dataset_json: as the model was trained with.
    """

    plans: PlansManager
    configuration: ConfigurationManager
    dataset_json: dict[str, Any]

    @classmethod
    def of(cls, predictor: nnUNetPredictor) -> ModelPlans:
        """Those of an initialised predictor."""
        return cls(predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json)

    @property
    def labels(self) -> LabelManager:
        """nnU-Net's label manager."""
        return self.plans.get_label_manager(self.dataset_json)

    @property
    def space(self) -> LabelSpace:
        """Heads of the network."""
        labels = self.labels
        return LabelSpace(labels.num_segmentation_heads, labels.has_regions)

    @property
    def channel_names(self) -> list[str]:
        """Of the images, in order."""
        names = self.dataset_json.get("channel_names", self.dataset_json.get("modality"))
        return list(names.values())

    @property
    def file_ending(self) -> str:
        """Of images and segmentations, with the dot."""
        return self.dataset_json["file_ending"]

    @property
    def is_cascade(self) -> bool:
        """Whether the network also needs the segmentation of an earlier stage."""
        return self.configuration.previous_stage_name is not None

    def foreground(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Name in dataset.json -> label values it consists of, and the index of its probability."""
        offset = 0 if self.labels.has_regions else 1
        labels = foreground(self.dataset_json, unique=False)
        return {name: (values, index + offset) for index, (name, values) in enumerate(labels.items())}


def preprocess(
    model: ModelPlans, files: Sequence[str], previous_stage: str | None = None, verbose: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Preprocessed image ``(C, *)`` float32, with the one-hot segmentation of the previous stage, if any, and nnU-Net's
    properties.

    Raises:
        ValueError: the preprocessed image contains NaN or Inf.
    """
    preprocessor = model.configuration.preprocessor_class(verbose=verbose)
    arguments = (model.plans, model.configuration, model.dataset_json)
    data, segmentation, properties = preprocessor.run_case(list(files), previous_stage, *arguments)
    if previous_stage is not None:
        data = with_previous_stage(model, data, segmentation[0])
    data = np.ascontiguousarray(data, dtype=np.float32)
    if not np.isfinite(data).all():
        raise ValueError("the preprocessed image contains NaN or Inf; look for such voxels in the files")
    return data, properties


def with_previous_stage(model: ModelPlans, data: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
    """Image ``(C, *)`` with the foreground labels of a segmentation ``(*)`` as further channels."""
    return np.vstack((data, convert_labelmap_to_one_hot(segmentation, model.labels.foreground_labels, data.dtype)))


def probabilities_to_original(
    model: ModelPlans, probabilities: np.ndarray, properties: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Segmentation ``(*)`` and probabilities ``(K, *)`` on the grid of the files, as nnU-Net makes them from logits.

    Probabilities are resampled by the plans' ``resampling_fn_probabilities``; outside of the crop all is background.
    """
    labels = model.plans.get_label_manager(model.dataset_json, inference_nonlin=_are_probabilities)
    segmentation, resampled = convert_predicted_logits_to_segmentation_with_correct_shape(
        torch.from_numpy(probabilities), model.plans, model.configuration, labels, properties, return_probabilities=True
    )
    resampled = np.clip(np.asarray(resampled, dtype=np.float32), 0, 1)  # cubic resampling overshoots
    if not labels.has_regions:
        resampled /= resampled.sum(0, keepdims=True)
    return np.asarray(segmentation), resampled


def maps_to_original(model: ModelPlans, maps: np.ndarray, properties: dict[str, Any]) -> np.ndarray:
    """Maps ``(c, *)`` of the preprocessed image on the grid of the files, float32; 0 outside of the crop, where nnU-Net
    is certain of background."""
    plans, configuration = model.plans, model.configuration
    original = [properties["spacing"][i] for i in plans.transpose_forward]
    shape = properties["shape_after_cropping_and_before_resampling"]
    spacing = list(configuration.spacing)
    if len(spacing) < len(shape):  # a 2d configuration leaves the slices as they are
        spacing = [original[0], *spacing]
    resampled = configuration.resampling_fn_probabilities(maps, shape, spacing, original)
    result = np.zeros((len(maps), *properties["shape_before_cropping"]), dtype=np.float32)
    insert_crop_into_image(result, np.asarray(resampled, dtype=np.float32), properties["bbox_used_for_cropping"])
    return result.transpose([0, *(axis + 1 for axis in plans.transpose_backward)])


def inside_crop(model: ModelPlans, array: np.ndarray, properties: dict[str, Any]) -> np.ndarray:
    """The part of ``(*)`` or ``(c, *)``, on the grid of the files, that the network has seen."""
    extra = array.ndim - len(model.plans.transpose_forward)
    axes = [*range(extra), *(axis + extra for axis in model.plans.transpose_forward)]
    box = tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])
    return array.transpose(axes)[(slice(None),) * extra + box]


def _are_probabilities(x: torch.Tensor) -> torch.Tensor:
    return x
