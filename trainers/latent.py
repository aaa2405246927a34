"""Trainings in the latent space of a frozen mask codec: finding it, and checking that labels survive it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nnunet_diffext.data.dataset import foreground
from nnunet_diffext.inference.reconstruction import ReconstructionDice, too_lossy
from nnunet_diffext.settings import setting
from nnunet_diffext.stages import Stage, StageError
from nnunet_diffext.trainers.averaged import AveragedTrainer
from nnunet_diffext.trainers.diffusion import DiffusionSettings
from nnunet_diffext.trainers.staged import StagedTrainer

PREFLIGHT_PATCHES = 20


@dataclass(frozen=True, kw_only=True)
class LatentSettings(DiffusionSettings):
    """Settings of trainings in a latent space of masks."""

    recycle: bool = setting(
        False, "noise the denoiser's own first guess in training, as samples do, not the labels' latents (paper); "
        "only where clean latents are predicted",
        switches={"recycle": True},
    )  # fmt: skip

    @property
    def recycles(self) -> bool:
        """Other predictions than the clean latents have no target for a guess that is wrong."""
        return self.recycle and self.kind == "x0"


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
        targets = [next(self.dataloader_train)["target"] for _ in range(batches)]
        if self.stage is None:  # a pretrained autoencoder knows nothing of these masks
            self.measure_latents(targets)
        score = ReconstructionDice(codec, self.label_space)
        for target in targets:
            score.add(*self.label_space.encode(target.to(self.device)))
        if self.is_ddp:
            counts = score.counts.to(self.device)
            dist.all_reduce(counts)
            score.counts = counts.cpu()
        names = list(foreground(self.dataset_json, unique=False))
        dice = score.dice()
        said = ", ".join(f"{name} {d:.4f}" for name, d in zip(names, dice, strict=True))
        self.print_to_log_file(f"Reconstruction Dice of {batches * self.batch_size} training patches: {said}")
        unseen = [name for name, d in zip(names, dice, strict=True) if math.isnan(d)]
        if unseen:
            self.print_to_log_file(
                f"WARNING: no patch showed {', '.join(unseen)}: not known how much of it survives the latent space."
            )
        lossy = too_lossy(dice, names, self.settings.least_reconstruction)
        if lossy:
            raise StageError(self._too_lossy_message(lossy))

    @torch.no_grad()
    def measure_latents(self, targets: list[Tensor]) -> None:
        """Mean and variance of a pretrained codec's latents, on nnU-Net's targets."""
        codec = self.module.codec
        codec.scale.updates.zero_()  # -pretrained_weights may have brought those of other masks
        for target in targets:
            onehot, _ = self.label_space.encode(target.to(self.device))
            codec.scale.update(codec.raw_latents(onehot))
        if self.is_ddp:
            for buffer in (codec.scale.mean, codec.scale.variance):
                dist.broadcast(buffer, 0)

    def estimate_loss(self, logits: Tensor, clean: Tensor, valid: Tensor, trust: Tensor, **options: float) -> Tensor:
        """``L_seg`` of decoded estimates, that of every sample times its trust ``(B, 1, 1, ...)``.

        As a weight of voxels, trust would cancel: the losses are means, and Dice is a ratio.
        """
        if self.settings.kind != "eps":  # it is 1
            return self.segmentation_loss(logits, clean, valid, **options)
        samples = zip(logits.split(1), clean.split(1), valid.split(1), trust.flatten(), strict=True)
        return torch.stack([t * self.segmentation_loss(x, y, v, **options) for x, y, v, t in samples]).mean()

    def _too_lossy_message(self, lossy: dict[str, float]) -> str:
        codec = self.module.codec
        worst = ", ".join(f"{name} (Dice {d:.3f})" for name, d in lossy.items())
        if self.stage is None:
            how = "A pretrained autoencoder cannot be trained further: leave the token 'kl8' out. Train a codec"
        else:
            how = "Train the codec longer,"
        return (
            f"The latent space loses too much of {worst}: no method on top of it can do better. It has stride "
            f"{'x'.join(map(str, codec.stride))} and {codec.channels} channels. {how} with a smaller stride or with "
            f"more channels, for example -tr MaskAutoencoderTrainer_stride{max(codec.stride) // 2 or 1}_channels"
            f"{2 * codec.channels}, and point nnUNet_diffext_codec to it. To go on all the same, lower "
            f"least_reconstruction ({self.settings.least_reconstruction}): token preflight0p8."
        )
