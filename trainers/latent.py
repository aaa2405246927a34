"""Trainings in the latent space of a frozen mask codec: finding it, and checking that labels survive it."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from nnunet_diffext.data.dataset import foreground
from nnunet_diffext.inference.reconstruction import ReconstructionDice, too_lossy
from nnunet_diffext.stages import Stage, StageError
from nnunet_diffext.trainers.averaged import AveragedTrainer
from nnunet_diffext.trainers.staged import StagedTrainer

PREFLIGHT_PATCHES = 20


class LatentTrainer(AveragedTrainer, StagedTrainer):
    """Adds ``self.module.codec``, a :class:`MaskAutoencoder` found by name or through ``nnUNet_diffext_codec``.

    The settings of a subclass hold ``codec_trainer``, ``least_reconstruction`` and ``ema_decay``.
    """

    stage_name = "codec"

    def on_train_start(self) -> None:
        """nnU-Net's, then the check that costs no training time yet."""
        super().on_train_start()
        if self.current_epoch == 0 and self.codec_is_frozen:
            self.load_stage_weights()  # -pretrained_weights may have overwritten a part of them
            self.preflight()
            if self.teacher is not None:
                self.start_teacher()  # the statistics of the latents may have been measured just now

    @property
    def codec_is_frozen(self) -> bool:
        """Whether the codec stays as it was found."""
        return True

    def check_stage(self, stage: Stage) -> None:
        """It must be an autoencoder of masks."""
        super().check_stage(stage)
        if "scale.mean" not in stage.weights:
            raise StageError(
                f"{stage.folder} was trained by {stage.trainer_name}, which is no autoencoder of masks. "
                "Train one with -tr MaskAutoencoderTrainer."
            )

    def preflight(self) -> None:
        """Reconstruct the labels of training patches.

        Raises:
            StageError: a label comes out worse than ``least_reconstruction``.
        """
        codec = self.module.codec
        batches = math.ceil(PREFLIGHT_PATCHES / self.batch_size)
        masks = [self.label_space.encode(next(self.dataloader_train)["target"]) for _ in range(batches)]
        if not codec.scale.updates:  # a pretrained autoencoder knows nothing of these masks
            self.measure_latents(masks)
        score = ReconstructionDice(codec, self.label_space)
        for onehot, valid in masks:
            score.add(onehot.to(self.device), valid.to(self.device))
        if self.is_ddp:
            counts = score.counts.to(self.device)
            dist.all_reduce(counts)
            score.counts = counts.cpu()
        names = list(foreground(self.dataset_json, unique=False))
        dice = score.dice()
        said = ", ".join(f"{name} {d:.4f}" for name, d in zip(names, dice, strict=True))
        self.print_to_log_file(f"Reconstruction Dice of {batches * self.batch_size} training patches: {said}")
        lossy = too_lossy(dice, names, self.settings.least_reconstruction)
        if lossy:
            raise StageError(self._too_lossy_message(lossy))

    @torch.no_grad()
    def measure_latents(self, masks: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Mean and variance of a pretrained codec's latents."""
        for onehot, _ in masks:
            self.module.codec.scale.update(self.module.codec.raw_latents(onehot.to(self.device)))
        if self.is_ddp:
            for buffer in (self.module.codec.scale.mean, self.module.codec.scale.variance):
                dist.broadcast(buffer, 0)

    def _too_lossy_message(self, lossy: dict[str, float]) -> str:
        codec = self.module.codec
        worst = ", ".join(f"{name} (Dice {d:.3f})" for name, d in lossy.items())
        return (
            f"The latent space loses too much of {worst}: no method on top of it can do better. It has stride "
            f"{'x'.join(map(str, codec.stride))} and {codec.channels} channels. Train the codec longer, with a smaller "
            f"stride or with more channels, for example -tr MaskAutoencoderTrainer_stride{max(codec.stride) // 2 or 1}_"
            f"channels{2 * codec.channels}, and point nnUNet_diffext_codec to it. To go on all the same, lower "
            f"least_reconstruction ({self.settings.least_reconstruction}): token preflight0p8."
        )
