"""PGRD's network: a frozen prior, a context computed once per image, and a light denoiser for the residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from nnunet_diffext.diffusion import LabelSpace, NoiseSchedule, target
from nnunet_diffext.diffusion.parameterization import PredictionKind
from nnunet_diffext.diffusion.preconditioning import precondition
from nnunet_diffext.diffusion.residual import literal_eq10_marginal
from nnunet_diffext.diffusion.schedules import autocast_off
from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.guided import ContextUNet, StepUNet, SupervisionHeads
from nnunet_diffext.networks.blocks.norm import LayerNorm
from nnunet_diffext.networks.diffusion_net import DiffusionNet
from nnunet_diffext.networks.sampling import READOUTS, Sampling, draw, project, soften


class Context(NamedTuple):
    """What is known before sampling starts.

    The prior ``pi`` ``(B, K, *)`` (``None`` without one), the estimated mean of ``u_0`` ``(B, K, *)``, the features of
    every level and their projections for the step network.
    """

    prior: Tensor | None
    mean: Tensor
    features: list[Tensor]
    guidance: list[Tensor]


class PGRDOutput(NamedTuple):
    """What the losses need.

    Prediction and its target ``(B, K, *patch)`` in float32 (eq. 8), the timesteps ``(B,)``, and the logits of the
    supervision heads, finest first (eq. 6).
    """

    prediction: Tensor
    target: Tensor
    t: Tensor
    heads: list[Tensor]


class PGRDNet(DiffusionNet):
    """Residual diffusion around a frozen prior (PGRD, section II), in the variables of ``diffusion/residual.py``.

    A prediction is ``skip u_t + out F(u_t, t, context) + c m(image, prior)``. The last term carries at t = T what the
    image alone says, so that one step of the light network F suffices for the posterior mean.

    Args:
        prior: a network with ``image -> logits``, kept frozen and in eval mode; ``None``: plain conditional diffusion.
        architecture: what nnU-Net planned; context and denoiser are lighter versions of it.
        image_channels: C.
        label_space: heads K, softmax or regions.
        context_width, step_width: channels relative to the plan.
        levels: supervision heads on so many decoder levels; 0: none.
        tau: temperature of the heads (eq. 6).
        kind: what the denoiser predicts; ``"v"`` in the paper.
        schedule, timesteps, zero_terminal_snr: see :class:`NoiseSchedule`.
        readout: how an estimate becomes probabilities: the finest of the ``"heads"``; ``"simplex"``: ``pi + kappa u_0``
            clamped and normalised; ``"softmax"`` of it over ``tau_out`` (section II-E).
        tau_out: see ``readout``.
        hard_prior: the prior's one-hot decision instead of its probabilities.
        terminal_share: share of the training samples at t = T - 1, where a one-step prediction is made; the others are
            where samples take their steps.
        literal_eq10: train on the process of eq. 10 at its word (a curiosity).
        step_power: spacing of the steps, in training and in samples, see
            :func:`~nnunet_diffext.diffusion.trailing_timesteps`.
        sampling: of :meth:`forward` in eval mode.
    """

    kappa: Tensor
    spread: Tensor

    def __init__(
        self,
        prior: nn.Module | None,
        architecture: Architecture,
        image_channels: int,
        label_space: LabelSpace,
        *,
        context_width: float = 0.5,
        step_width: float = 0.25,
        levels: int = 3,
        tau: float = 1.0,
        kind: PredictionKind = "v",
        schedule: str = "cosine",
        timesteps: int = 1000,
        zero_terminal_snr: bool = True,
        readout: str = "heads",
        tau_out: float = 0.1,
        hard_prior: bool = False,
        terminal_share: float = 0.25,
        literal_eq10: bool = False,
        step_power: float = 1.0,
        sampling: Sampling | None = None,
    ) -> None:
        if readout not in READOUTS:
            raise ValueError(f"unknown readout {readout!r}; choose one of {', '.join(READOUTS)}")
        if readout == "heads" and levels < 1:
            raise ValueError("readout 'heads' needs at least one supervision head; use 'simplex' or 'softmax'.")
        super().__init__(label_space, NoiseSchedule(schedule, timesteps, zero_terminal_snr), sampling, terminal_share)
        k = label_space.num_heads
        self.kind, self.readout = kind, readout
        self.tau, self.tau_out = tau, tau_out
        self.hard_prior, self.step_power = hard_prior, step_power
        self.eq10 = literal_eq10_marginal(self.schedule) if literal_eq10 else None
        self.prior = prior.eval().requires_grad_(False) if prior is not None else None
        context_plan = architecture.lighter(context_width)
        # instance norm would remove what the noise of a whole object amounts to
        step_plan = architecture.lighter(step_width, convolutions=1).with_norm(LayerNorm)
        known = image_channels + (k if prior is not None else 0)
        self.context_net = ContextUNet(context_plan, known, k)
        self.step_net = StepUNet(step_plan, k, context_plan.features)
        levels = min(levels, len(step_plan.features))
        around = prior is not None
        self.heads = SupervisionHeads(step_plan, context_plan.features, k, levels, around) if levels else None
        self.pool = adaptive_avg_pool3d if architecture.conv_op is nn.Conv3d else adaptive_avg_pool2d
        self.register_buffer("kappa", torch.ones(()))
        self.register_buffer("spread", torch.ones(()))

    def train(self, mode: bool = True) -> PGRDNet:
        """The prior stays in eval mode."""
        super().train(mode)
        if self.prior is not None:
            self.prior.eval()
        return self

    # ------------------------------------------------------------------ training
    def forward(
        self, image: Tensor, *, clean: Tensor | None = None, valid: Tensor | None = None, prior: Tensor | None = None
    ) -> Tensor | PGRDOutput:
        """Logits ``(B, K, *patch)`` in eval mode; in training mode what the losses need.

        Args:
            image: ``(B, C, *patch)``.
            clean: one-hot masks ``(B, K, *patch)``, needed in training mode.
            valid: bool ``(B, 1, *patch)``; where it is False nobody knows the label, and the residual is taken as zero.
            prior: probabilities ``(B, K, *patch)`` to train around instead of the own prior's, e.g. out-of-fold ones.
        """
        if not self.training:
            return self.label_space.log_probabilities(self.probabilities(image))
        context = self.context(image, prior)
        u0 = (clean.float() if context.prior is None else clean.float() - context.prior) / self.kappa
        u0 = u0 if valid is None else u0 * valid
        t = self.random_timesteps(len(image), image.device)
        noise = torch.randn_like(u0)
        u_t = self.noised(u0, noise, t)
        prediction, features = self.denoise(context, u_t, t)
        wanted = target(self.kind, u0, noise, t, self.schedule)
        return PGRDOutput(prediction, wanted, t, self.head_logits(context, features, t))

    def random_timesteps(self, count: int, device: torch.device) -> Tensor:
        """``(count,)``: as dense as the steps of a sample, ``T (1 - r^step_power)`` with r uniform; and T - 1 with
        probability ``terminal_share``.
        """
        last = self.schedule.timesteps - 1
        spaced = self.schedule.timesteps * (1 - torch.rand(count, device=device) ** self.step_power)
        t = spaced.long().clamp(max=last)
        return t.masked_fill(torch.rand(count, device=device) < self.terminal_share, last)

    def noised(self, u0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Eq. 7 in centred variables."""
        if self.eq10 is None:
            return self.schedule.add_noise(u0, noise, t)
        mean, std = (table.to(u0.device)[t].view(-1, *(1,) * (u0.ndim - 1)) for table in self.eq10)
        return mean * u0 + std * noise

    # ------------------------------------------------------------------ parts
    @torch.no_grad()
    def prior_probabilities(self, image: Tensor) -> Tensor | None:
        """pi ``(B, K, *patch)``, at least 1e-4 everywhere."""
        if self.prior is None:
            return None
        return self.as_prior(self.prior(image))

    def as_prior(self, logits: Tensor) -> Tensor:
        """A prior network's logits as pi."""
        p = self.label_space.probabilities(logits)
        if self.hard_prior:
            p = self.label_space.harden(p)
        return project(p, self.label_space.regions)

    def context(self, image: Tensor, prior: Tensor | None = None) -> Context:
        """Everything that depends on the image alone."""
        if self.prior is None:
            prior = None
        elif prior is None:
            prior = self.prior_probabilities(image)
        # log-probabilities: what the prior is sure of, and by how much, is lost in probabilities near 0 and 1
        known = image if prior is None else torch.cat([image, self.prior_logits(prior).to(image.dtype) / 4], dim=1)
        out = self.context_net(known)
        return Context(prior, out.logits.float(), out.features, self.step_net.guidance(out.features))

    def prior_logits(self, prior: Tensor) -> Tensor:
        """Log-odds of pi (softmax: its logarithm plus a constant per voxel that makes the channels' mean zero)."""
        logits = self.label_space.log_probabilities(prior)
        return logits if self.label_space.regions else logits - logits.mean(1, keepdim=True)

    def denoise(self, context: Context, u_t: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Prediction of ``kind`` ``(B, K, *)`` in float32 and the step network's features, finest first."""
        factors = precondition(self.kind, self.schedule, t, self.spread, u_t.ndim)
        out = self.step_net((factors.into * u_t).to(context.guidance[0].dtype), t, context.guidance)
        with autocast_off(u_t.device):
            prediction = factors.skip * u_t.float() + factors.out * out.logits.float() + factors.mean * context.mean
        return prediction, out.features

    def head_logits(
        self, context: Context, features: Sequence[Tensor], t: Tensor, levels: int | None = None
    ) -> list[Tensor]:
        """``psi / tau`` of eq. 6 at ``t`` ``(B,)``, finest first. psi corrects the prior's own logits."""
        if self.heads is None:
            return []
        prior = None
        if context.prior is not None:
            sizes = [f.shape[2:] for f in features[: levels or len(self.heads.seg_layers)]]
            prior = [self.prior_logits(self.pool(context.prior, size)) for size in sizes]
        return [p / self.tau for p in self.heads(features, context.features, t, prior)]

    # ------------------------------------------------------------------ prediction
    def known(self, image: Tensor) -> Context:
        """The context around the network's own prior."""
        return self.context(image)

    def draw_probabilities(self, known: Context, noise: Tensor, *, steps: int, sampler: str, seed: int) -> Tensor:
        """See :class:`DiffusionNet`. One step gives the posterior mean."""
        last: tuple[list[Tensor], Tensor]

        def model(u_t: Tensor, t: Tensor) -> Tensor:
            """The denoiser around this context; the features of its last call are what the heads read."""
            nonlocal last
            prediction, features = self.denoise(known, u_t, t)
            last = features, t
            return prediction

        centre = None if known.prior is None else known.prior / self.kappa
        how = {"power": self.step_power, "kind": self.kind, "centre": centre}
        u0 = draw(model, noise, self.schedule, steps, sampler, seed, **how)
        if self.readout == "heads":
            return self.label_space.probabilities(self.head_logits(known, *last, levels=1)[0])
        estimate = self.kappa * u0 if known.prior is None else known.prior + self.kappa * u0
        return self.read_out(estimate)

    def read_out(self, estimate: Tensor) -> Tensor:
        """One-hot-valued estimates ``(B, K, *)`` as probabilities, float32 (``readout``)."""
        if self.readout == "softmax":
            return soften(estimate, self.tau_out, self.label_space.regions)
        return project(estimate, self.label_space.regions)
