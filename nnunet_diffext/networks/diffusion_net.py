"""What the diffusion networks share: predictions as means of samples, and what depends on the image alone, once."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace, NoiseSchedule, seeded_noise, start_of_sample
from nnunet_diffext.networks.sampling import Sampling


class DiffusionNet(nn.Module):
    """A network that draws samples. Subclasses say what is known before sampling starts, and how one sample is drawn.

    Args:
        label_space: heads K.
        schedule: noise schedule.
        sampling: of :meth:`probabilities`, hence of ``forward(image)`` in eval mode.
        terminal_share: share of the training samples at t = T - 1, where one-step predictions are made; the others are
            uniform in t.
    """

    def __init__(
        self, label_space: LabelSpace, schedule: NoiseSchedule, sampling: Sampling | None, terminal_share: float
    ) -> None:
        super().__init__()
        self.label_space, self.schedule, self.terminal_share = label_space, schedule, terminal_share
        self.sampling = sampling or Sampling()
        self._kept: tuple[Tensor, Tensor, Any] | None = None
        self.register_load_state_dict_post_hook(_forget)

    # ------------------------------------------------------------------ what a method implements
    @abstractmethod
    def known(self, image: Tensor) -> Any:
        """Everything that depends on the image ``(B, C, *patch)`` alone; computed once for all steps and samples."""

    @abstractmethod
    def draw_probabilities(self, known: Any, noise: Tensor, *, steps: int, sampler: str, seed: int) -> Tensor:
        """Probabilities ``(B, K, *patch)`` of one sample that starts from ``noise`` ``(B, noise_channels, *grid)``."""

    @property
    def noise_channels(self) -> int:
        """Channels of the noise that a sample starts from."""
        return self.label_space.num_heads

    @property
    def noise_stride(self) -> tuple[int, ...] | None:
        """Voxels per entry of that noise along every axis; ``None``: one."""
        return None

    # ------------------------------------------------------------------ what `nnunet_diffext predict` asks for
    @property
    def default_samples(self) -> int:
        """Samples of a prediction; 0 if a single step makes drawing them pointless."""
        return self.sampling.samples if self.sampling.steps > 1 else 0

    @property
    def default_steps(self) -> int:
        """Network evaluations per sample."""
        return self.sampling.steps

    @property
    def default_sampler(self) -> str:
        """One of :data:`~nnunet_diffext.networks.sampling.SAMPLERS`."""
        return self.sampling.sampler

    def sample(self, image: Tensor, noise: Tensor, *, steps: int, sampler: str = "ddim", seed: int = 0) -> Tensor:
        """Probabilities ``(B, K, *patch)`` of one sample.

        Args:
            image: ``(B, C, *patch)``, or ``(1, C, *patch)`` for B samples of it; what depends on it alone is kept until
                another tensor comes.
            noise: ``(B, noise_channels, *patch)``. Where several voxels share a latent, it takes one voxel's noise.
            steps: network evaluations; 1 gives the posterior mean (of an L1 loss: median).
            sampler: one of :data:`~nnunet_diffext.networks.sampling.SAMPLERS`.
            seed: of the noise that some samplers add on the way.
        Raises:
            ValueError: unknown sampler, or steps out of range.
        """
        if self.noise_stride is not None:
            noise = noise[(..., *(slice(f // 2, None, f) for f in self.noise_stride))]
        known = _for_samples(self._known_of(image), len(noise))
        return self.draw_probabilities(known, noise, steps=steps, sampler=sampler, seed=seed)

    def probabilities(self, image: Tensor) -> Tensor:
        """Mean over the samples ``(B, K, *patch)``, float32; the noise is the same in every tile and mirror pass."""
        s, size = self.sampling, image.shape[2:]
        if self.noise_stride is not None:
            size = [n // f for n, f in zip(size, self.noise_stride, strict=True)]
        shape, axes = (1, self.noise_channels, *size), tuple(range(2, image.ndim))
        self._kept = None
        known, total, images = self.known(image), 0.0, len(image)
        for batch in s.batches(image[0, 0].numel(), images):
            starts = [start_of_sample(m, s.seed) for m in batch]
            noise = [sign * seeded_noise(shape, n, device=image.device, mirror_axes=axes) for n, sign in starts]
            noise = torch.cat(noise).expand(max(images, len(batch)), *shape[1:])
            around = _for_samples(known, len(noise))
            drawn = self.draw_probabilities(around, noise, steps=s.steps, sampler=s.sampler, seed=s.seed + batch.start)
            total = total + (drawn if images > 1 else drawn.sum(0, keepdim=True))
        return total / s.samples

    def train(self, mode: bool = True) -> DiffusionNet:
        """Frozen parts, if any, are put back into eval mode by the subclass."""
        self._kept = None  # the weights are about to change, or have changed
        return super().train(mode)

    def _known_of(self, image: Tensor) -> Any:
        if torch.is_grad_enabled():
            return self.known(image)  # its graph belongs to one backward pass
        kept = self._kept
        # the content as well: a tensor made in inference mode does not count its changes
        if kept is None or kept[0] is not image or not torch.equal(kept[1], image):
            self._kept = kept = (image, image.clone(), self.known(image))
        return kept[2]

    # ------------------------------------------------------------------ training
    def random_timesteps(self, count: int, device: torch.device) -> Tensor:
        """``(count,)``: T - 1 with probability ``terminal_share``, else uniform."""
        t = torch.randint(self.schedule.timesteps, (count,), device=device)
        return t.masked_fill(torch.rand(count, device=device) < self.terminal_share, self.schedule.timesteps - 1)


def _for_samples(known: Any, count: int) -> Any:
    """What is known of one image for so many samples of it, as views; of several images, as it is."""
    if isinstance(known, Tensor):
        return known.expand(count, *known.shape[1:])
    if isinstance(known, (list, tuple)):
        parts = [_for_samples(part, count) for part in known]
        return type(known)(*parts) if hasattr(known, "_fields") else type(known)(parts)
    return known


def _forget(network: DiffusionNet, _: Any) -> None:
    """After other weights were loaded."""
    network._kept = None
