"""LEAF (Huang et al., MICCAI 2025): latent diffusion in one step, features distilled from a vision transformer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_diffext.data.dataset import channel_names
from nnunet_diffext.losses.alignment import feature_alignment
from nnunet_diffext.losses.diffusion import masked_error
from nnunet_diffext.networks.blocks.projector import PROJECTORS, Projector
from nnunet_diffext.networks.leaf import LEAFNet, LEAFOutput
from nnunet_diffext.pretrained import PretrainedError
from nnunet_diffext.pretrained.autoencoder import load_autoencoder
from nnunet_diffext.settings import PLANS_KEY, SettingsError, setting
from nnunet_diffext.trainers.adam import AdamTrainer
from nnunet_diffext.trainers.kl_codec import kl_codec
from nnunet_diffext.trainers.latent import LatentSettings, LatentTrainer
from nnunet_diffext.trainers.staged import build_network_of
from nnunet_diffext.trainers.teacher import OWN, Teacher, find_teacher

KL8 = "stabilityai/sd-vae-ft-mse"
"""The autoencoder of latent diffusion with stride 8 and 4 channels (Rombach et al. 2022)."""
CODEC_VARIABLE = "nnUNet_diffext_codec"


@dataclass(frozen=True, kw_only=True)
class LEAFSettings(LatentSettings):
    """Settings of :class:`LEAFTrainer`. "Paper" is Huang et al., MICCAI 2025."""

    presets = {
        "eps": (
            "the U-Net predicts the noise (Table 2), which rules out zero terminal SNR",
            {"kind": "eps", "zero_terminal_snr": False},
        ),
        "paper": (
            "the paper's recipe: learning rate 4e-5, constant; uniform t; latents of image and mask of the same width",
            {
                "initial_lr": 4e-5, "lr_decay": "constant", "weight_decay": 0.01, "terminal_share": 0.0,
                "zero_terminal_snr": False, "image_latents": 0, "lambda_seg": 0.0,
            },
        ),
    }  # fmt: skip

    codec: str = setting(
        "masks", "'masks': a MaskAutoencoder trained before; 'kl8': a pretrained image autoencoder of diffusers, "
        "classes as colours, 2D only (nnUNet_diffext_codec: hub id or folder)",
        choices=("masks", "kl8"), switches={"kl8": "kl8"},
    )  # fmt: skip
    codec_config: dict | None = setting(None, "architecture of a pretrained codec, filled in when it is loaded")
    codec_trainer: str = setting(
        "MaskAutoencoderTrainer", "trainer of the codec; the variable nnUNet_diffext_codec names a model folder instead"
    )
    least_reconstruction: float = setting(
        0.95, "Dice that the codec must reach for every label on training patches", number="preflight#",
        minimum=0, maximum=1,
    )  # fmt: skip
    schedule: str = setting(
        "latent_linear", "noise schedule; latent_linear is that of the authors' code",
        choices=("latent_linear", "scaled_linear", "linear", "cosine"), switches={"cosine": "cosine"},
    )  # fmt: skip
    squared: bool = setting(False, "squared error on the latents instead of eq. 4's L1", switches={"l2": True})
    lambda_seg: float = setting(
        1.0, "weight of Dice + CE on the decoded estimate; 0 in the paper", number="seg#", minimum=0
    )
    image_latents: int = setting(
        32, "channels of the image's latents; 0: as many as the masks' (paper)", number="imageLatents#", minimum=0
    )
    clip_latents: bool = setting(
        False, "clamp estimates to [-1, 1], as the authors' code does", switches={"clipLatents": True}
    )
    from_codec: bool = setting(
        True, "start the image encoder from the codec's weights, where shapes agree", switches={"scratchEncoder": False}
    )

    lambda_align: float = setting(
        0.5, "weight of feature alignment per token (eq. 5, 6; Table 3's lambda is also divided by the batch size 4)",
        number="align#", switches={"noAlign": 0.0}, minimum=0,
    )  # fmt: skip
    align_level: int = setting(
        1, "level of the U-Net's encoder that is aligned, 0 = the latents' resolution", number="alignLevel#", minimum=0
    )
    align_until: float = setting(
        1.0, "share of the epochs after which alignment stops", number="alignUntil#", minimum=0, maximum=1
    )
    align_slices: int = setting(
        2, "in 3D: axial slices per volume and step that the teacher sees", number="alignSlices#", minimum=1
    )
    teacher: str = setting(
        "vit_small_patch14_reg4_dinov2.lvd142m", "timm name of the teacher, or 'ownTeacher', a masked autoencoder of "
        "the same images; nnUNet_diffext_teacher names local weights, or a model folder of M4oEPretrainTrainer",
        switches={"vitb": "vit_base_patch14_reg4_dinov2.lvd142m", "ownTeacher": OWN},
    )  # fmt: skip
    projector: str = setting("mlp", "phi of eq. 5", choices=PROJECTORS, switches={"convProjector": "conv"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codec == "kl8" and self.image_latents not in (0, LEAFSettings.image_latents):
            raise SettingsError("'kl8' brings its own image encoder: leave out 'imageLatents#'.")
        if self.recycle and not self.recycles:
            raise SettingsError(f"'recycle' needs clean latents as prediction, not '{self.kind}': leave one out.")


class LEAFTrainer(AdamTrainer, LatentTrainer):
    """Predicts the latent of the mask in one step; its features imitate a vision transformer's in training."""

    Settings = LEAFSettings
    base_name = "LEAFTrainer"
    reference = (
        "Huang, Q., Lin, T., Chen, Z., Zheng, F. (2025). LEAF: Latent Diffusion with Efficient Encoder Distillation "
        "for Aligned Features in Medical Image Segmentation. MICCAI 2025."
    )
    vision: Teacher | None = None
    projector: nn.Module | None = None
    _token_width: int | None = None

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """:class:`LEAFNet` with its codec, from the plans alone, the same in training and at prediction."""
        s, label_space, architecture = LEAFTrainer.read_plans(plans_manager, configuration_manager)
        arguments = (plans_manager, configuration_manager, num_input_channels, num_output_channels)
        if s.codec == "kl8":
            schemes = configuration_manager.normalization_schemes
            codec = kl_codec(s.codec_config, architecture, label_space, num_input_channels, schemes)
        else:
            codec = build_network_of(s.codec_trainer, *arguments)
        return LEAFNet(
            codec,
            architecture,
            num_input_channels,
            label_space,
            image_latents=s.image_latents or None,
            align_level=s.align_level,
            kind=s.kind,
            schedule=s.schedule,
            timesteps=s.timesteps,
            zero_terminal_snr=s.zero_terminal_snr,
            terminal_share=s.terminal_share,
            clip_latents=s.clip_latents,
            sampling=s.sampling,
        )

    # ------------------------------------------------------------------ the teacher, outside the network
    @property
    def aligns(self) -> bool:
        """Whether features are aligned in this epoch; it stops between epochs, over which nnU-Net averages losses."""
        return self.projector is not None and self.current_epoch < self.settings.align_until * self.num_epochs

    def initialize(self) -> None:
        """Load the teacher before any work is done. What is continued may need none, see :meth:`on_train_start`."""
        s = self.settings
        fresh = not self.was_initialized
        if fresh and s.lambda_align > 0 and not self._continues:
            self.vision = find_teacher(self, s.teacher).to(self.device)
            self._token_width = self.vision.channels
        pretrained = self._find_autoencoder() if fresh and s.codec == "kl8" else None
        super().initialize()
        if pretrained is not None:
            self.module.codec.autoencoder.load_state_dict(pretrained.state_dict())
        if fresh and s.from_codec:
            count = self.module.start_from_codec()
            self.print_to_log_file(f"The image encoder starts with {count} tensors of the codec's encoder.")

    def _check_same_network(self, checkpoint: Mapping[str, Any], filename: str) -> None:
        """Before the network is built: the projector has the width that the checkpoint's has."""
        if "diffext_projector" in checkpoint:
            self._token_width = len([*checkpoint["diffext_projector"].values()][-1])  # the last bias
        super()._check_same_network(checkpoint, filename)

    def on_train_start(self) -> None:
        """A continued training loads its teacher if it still aligns.

        Raises:
            PretrainedError, StageError: there is none, or another one than the training began with.
        """
        if self.aligns and self.vision is None:
            self.vision = find_teacher(self, self.settings.teacher).to(self.device)
            if self.vision.channels != self._token_width:
                raise PretrainedError(
                    f"The teacher has tokens of width {self.vision.channels}, but this training began with a teacher "
                    f"of width {self._token_width}. Let nnUNet_diffext_teacher name the one that it began with."
                )
        super().on_train_start()

    @property
    def builds_on_stage(self) -> bool:
        """Not with a pretrained autoencoder."""
        return self.settings.codec == "masks"

    def _find_autoencoder(self) -> nn.Module | None:
        """The pretrained autoencoder; ``None`` where a checkpoint that is continued holds it."""
        blocks = self._recorded_blocks() if self._continues else None
        config = None if blocks is None else blocks[self.base_name]["codec_config"]
        autoencoder = None
        if config is None:
            autoencoder, config = load_autoencoder(os.environ.get(CODEC_VARIABLE) or KL8)
        self.settings = replace(self.settings, codec_config=config)
        self.plans_manager.plans[PLANS_KEY][self.base_name]["codec_config"] = config
        return autoencoder

    def trainable(self) -> Iterable[nn.Parameter]:
        """The network's, and those of the projector."""
        if self._token_width is None:
            return super().trainable()
        # not self.module: nnU-Net wraps the network after the optimiser was made
        projector = Projector(self.network.align_channels, self._token_width, self.settings.projector)
        self.projector = projector.to(self.device)
        if self.is_ddp:
            self.projector = DistributedDataParallel(self.projector)
        return chain(super().trainable(), self.projector.parameters())

    @property
    def _plain_projector(self) -> nn.Module:
        """Without its DDP wrapper, so that a checkpoint does not depend on the number of GPUs."""
        return self.projector.module if self.is_ddp else self.projector

    def extra_checkpoint(self) -> dict[str, Any]:
        """Also the projector."""
        extra = super().extra_checkpoint()
        return extra if self.projector is None else {**extra, "diffext_projector": self._plain_projector.state_dict()}

    def restore_extra(self, checkpoint: Mapping[str, Any]) -> None:
        """Also the projector."""
        super().restore_extra(checkpoint)
        if self.projector is not None and "diffext_projector" in checkpoint:
            self._plain_projector.load_state_dict(checkpoint["diffext_projector"])

    # ------------------------------------------------------------------ losses
    def loss_weights(self) -> Mapping[str, float]:
        """Eq. 6, and the weight of the decoded loss."""
        return {"align": self.settings.lambda_align, "sup": self.settings.lambda_seg}

    def compute_losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``latent`` (eq. 4), ``align`` (eq. 5), ``sup``: Dice + CE of the decoded estimate."""
        clean, valid = self.label_space.encode(batch["target"])
        out: LEAFOutput = self.network(batch["data"], clean=clean, recycle=self.settings.recycles)
        losses = {"latent": masked_error(out.prediction, out.target, valid, squared=self.settings.squared)}
        if self.settings.lambda_seg > 0:
            losses["sup"] = self.estimate_loss(self.module.codec.decode(out.estimate), clean, valid, out.trust)
        if self.aligns:
            losses["align"] = self.alignment(batch["data"], out.features, batch.get("keys"))
        return losses

    def alignment(self, image: Tensor, features: Tensor, keys: Sequence[str] | None = None) -> Tensor:
        """Eq. 5: features ``(B, F, *grid)`` of the U-Net against the teacher's tokens of the same places."""
        image = image[:, : len(channel_names(self.dataset_json))]  # in a cascade, masks of the stage before follow
        features, tokens = self.vision.pair(image.float(), features, self.settings.align_slices, keys)
        return feature_alignment(self.projector(features), tokens)
