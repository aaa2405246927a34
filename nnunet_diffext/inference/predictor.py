"""Predictions with uncertainty, for any model folder of nnU-Net or of this package.

predictor = Predictor("<nnUNet_results>/DATASET/TRAINER__PLANS__CONFIGURATION", folds=(0,), device="cuda")
result = predictor.predict_case(["case_0000.nii.gz"], variance=True)
result["segmentation"], result["probabilities"], result["entropy"], result["quality"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_diffext.inference.calibration_file import stored_temperature
from nnunet_diffext.inference.ensemble import Ensemble, TileEnsemble
from nnunet_diffext.inference.export import to_case_result
from nnunet_diffext.inference.grid import ModelPlans, preprocess
from nnunet_diffext.inference.members import NoiseFields, mirror_combinations, resolve_sampling
from nnunet_diffext.inference.modality import modality_of_image
from nnunet_diffext.inference.model_folder import FINAL, load_predictor, network_of
from nnunet_diffext.inference.sliding import average_over_tiles, padded, tile_positions
from nnunet_diffext.networks.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that changes probabilities: what a temperature was fitted for, and what a prediction was made with."""

    folds: tuple[int | str, ...]
    checkpoint: str
    step_size: float
    mirroring: bool
    samples: int
    steps: int
    sampler: str
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self), "folds": list(self.folds)}


class Predictor:
    """A trained model, ready to predict.

    Args:
        model_folder: ``<trainer>__<plans>__<configuration>``, with ``plans.json`` and ``dataset.json``.
        folds: whose predictions are averaged.
        checkpoint: file name inside of each fold's folder.
        device: ``"cuda"``, ``"cpu"`` or ``"mps"``.
        step_size: of the sliding window, relative to the patch.
        mirroring: average over mirrored passes.
        samples: per pass; 0: the deterministic forward; ``None``: the network's own default. Likewise ``steps``
            (denoiser evaluations per sample) and ``sampler``.
        seed: of the samples.
        temperature: of the final probabilities; ``None``: the one in the folder's ``calibration.json``, else 1.
        on_device: collect results on the device if they fit.
        verbose: nnU-Net's own messages.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: the model, the device or a setting cannot be used.
    """

    def __init__(
        self,
        model_folder: str | Path,
        folds: Sequence[int | str] = (0,),
        *,
        checkpoint: str = FINAL,
        device: str = "cpu",
        step_size: float = 0.5,
        mirroring: bool = True,
        samples: int | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        temperature: float | None = None,
        on_device: bool = True,
        verbose: bool = False,
    ) -> None:
        self.model_folder, self.folds, self.checkpoint = Path(model_folder), tuple(folds), checkpoint
        self.temperature = stored_temperature(self.model_folder) if temperature is None else temperature
        self.nnunet = load_predictor(
            self.model_folder, self.folds, checkpoint=checkpoint, device=device, step_size=step_size,
            mirroring=mirroring, on_device=on_device, verbose=verbose,
        )  # fmt: skip
        self.model = ModelPlans.of(self.nnunet)
        self.sampling: Sampling = resolve_sampling(self._network, samples, steps, sampler, seed)
        self.mirrors = mirror_combinations(self.nnunet.allowed_mirroring_axes if mirroring else None)

    @property
    def settings(self) -> Settings:
        """What the probabilities depend on, beside the weights."""
        return Settings(
            folds=self.folds,
            checkpoint=self.checkpoint,
            step_size=self.nnunet.tile_step_size,
            mirroring=self.nnunet.use_mirroring,
            **asdict(self.sampling),
        )

    @property
    def members(self) -> int:
        """Of the ensemble: folds x mirrored passes x samples."""
        return len(self.folds) * len(self.mirrors) * max(1, self.sampling.samples)

    @property
    def _network(self) -> nn.Module:
        return network_of(self.nnunet)

    def tiles(self, data: np.ndarray) -> int:
        """Into how many tiles the sliding window cuts a preprocessed image ``(C, *)``."""
        patch = self.model.configuration.patch_size
        planes = data.ndim - 1 - len(patch)
        volume = [*data.shape[1 : 1 + planes], *map(max, data.shape[1 + planes :], patch)]
        return sum(1 for _ in tile_positions(volume, patch, self.nnunet.tile_step_size))

    @torch.inference_mode()
    def predict_preprocessed(self, data: np.ndarray, *, variance: bool = False, samples: bool = False) -> Ensemble:
        """Average all members.

        Args:
            data: preprocessed image ``(C, *)``; for a cascade with the one-hot segmentation of the previous stage.
            variance: also the variance of the members.
            samples: also every sample apart. Needs memory for samples x K volumes.

        Raises:
            ValueError: the network's output is not finite, or it does not sample.
        """
        if samples and not self.sampling.samples:
            raise ValueError("There are no samples to keep: this prediction is deterministic (see -samples).")
        image = torch.from_numpy(data)
        space, sampling = self.model.space, self.sampling
        noise = None
        if sampling.samples:
            volume = padded(image, self.model.configuration.patch_size)[0].shape[1:]
            noise = NoiseFields(
                getattr(self._network, "noise_channels", space.num_heads), volume, sampling.samples, sampling.seed
            )
        # The compiled network, if it is; `sample` of a compiled module is that of the module itself.
        tiles = TileEnsemble(
            self.nnunet.network, space, self.model.labels.apply_inference_nonlin, mirrors=self.mirrors,
            sampling=sampling, noise=noise, second_moment=variance, keep_samples=samples,
        )  # fmt: skip
        weights = self.nnunet.list_of_parameters
        maps = totals = None
        with modality_of_image(self.nnunet, image):
            for state in weights:
                if len(weights) > 1:
                    self._network.load_state_dict(state)
                more, counts = average_over_tiles(self.nnunet, image, tiles.channels, tiles)
                maps = more if maps is None else maps.add_(more)
                totals = counts if totals is None else totals + counts
        return tiles.finish(maps.div_(len(weights)), totals, len(weights))

    def predict_case(
        self,
        files: Sequence[str | Path],
        previous_stage: str | Path | None = None,
        *,
        variance: bool = False,
        samples: bool = False,
    ) -> dict[str, Any]:
        """Predict one case from its files.

        Args:
            files: channels, in order.
            previous_stage: segmentation of the previous stage; a cascade needs it.
            variance: also the map ``variance``.
            samples: also the segmentations of the single ``samples``.

        Returns:
            On the grid of the files, in the axis order of the dataset's reader: ``segmentation (*)``, ``probabilities
            (K, *)``, ``entropy (*)``, ``mutual_information (*)``, ``variance (*)`` if asked for, ``samples`` (a list);
            ``quality``, see :mod:`~nnunet_diffext.inference.quality`; and ``properties`` for nnU-Net's writers.

        Raises:
            ValueError: a cascade without ``previous_stage``; values that are not finite.
        """
        if self.model.is_cascade and previous_stage is None:
            stage = self.model.configuration.previous_stage_name
            raise ValueError(f"This is a cascade: it needs the segmentation that {stage} predicted for the case.")
        previous = None if previous_stage is None else str(previous_stage)
        data, properties = preprocess(self.model, [str(f) for f in files], previous)
        ensemble = self.predict_preprocessed(data, variance=variance, samples=samples)
        result = to_case_result(self.model, ensemble, properties, self.temperature)
        return {
            "segmentation": result.segmentation,
            "probabilities": result.probabilities,
            **result.maps,
            "samples": result.samples,
            "quality": result.quality,
            "properties": result.properties,
        }
