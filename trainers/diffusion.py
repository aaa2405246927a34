"""Settings that every diffusion trainer has."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_diffext.networks.sampling import FEW_STEPS, Sampling
from nnunet_diffext.settings import SettingsError, setting
from nnunet_diffext.trainers.adam import AdamSettings


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings(AdamSettings):
    """Process, prediction and sampling. Methods redefine a field where their default or paper differs."""

    kind: str = setting("x0", "what the denoiser predicts", choices=("x0", "v", "eps"), switches={"v": "v"})
    schedule: str = setting(
        "cosine", "noise schedule", choices=("cosine", "linear", "scaled_linear"), switches={"linear": "linear"}
    )
    timesteps: int = setting(1000, "T, length of the schedule", number="T#", minimum=2)
    zero_terminal_snr: bool = setting(True, "rescale the schedule to end in pure noise", switches={"noZeroSNR": False})
    terminal_share: float = setting(
        0.25, "share of the training samples at t = T, where predictions start; the others are uniform",
        number="terminal#", switches={"TOnly": 1.0}, minimum=0, maximum=1,
    )  # fmt: skip
    samples: int = setting(1, "samples M that a prediction averages", number="#samples", minimum=1)
    steps: int = setting(
        1, "denoiser steps S per sample; 1: one-step prediction, and ten for several samples or another sampler than "
        "ddim, for which one step makes no difference",
        number="#steps", minimum=1,
    )  # fmt: skip
    noise_seed: int = setting(0, "seed of the noise at prediction", number="noise#", minimum=0)
    ema_decay: float = setting(
        0.999, "decay of the average of all weights, which is the result; 0: none", number="ema#",
        switches={"noEMA": 0.0}, minimum=0, maximum=1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "eps" and self.zero_terminal_snr:
            raise SettingsError("kind 'eps' is undefined with zero_terminal_snr: use the token 'eps', which sets both.")
        if self.steps > self.timesteps:
            raise SettingsError(f"steps={self.steps} is more than the schedule has (timesteps={self.timesteps}).")

    @property
    def sampling(self) -> Sampling:
        """Of predictions."""
        sampler = getattr(self, "sampler", "ddim")
        several = self.samples > 1 or sampler != "ddim"
        steps = FEW_STEPS if self.steps == 1 and several else self.steps
        return Sampling(samples=self.samples, steps=steps, sampler=sampler, seed=self.noise_seed)
