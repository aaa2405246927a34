"""What M4oE takes over from its pre-training, and what stays as it is when it learns another modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nnunet_diffext.networks.blocks.experts import ModalityExperts
from nnunet_diffext.networks.m4oe import M4oENet
from nnunet_diffext.networks.masked_autoencoder import encoder_weights, spread_expert


def start_from_pretraining(net: M4oENet, weights: Mapping[str, Tensor]) -> str:
    """Give the encoder of a network the weights of phase 1; returns what was loaded, and what was not.

    Args:
        net: its gates, and all but its encoder, stay as they were made.
        weights: state dict of an :class:`~nnunet_diffext.networks.masked_autoencoder.M4oEAutoencoder`.
    Raises:
        ValueError: the encoders differ.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # all processes of a distributed training must start from the same copies
        given = spread_expert(encoder_weights(weights), net.experts)
    own = {k: v.shape for k, v in net.encoder.state_dict().items()}
    wrong = [k for k, v in given.items() if own.get(k) != v.shape]
    wrong += [k for k in own if k not in given and ".gate." not in k]
    if wrong:
        raise ValueError(
            f"its encoder differs from this network's in {len(wrong)} tensors; the first is {wrong[0]} "
            f"({tuple(given[wrong[0]].shape) if wrong[0] in given else 'missing'} there, "
            f"{tuple(own[wrong[0]]) if wrong[0] in own else 'missing'} here). Give both trainings the same tokens for "
            "the network's size, and noStem to both or none; a network without experts in its encoder needs "
            "M4oEPretrainTrainer_plain."
        )
    net.encoder.load_state_dict(given, strict=False)
    experts = [k for k in given if k.rpartition(".")[2] in ModalityExperts.stacked]
    there = len(weights[f"encoder.{experts[0]}"]) if experts else 0
    copied = f" ({there} pre-trained expert spread over {net.experts})" if there < net.experts and experts else ""
    gates = sum(".gate." in k for k in own)
    rest = len(net.state_dict()) - len(own)
    return (
        f"Loaded {len(given)} of {len(own)} tensors of the encoder, {len(experts)} of them of experts{copied}. "
        f"Not in the pre-training, and new: {gates} tensors of the encoder's gates, {rest} outside of the encoder."
    )


def freeze_all_but(net: M4oENet, modality: int) -> None:
    """Train nothing but one modality's expert in every block, its row of every gate, and its head (of a shared one, the
    labels that no other modality has). The modality gate of a network that had a single modality is new as a whole.
    """
    rows = []
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    # what the old modalities are predicted with stays, and the new one is trained with what predicts it; a hook of the
    # whole network is still there when nnU-Net has made other modules of its batch norms
    net.register_forward_pre_hook(_use_running_statistics)
    head, own = net.head.only_of(modality)
    for parameter in head.parameters() if own else ():
        parameter.requires_grad_(True).register_hook(_OnlyRows(own))
    for module in net.modules():
        if not isinstance(module, ModalityExperts):
            continue
        rows += [getattr(module, name) for name in module.stacked]
        rows += [module.gate.weight, module.gate.bias] if module.weighs else []
    gate = net.modality_gate
    if gate is not None and len(net.modalities) == 2:  # before, there was nothing to tell: all of it is new
        gate.requires_grad_(True)
    elif gate is not None:
        rows += gate.rows.parameters()
    for parameter in rows:
        parameter.requires_grad_(True).register_hook(_OnlyRows([modality]))


def _use_running_statistics(net: nn.Module, _: object) -> None:
    for module in net.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()


class _OnlyRows:
    """A gradient without that of the other experts, or labels."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def __call__(self, gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[self.rows] = gradient[self.rows]
        return kept
