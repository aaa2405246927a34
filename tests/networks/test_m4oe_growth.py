"""One more modality for a trained network: nothing changes for the others (M4oE: "adaptation to new modalities")."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import KINDS, make_architecture
from tiny_swin import SWIN, images, learnt, make_net
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.blocks.experts import GATES, ModalityExperts
from nnunet_diffext.networks.m4oe import M4oENet, extend_weights
from nnunet_diffext.networks.m4oe_transfer import freeze_all_but

OLD = {"CT": (True, True, False), "MR": (True, False, True)}
SAME_LABELS = {**OLD, "US": (True, True, True)}
NEW_LABEL = {"CT": (True, True, False, False), "MR": (True, False, True, False), "US": (True, True, False, True)}
LARGER = (SAME_LABELS, NEW_LABEL)


def grow(larger: dict[str, Any] = NEW_LABEL, kind: str = "2d", **options: Any) -> tuple[M4oENet, M4oENet]:
    """A network, and one with a further modality that starts from its weights."""
    old, new = make_net(kind, OLD, **options), learnt(make_net(kind, larger, **options), seed=5)
    new.load_state_dict(extend_weights(old.state_dict(), old, new))
    return old, new.eval()


def same(new: Tensor, old: Tensor) -> bool:
    """Every bit, in the labels that there were."""
    return torch.equal(new[:, : old.shape[1]], old) and (new[:, old.shape[1] :] < -16).all().item()


@pytest.mark.parametrize("larger", LARGER)
@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_predictions_of_old_modalities_keep_every_bit(gate: str, larger: dict[str, Any]) -> None:
    old, new = grow(larger, gate=gate)
    x = images()
    for activated in (False, True):
        for m in range(2):
            old.modality = new.modality = m
            assert same(new(x), old(x)), (activated, m)
        new.activate("US")
        assert new.active.all()
    assert new.since.tolist() == [0, 0, 1]


@pytest.mark.parametrize("larger", LARGER)
@pytest.mark.parametrize(
    "options", [*({"gate": gate} for gate in GATES), {"top1": True}, {"experts": 4}, {"tells": False}]
)
@torch.no_grad()
def test_unknown_modality_keeps_every_bit_until_the_new_one_is_active(
    options: dict[str, Any], larger: dict[str, Any]
) -> None:
    options = {"gate": "token", **options}
    old = make_net("2d", OLD, **options)
    new = make_net("2d", larger, **{**options, **({"experts": 5} if "experts" in options else {})})
    new.load_state_dict(extend_weights(old.state_dict(), old, new))
    x = images()
    assert same(new(x), old(x))
    if not options.get("tells", True):
        new.activate("US")
        assert new.tell(x) is None and not same(new(x), old(x))
        return
    assert torch.equal(new.tell(x)[:, :2], old.tell(x)) and new.tell(x).exp()[:, 2].max() == 0
    new.activate("US")
    assert new.tell(x).exp()[:, 2].min() > 0.05


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_unknown_modality_is_told_before_newer_experts_are_used(gate: str) -> None:
    """An image that is taken for an old modality is segmented as if nothing had been added."""
    old, new = grow(gate=gate)
    new.activate("US")
    x, us = images(), torch.full((3,), 2)
    for module in new.modules():
        if isinstance(module, ModalityExperts):
            module.weight_out[2] *= -20
    new.modality_gate.rows.bias[2] = -6
    assert new.tell(x).exp()[:, 2].min() > 1e-6 and same(new(x), old(x))
    new.modality_gate.rows.bias[2] = 40
    assert new.tell(x).argmax(1).tolist() == us.tolist()
    known = new(x, modality=us).softmax(1)
    torch.testing.assert_close(new(x).softmax(1), known, atol=1e-5, rtol=0)


@torch.no_grad()
def test_new_modality_uses_its_expert_once_active() -> None:
    _, new = grow()
    x, us = images(), torch.full((3,), 2)
    without = new(x, modality=us)
    new.activate("US")
    with_expert = new(x, modality=us)
    assert (with_expert - without).abs().max() > 1e-4
    for module in new.modules():
        if isinstance(module, ModalityExperts):
            module.weight_out[2] *= -20
    assert (new(x, modality=us) - with_expert).abs().max() > 1e-2
    old_modality = torch.zeros(3, dtype=torch.long)
    changed = new(x, modality=old_modality)
    new.active[2] = False
    assert torch.equal(new(x, modality=old_modality), changed), "whatever becomes of the new expert"


def test_new_expert_is_the_mean_of_the_others_and_its_gate_is_zero() -> None:
    old, new = grow()
    before, after = old.state_dict(), new.state_dict()
    for key, tensor in after.items():
        if key.rpartition(".")[2] in ModalityExperts.stacked:
            torch.testing.assert_close(tensor[2], before[key].mean(0))
            assert torch.equal(tensor[:2], before[key])
        elif ".gate." in key or key.startswith("modality_gate.rows."):
            assert tensor[2].abs().max() == 0 and torch.equal(tensor[:2], before[key])
        elif key in before and key not in ("active", "since"):
            assert torch.equal(tensor, before[key])
    assert set(after) - set(before) == {"head.seg_layers.2.weight", "head.seg_layers.2.bias"}


def test_free_experts_stay_behind_those_of_modalities() -> None:
    """Expert m is that of modality m: the new one comes between."""
    old = make_net("2d", OLD, experts=3)
    new = make_net("2d", SAME_LABELS, experts=4)
    new.load_state_dict(extend_weights(old.state_dict(), old, new))
    assert new.active.tolist() == [True, True, False, True] and new.since.tolist() == [0, 0, 1, 0]
    key = "decoder.levels.0.0.ffn.weight_in"
    assert torch.equal(new.state_dict()[key][[0, 1, 3]], old.state_dict()[key])


def test_a_second_new_modality() -> None:
    _, new = grow(SAME_LABELS)
    newer = make_net("2d", {**SAME_LABELS, "PET": (True, True, True)})
    newer.load_state_dict(extend_weights(new.state_dict(), new, newer))
    assert newer.since.tolist() == [0, 0, 1, 2] and newer.active.tolist() == [True, True, False, False]


def test_what_is_frozen_learns_to_tell_old_modalities_from_a_new_one() -> None:
    """Although samples of old modalities never use the new expert, by the new row alone."""
    _, new = grow()
    new.activate("US")
    freeze_all_but(new, 2)
    ct = torch.zeros(3, dtype=torch.long)
    out = new.train()(images(), modality=ct)
    assert all(gate.load[:, 2].max() == 0 for gate in out.encoder_gates)
    nll_loss(out.told, ct).backward()
    bias = new.modality_gate.rows.bias.grad
    assert bias[2] > 0, "descent makes it less probable"
    assert bias[:2].abs().max() == 0 and all(p.grad is None for p in new.modality_gate.convolutions.parameters())


@torch.no_grad()
def test_from_a_single_modality() -> None:
    """There was nothing to tell; now there is, from a fresh gate."""
    old, new = make_net("2d", {"CT": OLD["CT"][:2]}, experts=1), make_net("2d", {"CT": OLD["CT"], "US": (True,) * 3})
    new.load_state_dict(extend_weights(old.state_dict(), old, new))
    assert old.tell(images()) is None and new.tell(images()).exp()[:, 0].min() == 1
    freeze_all_but(new, 1)
    assert all(p.requires_grad for p in new.modality_gate.parameters()), "nothing old depends on it"


@pytest.mark.parametrize(
    ("modalities", "options", "match"),
    [
        ({"US": (True, True, True), **OLD}, {}, "cannot become .*'US', 'CT', 'MR'"),
        (OLD, {}, "one modality more"),
        (SAME_LABELS, {"experts": 5}, "one expert more are needed"),
        (SAME_LABELS, {"embed_dim": 16}, "differ in more than one modality: encoder.embedding.project.weight"),
        ({**SAME_LABELS, "MR": (True, True, True)}, {}, "differ in more than one modality: head.seg_layers.1.weight"),
        (SAME_LABELS, {"where": "encoder"}, "differ in more than one modality"),
    ],
)
def test_other_differences_are_refused(modalities: dict[str, Any], options: dict[str, Any], match: str) -> None:
    old, new = make_net("2d", OLD), make_net("2d", modalities, **options)
    with pytest.raises(ValueError, match=match):
        extend_weights(old.state_dict(), old, new)


@pytest.mark.parametrize("ranks", [False, True])
def test_frozen_batch_norms_keep_their_statistics(ranks: bool) -> None:
    """Plans with batch norm: what the old modalities are predicted with includes running means, and the new one is
    trained with what will predict it.
    """
    plan = make_architecture("2d")
    plan = replace(plan, kwargs={**plan.kwargs, "norm_op": nn.BatchNorm2d})
    net = M4oENet(plan, KINDS["2d"].patch, 1, LabelSpace(4), NEW_LABEL, **SWIN)
    freeze_all_but(net, 2)
    if ranks:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # as nnU-Net does, behind the optimiser
    image, us = 3 * images(seed=2), torch.full((3,), 2)
    with torch.no_grad():
        net.modality = 0
        before = net.eval()(images())
        trained = net.train()(image, modality=us).logits.softmax(1)
        assert torch.equal(net.eval()(images()), before)
        torch.testing.assert_close(net(image, modality=us).softmax(1), trained, atol=1e-5, rtol=0)
