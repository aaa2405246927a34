"""PGRD (Mao et al. 2025): residual diffusion around a trained nnU-Net, as an nnU-Net trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from nnunet_diffext.losses.diffusion import deep_diffusion_supervision, masked_error
from nnunet_diffext.networks.pgrd import PGRDNet, PGRDOutput
from nnunet_diffext.networks.sampling import READOUTS, SAMPLERS
from nnunet_diffext.settings import SettingsError, setting
from nnunet_diffext.trainers.adam import AdamTrainer
from nnunet_diffext.trainers.averaged import AveragedTrainer
from nnunet_diffext.trainers.configured import instead
from nnunet_diffext.trainers.diffusion import DiffusionSettings
from nnunet_diffext.trainers.guided import PRIOR_KINDS, GuidedTrainer
from nnunet_diffext.trainers.staged import build_network_of


@dataclass(frozen=True, kw_only=True)
class PGRDSettings(DiffusionSettings):
    """Settings of :class:`PGRDTrainer`. "Paper" is Mao et al. 2025, arXiv 2509.01330."""

    presets = {
        "noPGR": ("without the prior, in the process and as an input (paper's ablation)", {"guided": False}),
        "noDDS": (
            "without deep diffusion supervision (paper's ablation); probabilities are read off the estimate itself",
            {"levels": 0, "readout": "simplex"},
        ),
        "eps": (
            "the denoiser predicts the noise, which rules out zero terminal SNR",
            {"kind": "eps", "zero_terminal_snr": False},
        ),
        "vanillaDDPM": (
            "the paper's baseline: conditional DDPM without prior and supervision heads, noise prediction, 1000 steps",
            {
                "guided": False, "levels": 0, "readout": "simplex", "kind": "eps", "zero_terminal_snr": False,
                "steps": 1000, "step_power": 1.0, "sampler": "ddpm", "terminal_share": 0.0,
                "initial_lr": 1e-3,
            },
        ),
        "paper": (
            "the paper's recipe: kappa = 1, uniform t, softmax over tau_out, five samples of 300 DDIM steps, learning "
            "rate 1e-3",
            {
                "kappa": 1.0, "terminal_share": 0.0, "readout": "softmax", "steps": 300, "step_power": 1.0,
                "samples": 5, "prior_kind": "insample", "ema_decay": 0.0, "initial_lr": 1e-3,
            },
        ),
    }  # fmt: skip

    initial_lr: float = setting(
        3e-4, "initial learning rate of AdamW, decayed with power 0.9; 1e-3 in the paper", number="lr#", minimum=0
    )
    prior_trainer: str = setting(
        "nnUNetTrainer", "trainer of the prior; the variable nnUNet_diffext_prior names a model folder instead"
    )
    prior_kind: str = setting(
        "auto", "what the training sees: priors of other folds ('oof'), the own one made as wrong as on validation "
        "images ('corrupted'), or as it is; 'auto': 'oof' if every training case has one, else 'corrupted'",
        choices=PRIOR_KINDS, switches={"oof": "oof", "corrupted": "corrupted", "insample": "insample"},
    )  # fmt: skip
    hard_prior: bool = setting(False, "the prior's decision instead of its probabilities", switches={"hardPrior": True})
    guided: bool = setting(True, "residual diffusion around the prior (eq. 1-4), or plain conditional diffusion")
    kappa: float | None = setting(
        None, "scale of the residual, s_t = pi + kappa u_t; 1 in the paper; none: measured",
        number="kappa#", minimum=1e-3,
    )  # fmt: skip
    kind: str = setting("v", "what the denoiser predicts", choices=("v", "x0", "eps"), switches={"x0": "x0"})
    schedule: str = setting(
        "cosine", "noise schedule", choices=("cosine", "linear", "scaled_linear"), switches={"linear": "linear"}
    )
    literal_eq10: bool = setting(False, "train on eq. 10 at its word (a curiosity)", switches={"literalEq10": True})

    levels: int = setting(3, "deep diffusion supervision on so many decoder levels", number="levels#", minimum=0)
    lambda_dds: float = setting(0.1, "weight of eq. 6 in eq. 9", number="dds#", minimum=0)
    dds_until: float = setting(
        1.0, "supervise timesteps up to this share of T (the set of eq. 6)", number="ddsUntil#", minimum=0, maximum=1
    )
    tau: float = setting(1.0, "temperature of eq. 6", number="tau#", minimum=1e-3)
    context_width: float = setting(
        0.5, "channels of the network that sees image and prior, relative to the plan", number="context#", minimum=0.01
    )
    step_width: float = setting(
        0.25, "channels of the network that runs at every step, relative to the plan", number="stepwidth#", minimum=0.01
    )

    readout: str = setting(
        "heads", "probabilities from the finest supervision head, or from the estimate: projected on the simplex, or "
        "softmax over tau_out (section II-E)",
        choices=READOUTS, switches={"simplex": "simplex", "softmaxOut": "softmax"},
    )  # fmt: skip
    tau_out: float = setting(0.1, "temperature of the softmax read-out", number="tauout#", minimum=1e-3)
    step_power: float = setting(
        3.0, "the k-th of S steps starts at T (1 - (k/S)^power): 1 is evenly spaced, larger is denser near T, where it "
        "is decided which structures there are; training times are as dense",
        number="power#", switches={"evenSteps": 1.0}, minimum=1,
    )  # fmt: skip
    sampler: str = setting(
        "ddim", "sampler of predictions with several steps; eq5_*: literal readings of eq. 5, biased",
        choices=SAMPLERS, switches={
            "ddpm": "ddpm", "dpmpp": "dpm++", "eq5mean": "eq5_mean", "eq5uncentred": "eq5_uncentred",
            "eq5literal": "eq5_literal",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.readout == "heads" and self.levels == 0:
            raise SettingsError("readout 'heads' needs levels >= 1; use the token 'simplex' or 'softmaxOut'.")
        if self.readout == "heads" and self.lambda_dds == 0:
            raise SettingsError(
                "readout 'heads' needs trained heads, but 'dds0' trains none: use the token 'noDDS', or add 'simplex'."
            )


class PGRDTrainer(AdamTrainer, AveragedTrainer, GuidedTrainer):
    """Learns what a frozen nnU-Net gets wrong, and how sure it can be: probabilities instead of one answer."""

    Settings = PGRDSettings
    base_name = "PGRDTrainer"
    reference = (
        "Mao, F., Wu, B., Jiang, Y., Xue, H., Tang, Y., Zhang, H. (2025). Prior-Guided Residual Diffusion: Calibrated "
        "and Efficient Medical Image Segmentation. arXiv:2509.01330."
    )

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """:class:`PGRDNet` with its prior, from the plans alone, the same in training and at prediction."""
        s, label_space, architecture = PGRDTrainer.read_plans(plans_manager, configuration_manager)
        prior = None
        if s.guided:
            arguments = (plans_manager, configuration_manager, num_input_channels, num_output_channels)
            prior = build_network_of(s.prior_trainer, *arguments)
        return PGRDNet(
            prior,
            architecture,
            num_input_channels,
            label_space,
            context_width=s.context_width,
            step_width=s.step_width,
            levels=s.levels,
            tau=s.tau,
            kind=s.kind,
            schedule=s.schedule,
            timesteps=s.timesteps,
            zero_terminal_snr=s.zero_terminal_snr,
            readout=s.readout,
            tau_out=s.tau_out,
            hard_prior=s.hard_prior,
            terminal_share=s.terminal_share,
            literal_eq10=s.literal_eq10,
            step_power=s.step_power,
            sampling=s.sampling,
        )

    # ------------------------------------------------------------------ losses
    def loss_weights(self) -> Mapping[str, float]:
        """Eq. 9."""
        return {"dds": self.settings.lambda_dds}

    def compute_losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``velocity`` (eq. 8) and ``dds`` (eq. 6)."""
        s = self.settings
        clean, valid = self.label_space.encode(batch["target"])
        prior = self.training_prior(batch)
        out: PGRDOutput = self.network(batch["data"], clean=clean, valid=valid, prior=prior)
        losses = {"velocity": masked_error(out.prediction, out.target, valid)}
        if out.heads:
            until = s.dds_until * self.module.schedule.timesteps
            supervised = valid & (out.t <= until).view(-1, *(1,) * (clean.ndim - 1))
            regions = self.label_space.regions
            losses["dds"] = deep_diffusion_supervision(out.heads, clean, supervised, regions=regions)
        return losses

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, on one-step predictions: drawing samples would take longer than the training."""
        with instead(self.module, sampling=replace(self.module.sampling, samples=1, steps=1)):
            return super().validation_step(batch)
