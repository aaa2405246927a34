"""TextDiffSeg (Ma 2025): latent diffusion guided by text prompts, as an nnU-Net trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffext.data.dataset import foreground
from nnunet_diffext.data.prompts import prompts_for
from nnunet_diffext.inference.reconstruction import ReconstructionDice, label_share
from nnunet_diffext.losses.diffusion import masked_error
from nnunet_diffext.networks.sampling import SAMPLERS
from nnunet_diffext.networks.textdiffseg import TEXT_FUSIONS, LabelCodec, TextDiffSegNet, TextDiffSegOutput
from nnunet_diffext.pretrained.text import TextTokens, encode_texts, mean_token
from nnunet_diffext.settings import PLANS_KEY, SettingsError, setting
from nnunet_diffext.trainers.adam import AdamTrainer
from nnunet_diffext.trainers.latent import LatentSettings, LatentTrainer
from nnunet_diffext.trainers.staged import build_network_of

RANDOM_TEXT = (8, 768)
"""Tokens and width of the random text, those of a short prompt in BERT."""


@dataclass(frozen=True, kw_only=True)
class TextDiffSegSettings(LatentSettings):
    """Settings of :class:`TextDiffSegTrainer`. "Paper" is Ma 2025 (arXiv)."""

    presets = {
        "zeta1": ("text concatenated instead of attended to (paper's ablation)", {"text_fusion": "concatenation"}),
        "zeta2": ("averaged image instead of an image encoder (paper's ablation)", {"simple_image": True}),
        "zeta3": ("averaged masks instead of a label encoder (paper's ablation)", {"simple_labels": True}),
        "eps": (
            "the denoiser predicts the noise (eq. 5), which rules out zero terminal SNR",
            {"kind": "eps", "zero_terminal_snr": False},
        ),
        "paper": (
            "the paper's recipe: noise prediction, one latent channel at stride 16, end to end, no anchor, no average",
            {
                "kind": "eps", "zero_terminal_snr": False, "latent_stride": 16, "latent_channels": 1,
                "image_latents": 0, "lambda_anchor": 0.0, "stop_gradient": False, "initial_lr": 1e-4,
                "weight_decay": 1e-5, "lr_decay": "cosine", "ema_decay": 0.0, "recycle": False,
            },
        ),
    }  # fmt: skip

    prompts: dict | None = setting(None, "label -> text; filled in from dataset.json when the training starts")
    text_encoder: str | None = setting(
        None, "hub id or folder of the text encoder; none: nnUNet_diffext_text_encoder, else Bio_ClinicalBERT"
    )
    text_shape: list | None = setting(None, "prompts, tokens per prompt, token width; filled in")
    text: str = setting(
        "tokens", "what voxels attend to: the prompts' tokens; their mean alone (eq. 1 and 2 at their word); or random "
        "tokens of the same norm, a control that needs no text encoder",
        choices=("tokens", "vector", "random"), switches={"singleVector": "vector", "randomText": "random"},
    )  # fmt: skip
    text_fusion: str = setting("attention", "how text enters (eq. 2)", choices=TEXT_FUSIONS)
    simple_image: bool = setting(False, "averaged image instead of an image encoder")
    simple_labels: bool = setting(False, "averaged masks instead of a label encoder")

    two_stage: bool = setting(
        False, "labels' latents from a MaskAutoencoder trained before, frozen", switches={"twoStage": True}
    )
    codec_trainer: str = setting("MaskAutoencoderTrainer", "trainer of that autoencoder (nnUNet_diffext_codec)")
    least_reconstruction: float = setting(
        0.95, "Dice that it must reach for every label on training patches", number="preflight#", minimum=0, maximum=1
    )
    latent_stride: int = setting(8, "at most so many voxels per latent in every axis", number="stride#", minimum=1)
    latent_channels: int = setting(4, "k, channels of the labels' latents", number="channels#", minimum=1)
    decoder_width: float = setting(
        0.5, "channels of label encoder and decoder, relative to the plan", number="width#", minimum=0.01
    )
    image_latents: int = setting(
        32, "channels of z_it; 0: as many as the labels' (paper)", number="imageLatents#", minimum=0
    )

    denoiser_width: float = setting(
        0.5, "channels of the denoiser, relative to the plan; it runs at every step", number="denoiser#", minimum=0.01
    )
    lambda_diffusion: float = setting(1.0, "lambda of eq. 6", number="lambda#", minimum=0)
    gamma: float = setting(1.0, "weight of Dice in eq. 4", number="gamma#", minimum=0)
    lambda_anchor: float = setting(
        1.0, "weight of eq. 4 on the labels' own latents, which keeps the autoencoder alive; 0 in the paper",
        number="anchor#", minimum=0,
    )  # fmt: skip
    stop_gradient: bool = setting(
        True, "the diffusion loss does not reach the label encoder", switches={"throughEncoder": False}
    )
    decoder_noise: float = setting(
        0.1, "sigma of q(z|X), noise on the estimates that the decoder is trained with", number="sigma#", minimum=0
    )

    recycle: bool = setting(
        True, "noise the denoiser's own first guess in training, as samples do, not the labels' latents (paper), "
        "which it would learn to read; only where clean latents are predicted, not with 'v' or 'eps'",
        switches={"noRecycle": False},
    )  # fmt: skip
    steps: int = setting(10, "denoiser steps S per sample", number="#steps", minimum=1)
    sampler: str = setting("ddim", "sampler", choices=SAMPLERS[:3], switches={"ddpm": "ddpm", "dpmpp": "dpm++"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_stage and (self.simple_labels or not self.stop_gradient):
            raise SettingsError("'twoStage' trains no label encoder: leave out 'zeta3' and 'throughEncoder'.")
        if self.lambda_anchor == 0 and self.stop_gradient and not (self.two_stage or self.simple_labels):
            raise SettingsError(
                "Without anchor, nothing would train the label encoder: add the tokens 'throughEncoder' and "
                "'noRecycle' to 'anchor0'."
            )
        if self.lambda_anchor == 0 and self.recycles and not (self.two_stage or self.simple_labels):
            raise SettingsError(
                "Without anchor, only what the denoiser sees of the labels could keep their latents decodable, and it "
                "sees nothing of them: add the token 'noRecycle' to 'anchor0'."
            )
        own = ("latent_stride", "latent_channels", "decoder_width")
        if self.two_stage and any(getattr(self, name) != getattr(TextDiffSegSettings, name) for name in own):
            raise SettingsError(
                "'twoStage' takes the latent space as it was trained: leave out 'stride#', 'channels#' and 'width#' "
                "here and give them to MaskAutoencoderTrainer."
            )


class TextDiffSegTrainer(AdamTrainer, LatentTrainer):
    """Denoises the latents of the labels under the guidance of image and text."""

    Settings = TextDiffSegSettings
    base_name = "TextDiffSegTrainer"
    reference = (
        "Ma, K. (2025). TextDiffSeg: Text-guided Latent Diffusion Model for 3D Medical Images Segmentation. arXiv."
    )
    _tokens: TextTokens | None = None
    _reconstruction: ReconstructionDice | None = None

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """:class:`TextDiffSegNet` from the plans alone, the same in training and at prediction."""
        s, label_space, architecture = TextDiffSegTrainer.read_plans(plans_manager, configuration_manager)
        if s.two_stage:
            arguments = (plans_manager, configuration_manager, num_input_channels, num_output_channels)
            codec = build_network_of(s.codec_trainer, *arguments)
        else:
            codec = LabelCodec(
                architecture,
                label_space,
                stride=s.latent_stride,
                channels=s.latent_channels,
                width=s.decoder_width,
                simple=s.simple_labels,
            )
        return TextDiffSegNet(
            codec,
            s.two_stage,
            architecture,
            num_input_channels,
            label_space,
            tuple(s.text_shape or (1, *RANDOM_TEXT)),  # not known yet when a planner asks
            image_latents=s.image_latents or None,
            text_fusion=s.text_fusion,
            simple_image=s.simple_image,
            denoiser_width=s.denoiser_width,
            kind=s.kind,
            schedule=s.schedule,
            timesteps=s.timesteps,
            zero_terminal_snr=s.zero_terminal_snr,
            terminal_share=s.terminal_share,
            stop_gradient=s.stop_gradient,
            decoder_noise=s.decoder_noise,
            sampling=s.sampling,
        )

    @property
    def builds_on_stage(self) -> bool:
        """Only with the token ``twoStage``."""
        return self.settings.two_stage

    @property
    def codec_is_frozen(self) -> bool:
        """Only with the token ``twoStage``."""
        return self.settings.two_stage

    # ------------------------------------------------------------------ text
    def initialize(self) -> None:
        """Encode the prompts before anything is built; what a checkpoint holds is not encoded again."""
        fresh = not self.was_initialized
        if fresh:
            self._find_text()
        super().initialize()
        if fresh:
            self._write_text()

    def on_train_start(self) -> None:
        """With the text of this dataset: -pretrained_weights may have brought another one's."""
        self._write_text()
        super().on_train_start()

    def _write_text(self) -> None:
        if self._tokens is not None:
            self.module.tokens.copy_(self._tokens.states)
            self.module.token_mask.copy_(self._tokens.mask)

    def _find_text(self) -> None:
        recorded = (self._recorded_blocks() or {}).get(self.base_name) if self._continues else None
        if recorded is not None:
            known = {key: recorded[key] for key in ("prompts", "text_shape")}
        else:
            prompts = prompts_for(self.dataset_json)
            self._tokens = self._encode(prompts)
            known = {"prompts": prompts, "text_shape": list(self._tokens.states.shape)}
            self.print_to_log_file("Prompts:", json.dumps(prompts, ensure_ascii=False))
        self.settings = replace(self.settings, **known)
        self.plans_manager.plans[PLANS_KEY][self.base_name].update(known)

    def _encode(self, prompts: Mapping[str, str]) -> TextTokens:
        s = self.settings
        if s.text == "random":
            fixed = torch.Generator().manual_seed(s.noise_seed)
            states = torch.randn(len(prompts), *RANDOM_TEXT, generator=fixed) * 0.5  # as large as those of BERT
            return TextTokens(states, torch.ones(states.shape[:2], dtype=torch.bool))
        encoded = encode_texts(prompts, s.text_encoder)
        return mean_token(encoded) if s.text == "vector" else encoded

    # ------------------------------------------------------------------ losses
    def loss_weights(self) -> Mapping[str, float]:
        """Eq. 6, and the anchor."""
        return {"diffusion": self.settings.lambda_diffusion, "anchor": self.settings.lambda_anchor}

    def compute_losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``sup`` (eq. 4), ``diffusion`` (eq. 5), ``anchor``: eq. 4 of the labels' own latents, decoded."""
        clean, valid = self.label_space.encode(batch["target"])
        out: TextDiffSegOutput = self.network(batch["data"], clean=clean, recycle=self.settings.recycles)
        gamma = {"dice_weight": self.settings.gamma}
        losses = {
            "sup": self.estimate_loss(out.logits, clean, valid, out.trust, **gamma),
            "diffusion": masked_error(out.prediction, out.target, valid),
        }
        if out.reconstruction is not None and self.settings.lambda_anchor > 0:
            losses["anchor"] = self.segmentation_loss(out.reconstruction, clean, valid, **gamma)
        if out.reconstruction is not None:
            self._monitor(out, clean, valid)
        return losses

    # ------------------------------------------------------------------ has the label encoder collapsed?
    def _monitor(self, out: TextDiffSegOutput, clean: Tensor, valid: Tensor) -> None:
        if self._reconstruction is None:
            self._reconstruction = ReconstructionDice(self.module.codec, self.label_space)
        self._reconstruction.count(out.reconstruction.detach(), clean, valid)
        self._latents = out.latents.detach()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Also how well the labels come out of their latents, and how much the latents say about them."""
        super().on_train_epoch_end(train_outputs)
        if self._reconstruction is None:
            return
        dice = self._reconstruction.dice()
        names = foreground(self.dataset_json, unique=False)
        said = ", ".join(f"{name} {d:.3f}" for name, d in zip(names, dice, strict=True))
        share = label_share(self._latents)
        self.print_to_log_file(f"Labels reconstructed: {said}; share of latent variance between cases {share:.3f}")
        self._log("label_variance_share", share)
        self._reconstruction = None
