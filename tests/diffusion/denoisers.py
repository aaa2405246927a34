"""Denoisers that are known exactly."""

import math

import torch

from nnunet_diffext.diffusion import (
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    one_step,
)

T = 1000
SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpm": dpm_solver_pp_2m}


def one_step_sampler(model, x_T, schedule, steps, **kwargs):
    assert steps == 1
    return one_step(model, x_T, schedule, **kwargs)


def smooth_model(x, t):
    """Some deterministic, nonlinear, time-dependent function."""
    return torch.tanh(0.7 * x + (t.float() / T - 0.3).view(-1, 1, 1, 1))


class BernoulliDenoiser:
    """E[x0 | x_t] for one voxel x0 in {-1, +1} with P(x0 = +1) = p, exact, in float64."""

    def __init__(self, schedule, p):
        self.schedule, self.prior_logit = schedule, math.log(p / (1 - p))

    def __call__(self, x, t):
        alpha, sigma = self.schedule.alpha_sigma(int(t[0]))
        # log-odds = prior + log N(x; alpha, s^2) - log N(x; -alpha, s^2)
        return torch.tanh((self.prior_logit + 2 * alpha / sigma**2 * x.double()) / 2)
