"""What stands behind the attention of a Swin block: an MLP, or modality experts under a gate (M4oE, eq. 2 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from nnunet_diffext.diffusion.schedules import autocast_off
from nnunet_diffext.networks.blocks.linear import STD, linear

GATES = ("token", "sample", "channel", "none")
WEIGHING = ("token", "sample")
"""Gates with probabilities of the experts."""

NEVER = -1e9
"""Logit of an expert that must not be used, or a modality that must not be told: its probability is exactly 0, and sums
of logits stay finite."""


class Gate(NamedTuple):
    """What one layer's gate did with a batch.

    Attributes:
        mean: ``(B, M)``, float32, mean probability over tokens.
        load: ``(B, M)``, share of every expert in what was used, without gradient: mean weight, or with top-1 routing
            the share of tokens.
    """

    mean: Tensor
    load: Tensor


class Routing(NamedTuple):
    """Which experts the samples of a batch may use.

    Attributes:
        allowed: bool ``(B, M)``.
        modality: ``(B,)``, the expert of every sample under hard routing, if it is known.
        gates: every layer with a gate appends what it did.
    """

    allowed: Tensor
    modality: Tensor | None
    gates: list[Gate]

    @classmethod
    def free(cls, batch: int, experts: int, modality: Tensor | None = None) -> Routing:
        """All experts are allowed."""
        device = None if modality is None else modality.device
        return cls(torch.ones(batch, experts, dtype=torch.bool, device=device), modality, [])


class MLP(nn.Module):
    """Two layers with GELU on every token.

    Args:
        dim: channels.
        hidden: channels in between.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.into, self.out = linear(dim, hidden), linear(hidden, dim)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """``(B, *grid, C)`` -> ``(B, *grid, C)``; ``routing`` is ignored."""
        return self.out(gelu(self.into(x)))


