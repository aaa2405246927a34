"""M4oE's network: a Swin U-Net whose MLPs are modality experts under a gate (Jiang & Shen, MICCAI 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.dynamic_head import DynamicHead
from nnunet_diffext.networks.blocks.experts import MLP, Gate, ModalityExperts, Routing
from nnunet_diffext.networks.blocks.modality_gate import ModalityGate
from nnunet_diffext.networks.swin_unet import FFN, MLP_RATIO, SwinDecoder, SwinEncoder, SwinPlan

WHERE = ("both", "encoder", "decoder", "none")
SINGLE_EXPERTS = 3
"""Experts if there is but one modality, as many as in the paper."""


class M4oEOutput(NamedTuple):
    """What the losses need.

    Attributes:
        logits: ``(B, K, *patch)``, every sample's from the head of its own modality.
        encoder_gates, decoder_gates: one per layer, none where there is no gate over experts.
        told: ``(B, modalities)``, ``log P(m | x)`` of the modality gate; none if there is no such gate.
    """

    logits: Tensor
    encoder_gates: list[Gate]
    decoder_gates: list[Gate]
    told: Tensor | None


class M4oENet(nn.Module):
    """Swin U-Net with experts (eq. 1-3) and a head per modality. Expert m is that of modality m; further ones are free.

    In training the modality of every sample is given. For prediction it may be set as the attribute ``modality`` (an
    index); otherwise it is the one that a :class:`ModalityGate` tells, if ``tells``. If not, every label is asked of
    all modalities that have it.

    Which experts a sample may use is in the buffers ``active`` ``(M,)`` and ``since`` ``(M,)``: only active ones, and a
    sample of known modality m only those that did not come after its own (``since[e] <= since[m]``). What is predicted
    for a modality is therefore not touched by others that are added, see :func:`extend_weights`.

    Args:
        architecture: what nnU-Net planned; its resolutions are followed.
        patch_size: voxels.
        image_channels: C.
        label_space: the K heads of all modalities together.
        modalities: for every modality, which of the K heads it has.
        experts: M, at least one per modality; default one per modality, or 3 if there is a single modality and a gate.
        where: experts in the ``"encoder"``, the ``"decoder"``, ``"both"`` or ``"none"``, where they are plain MLPs
            (Table 4).
        gate, top1: see :class:`ModalityExperts`. Without a gate, a known modality has its own expert in any case.
        tells: there is a gate that learns to tell the modality, if there are several.
        shared_head: see :class:`DynamicHead`.
        embed_stride, stages, embed_dim, depth, window, drop_path, stem: see :meth:`SwinPlan.of`.
    Raises:
        ValueError: arguments that contradict each other.
    """

    active: Tensor
    since: Tensor

    def __init__(
        self,
        architecture: Architecture,
        patch_size: Sequence[int],
        image_channels: int,
        label_space: LabelSpace,
        modalities: Mapping[str, Sequence[bool]],
        *,
        experts: int | None = None,
        where: str = "both",
        gate: str = "token",
        top1: bool = False,
        tells: bool = True,
        shared_head: bool = False,
        embed_stride: int | None = None,
        stages: int = 4,
        embed_dim: int | None = None,
        depth: int = 2,
        window: int = 7,
        drop_path: float = 0.2,
        stem: bool = True,
    ) -> None:
        super().__init__()
        self.label_space, self.modalities = label_space, tuple(modalities)
        self.modality: int | None = None
        if where not in WHERE:
            raise ValueError(f"Experts '{where}' are unknown; choose one of {', '.join(WHERE)}.")
        self.experts = _number_of_experts(experts, len(self.modalities), "none" if where == "none" else gate)

        def ffn(part: str) -> FFN:
            if where not in ("both", part):
                return lambda dim: MLP(dim, MLP_RATIO * dim)
            return lambda dim: ModalityExperts(dim, MLP_RATIO * dim, self.experts, gate=gate, top1=top1)

        plan = SwinPlan.of(
            architecture, patch_size, embed_stride=embed_stride, stages=stages, embed_dim=embed_dim, depth=depth,
            window=window, drop_path=drop_path, stem=stem,
        )  # fmt: skip
        self.encoder = SwinEncoder(plan, image_channels, ffn("encoder"))
        self.decoder = SwinDecoder(plan, ffn("decoder"))
        self.head = DynamicHead(plan.final_width, label_space, list(modalities.values()), shared=shared_head)
        self.register_buffer("active", torch.ones(self.experts, dtype=torch.bool))
        self.register_buffer("since", torch.zeros(self.experts, dtype=torch.long))
        self.modality_gate: ModalityGate | None = None
        if tells and len(self.modalities) > 1:
            with torch.random.fork_rng(devices=[]):  # with and without it, all else is drawn alike
                self.modality_gate = ModalityGate(architecture.conv_op, image_channels, len(self.modalities))

    def forward(self, image: Tensor, *, modality: Tensor | None = None) -> Tensor | M4oEOutput:
        """Logits ``(B, K, *patch)`` in eval mode, in training mode what the losses need.

        Args:
            image: ``(B, C, *patch)``.
            modality: ``(B,)``, index of every sample's modality; needed in training mode.
        Raises:
            ValueError: training mode without ``modality``.
        """
        if self.training:
            if modality is None:
                raise ValueError("M4oE needs to know the modality of every sample that it learns from.")
            tokens, encoder_gates, decoder_gates = self._run(image, modality)
            return M4oEOutput(self.head(tokens, modality), encoder_gates, decoder_gates, self.tell(image))
        if modality is None and self.modality is not None:
            modality = torch.full((len(image),), self.modality, device=image.device)
        if modality is not None:
            return self.head.log_probabilities(self._run(image, modality)[0], modality)
        told = self.tell(image)
        if told is None:
            return self.head.union(self._run(image, None)[0], self.active[: len(self.modalities)])
        guess = told.argmax(1)
        return self.head.guessed(self._run(image, guess)[0], guess)

    def tell(self, image: Tensor) -> Tensor | None:
        """``log P(m | x)`` ``(B, modalities)`` of images ``(B, C, *patch)``; none if nothing tells it."""
        if self.modality_gate is None:
            return None
        return self.modality_gate(image, self.active[: len(self.modalities)])

    def activate(self, modality: str) -> None:
        """Let the expert of a modality be used."""
        self.active[self.modalities.index(modality)] = True

    def _run(self, image: Tensor, modality: Tensor | None) -> tuple[Tensor, list[Gate], list[Gate]]:
        """Last tokens ``(B, *patch, width)`` and the gates of encoder and decoder."""
        routing = self._routing(len(image), modality)
        tokens, fine = self.encoder.embed(image)
        features = self.encoder(tokens, routing)
        below = routing._replace(gates=[])
        return self.decoder(features, fine, below), routing.gates, below.gates

    def _routing(self, batch: int, modality: Tensor | None) -> Routing:
        allowed = self.active.expand(batch, -1)
        if modality is not None:
            allowed = allowed & (self.since <= self.since[modality].unsqueeze(1))
        return Routing(allowed, modality, [])


def _number_of_experts(experts: int | None, modalities: int, gate: str) -> int:
    """M, by default as :class:`M4oENet` says."""
    if experts is None:
        return SINGLE_EXPERTS if modalities == 1 and gate != "none" else modalities
    if experts < modalities:
        raise ValueError(f"{experts} experts are not enough for {modalities} modalities: each has one of its own.")
    if gate == "none" and experts > modalities:
        raise ValueError(f"Without a gate, {experts - modalities} of {experts} experts would never be used.")
    return experts


def extend_weights(weights: Mapping[str, Tensor], old: M4oENet, new: M4oENet) -> dict[str, Tensor]:
    """The weights of a network, for one that knows one modality more.

    The new expert starts as the mean of the others with gates of zero and is not active yet. Whatever the old
    modalities do not share with it stays as it is: their predictions do not change.

    Args:
        weights: state dict of ``old``.
        old, new: the same settings, but for one more modality behind the others, one more expert, and possibly more
            heads in the label space.
    Raises:
        ValueError: they differ in something else.
    """
    n = len(old.modalities)
    if new.modalities[:n] != old.modalities or len(new.modalities) != n + 1 or new.experts != old.experts + 1:
        raise ValueError(
            f"Modalities {list(old.modalities)} with {old.experts} experts cannot become {list(new.modalities)} with "
            f"{new.experts}: one modality more, behind the others, and one expert more are needed."
        )

    def insert(tensor: Tensor, row: Tensor) -> Tensor:
        return torch.cat([tensor[:n], row.unsqueeze(0).to(tensor), tensor[n:]])

    extended = dict(weights)
    for name, module in new.named_modules():
        if isinstance(module, ModalityExperts):
            for key in (f"{name}.{k}" for k in module.stacked):
                extended[key] = insert(weights[key], weights[key].mean(0))
            for key in (f"{name}.gate.{k}" for k in ("weight", "bias") if module.weighs):
                extended[key] = insert(weights[key], torch.zeros_like(weights[key][0]))
    if old.modality_gate is not None:
        for key in (f"modality_gate.rows.{k}" for k in ("weight", "bias")):
            extended[key] = insert(weights[key], torch.zeros_like(weights[key][0]))
    extended["active"] = insert(weights["active"], torch.tensor(False))
    extended["since"] = insert(weights["since"], weights["since"].max() + 1)
    fresh = new.state_dict()
    for key in (k for k in fresh if k.startswith(("head.seg_layers.", "modality_gate."))):
        if key not in weights:
            extended[key] = fresh[key].clone()
        elif new.head.shared and key.startswith("head."):  # labels that are new
            extended[key] = torch.cat([weights[key], fresh[key][len(weights[key]) :].to(weights[key])])
    shapes, wanted = ({k: v.shape for k, v in tensors.items()} for tensors in (extended, fresh))
    wrong = [k for k in {**shapes, **wanted} if shapes.get(k) != wanted.get(k)]
    if wrong:
        raise ValueError(f"The networks differ in more than one modality: {', '.join(wrong)}.")
    return extended
