"""A trainer whose network can sample: what the predictor asks of a generative model, in a few lines."""

from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn


class SamplingNet(nn.Module):
    """A stock network whose logits are shifted by the noise, in ``steps`` equal parts."""

    default_samples, default_steps, default_sampler = 2, 3, "ddim"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image)

    def sample(self, image, noise, *, steps: int, sampler: str, seed: int) -> torch.Tensor:
        logits = self.network(image).float()
        for _ in range(steps):
            logits = logits + 2 * noise / steps
        return logits.softmax(1) if logits.shape[1] > 1 else logits.sigmoid()


class TinySamplingTrainer(nnUNetTrainer):
    """Stock training of it; it is never run here."""

    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, *args, **kwargs) -> nn.Module:
        stock = nnUNetTrainer.build_network_architecture(plans_manager, configuration_manager, *args, **kwargs)
        return SamplingNet(stock)