class ModalityExperts(nn.Module):
    """``sum_i weight_i(x) expert_i(x)`` (eq. 3); the experts are MLPs (eq. 2), expert m is that of modality m.

    | gate      | weights                                                                                          |
    |-----------|--------------------------------------------------------------------------------------------------|
    | "token"   | softmax over the experts of a linear map of the token (the paper)                                |
    | "sample"  | the same of the mean token                                                                       |
    | "channel" | 1, and the sum times softmax over the *channels* of a linear map: the authors' code. It cannot   |
    |           | tell experts apart, and scales the branch down by the number of channels                         |
    | "none"    | 1 for the expert of the sample's modality (hard routing); equal ones if that is not known        |

    Gates start at zero: all experts weigh the same. The sum runs over the experts one after the other, and so does the
    softmax: one more expert of weight zero leaves every bit of the result as it was.

    Args:
        dim: channels.
        hidden: channels inside of an expert.
        experts: M.
        gate: one of :data:`GATES`.
        top1: only the most probable expert contributes, scaled by its probability (Fedus et al. 2022).
    Raises:
        ValueError: unknown gate, or ``top1`` without probabilities.
    """

    stacked = ("weight_in", "bias_in", "weight_out", "bias_out")
    """Parameters whose first axis is the expert."""

    def __init__(self, dim: int, hidden: int, experts: int, *, gate: str = "token", top1: bool = False) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"Unknown gate '{gate}'; choose one of {', '.join(GATES)}.")
        if top1 and gate not in WEIGHING:
            raise ValueError(f"top1 needs probabilities of the experts, which the gate '{gate}' does not have.")
        self.experts, self.kind, self.top1 = experts, gate, top1
        self.weight_in = nn.Parameter(torch.empty(experts, dim, hidden))
        self.weight_out = nn.Parameter(torch.empty(experts, hidden, dim))
        for weight in (*self.weight_in, *self.weight_out):
            nn.init.xavier_uniform_(weight)
        self.bias_in = nn.Parameter(torch.zeros(experts, hidden))
        self.bias_out = nn.Parameter(torch.zeros(experts, dim))
        self.gate: nn.Linear | None = None
        if self.weighs:
            self.gate = nn.Linear(dim, experts)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        elif gate == "channel":
            self.gate = nn.Linear(dim, dim)
            nn.init.trunc_normal_(self.gate.weight, std=STD)
            nn.init.zeros_(self.gate.bias)

    @property
    def weighs(self) -> bool:
        """Whether the gate gives probabilities of the experts."""
        return self.kind in WEIGHING

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """``(B, *grid, C)`` -> ``(B, *grid, C)``; appends to ``routing.gates``."""
        tokens = x.flatten(1, -2)
        if self.weighs:
            out = self._gated(tokens, routing)
        elif self.kind == "none" and routing.modality is not None:
            out = self._one_per_sample(tokens, routing.modality)
        else:
            weights = routing.allowed.float()
            if self.kind == "none":
                weights = weights / weights.sum(1, keepdim=True)
            out = self._all(tokens, weights.unsqueeze(2).unbind(1))
            if self.kind == "channel":
                with autocast_off(x.device):
                    out = self.gate(tokens.float()).softmax(-1) * out
        return out.view(x.shape)

    def _gated(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Probabilities of the experts, and their sum or the best one. ``(B, T, C)`` -> ``(B, T, C)``."""
        with autocast_off(tokens.device):
            seen = tokens.float() if self.kind == "token" else tokens.float().mean(1, keepdim=True)
            # one product per expert: with one for all, the number of experts decides how each is rounded
            logits = [seen @ weight + bias for weight, bias in zip(self.gate.weight, self.gate.bias, strict=True)]
            allowed = routing.allowed.unsqueeze(1).unbind(2)
            masked = [logit.masked_fill(~may, NEVER) for logit, may in zip(logits, allowed, strict=True)]
            weights = load = probabilities = [log.exp() for log in log_softmax(masked)]
            if self.top1:
                probability, choice = torch.stack(weights).max(0)
                load = [(choice == m).float() for m in range(self.experts)]
                weights = [w * chosen for w, chosen in zip(weights, load, strict=True)]
            mean, used = (torch.stack([p.mean(1) for p in parts], dim=1) for parts in (probabilities, load))
            routing.gates.append(Gate(mean, used.detach()))
        if not self.top1:
            return self._all(tokens, weights)
        if self.kind == "sample":
            return probability.unsqueeze(-1) * self._one_per_sample(tokens, choice[:, 0])
        # in training, shapes must not depend on the data, and every expert must be part of the graph
        return self._all(tokens, weights) if self.training else self._one_per_token(tokens, choice, probability)

    def _expert(self, m: int, x: Tensor) -> Tensor:
        """Eq. 2, ``(..., C)`` -> ``(..., C)``."""
        hidden = gelu(nn.functional.linear(x, self.weight_in[m].T, self.bias_in[m]))
        return nn.functional.linear(hidden, self.weight_out[m].T, self.bias_out[m])

    def _all(self, tokens: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Every expert on every token; weights ``(B, T or 1)``."""
        parts = (w.unsqueeze(-1) * self._expert(m, tokens) for m, w in enumerate(weights))
        return reduce(torch.add, parts)

    def _one_per_sample(self, tokens: Tensor, choice: Tensor) -> Tensor:
        """Expert ``choice`` ``(B,)`` of every sample, at the cost of one MLP."""
        hidden = gelu(torch.baddbmm(self.bias_in[choice].unsqueeze(1), tokens, self.weight_in[choice]))
        return torch.baddbmm(self.bias_out[choice].unsqueeze(1), hidden, self.weight_out[choice])

    def _one_per_token(self, tokens: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        """Expert ``choice`` ``(B, T)`` of every token, times its weight, at the cost of one MLP."""
        out = torch.zeros(tokens.shape, dtype=weight.dtype, device=tokens.device)
        for m in range(self.experts):
            rows = choice == m
            out[rows] = weight[rows].unsqueeze(-1) * self._expert(m, tokens[rows])
        return out


def log_softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    """Log-probabilities of alternatives, of any shape each.

    Written out: over one axis more or less, torch adds in another order.
    """
    top = reduce(torch.maximum, logits).detach()
    total = reduce(torch.add, [(logit - top).exp() for logit in logits])
    return [logit - top - total.log() for logit in logits]
