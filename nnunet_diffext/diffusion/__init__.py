"""Diffusion core: schedules, parameterisations, samplers, noise and the label codec. Torch only, no nnU-Net, no I/O."""

from .labels import LabelSpace
from .noise import gaussian_noise, seeded_noise, start_of_sample
from .parameterization import PredictionKind, target, to_eps, to_x0
from .samplers import ddim, ddpm, dpm_solver_pp_2m, one_step, trailing_timesteps
from .schedules import SCHEDULES, NoiseSchedule, betas, rescale_zero_terminal_snr

__all__ = [
    "SCHEDULES",
    "LabelSpace",
    "NoiseSchedule",
    "PredictionKind",
    "betas",
    "ddim",
    "ddpm",
    "dpm_solver_pp_2m",
    "gaussian_noise",
    "one_step",
    "rescale_zero_terminal_snr",
    "seeded_noise",
    "start_of_sample",
    "target",
    "to_eps",
    "to_x0",
    "trailing_timesteps",
]
