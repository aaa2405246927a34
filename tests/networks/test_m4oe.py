"""M4oE's network: heads in the union of all labels, modalities known and unknown (METHODS 4.5, 4.6)."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny import Kind, make_architecture
from tiny_swin import CT_AND_MR, PLANS, images, make_net
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import nll_loss

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.blocks.experts import GATES
from nnunet_diffext.networks.m4oe import M4oENet
from nnunet_diffext.networks.swin_unet import SwinPlan

MODALITY = torch.tensor([0, 1, 0])
BRAIN = {"T1": (True, True, False), "T2": (False, True, True)}  # regions


# ------------------------------------------------------------------ sizes
@pytest.mark.parametrize(("regions", "stem"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("kind", PLANS)
def test_every_plan(kind: str, regions: bool, stem: bool) -> None:
    net = make_net(kind, BRAIN if regions else CT_AND_MR, regions=regions, stem=stem)
    x, heads = images(kind), 3 if regions else 4
    out = net(x)
    assert out.shape == (3, heads, *x.shape[2:]) and out.isfinite().all() and out.abs().max() < 17
    out = net.train()(x, modality=MODALITY)
    assert out.logits.shape == (3, heads, *x.shape[2:]) and out.logits.isfinite().all()
    assert len(out.encoder_gates) == 2 * len(net.encoder.levels)
    assert len(out.decoder_gates) == 2 * len(net.decoder.levels)
    loss = out.logits.clamp_min(-50).logsumexp(1).sum() + nll_loss(out.told, MODALITY)
    loss.backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert not name.startswith("modality_gate.rows.") or p.grad.abs().max() > 0, name


def swin_unet(modalities: int = 1, **options: Any) -> float:
    """Million parameters at 224 x 224 with 3 channels and 9 classes."""
    plan = Kind((224, 224), ((1, 1), *((2, 2),) * 5), features=(4,) * 6)
    names = {str(m): (True,) * 9 for m in range(modalities)}
    with torch.device("meta"):
        net = M4oENet(
            make_architecture(plan),
            plan.patch,
            3,
            LabelSpace(9),
            names,
            experts=modalities,
            stem=False,
            tells=False,
            **options,
        )
    assert [level[0].attention.window for level in net.encoder.levels] == [(7, 7)] * 4
    assert [level[0].attention.heads for level in net.encoder.levels] == [3, 6, 12, 24]
    return sum(p.numel() for p in net.parameters()) / 1e6


def test_it_is_as_large_as_the_authors_code() -> None:
    """METHODS 4.6, counted there in their network. With several modalities we have a head for each: 873 parameters."""
    for experts, size in ((1, 29.13), (2, 44.78), (3, 60.43), (4, 76.09)):
        assert swin_unet(experts, gate="channel") == pytest.approx(size, abs=0.01)
    plain = swin_unet(where="none")
    encoder, decoder = (swin_unet(3, where=part, gate="none") - plain for part in ("encoder", "decoder"))
    assert plain == pytest.approx(27.17, abs=0.005)
    assert encoder / 2 == pytest.approx(12.55, abs=0.01) and decoder / 2 == pytest.approx(3.10, abs=0.01)
    assert swin_unet(3) - swin_unet(3, gate="none") < 0.02, "a gate over experts"


@torch.no_grad()
def test_convolutions_bring_single_voxels_to_the_logits() -> None:
    """Past all tokens: with none of theirs, logits still differ from voxel to voxel, and only around what changed."""
    net, x = make_net("2d"), images()
    net.decoder.to_voxels.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    other = x.clone()
    other[:, :, 5, 7] += 3
    changed = (net(x) - net(other)).abs().amax((0, 1))
    assert changed[5, 7] > 10 * changed.median(), "norms see the whole patch"
    assert net.decoder.last is not None and make_net("2d", stem=False).decoder.last is None


def test_levels_follow_the_planned_strides() -> None:
    strides = ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    architecture = make_architecture(Kind((20, 128, 96), strides, features=(4,) * 6))
    plan = SwinPlan.of(architecture, (20, 128, 96))
    assert plan.embed_stride == (1, 2, 2) and plan.strides == ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    assert plan.grids == ((20, 64, 48), (20, 32, 24), (10, 16, 12), (5, 8, 6))
    assert plan.windows == ((5, 8, 8), (5, 8, 8), (5, 8, 6), (5, 8, 6))
    assert plan.widths == (48, 96, 192, 384) and plan.heads == (3, 6, 12, 24)
    assert plan.final_width == 4, "convolutions have no more channels than planned"
    assert SwinPlan.of(architecture, (20, 128, 96), stem=False).final_width == 24
    rates = [rate for level in plan.drop_path for rate in level]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2) and len(rates) == 8 and rates == sorted(rates)
    assert SwinPlan.of(architecture, (20, 128, 96), embed_stride=4).embed_stride == (1, 4, 4)
    assert len(SwinPlan.of(architecture, (20, 128, 96), stages=9).grids) == 5, "no more than planned"
    with pytest.raises(ValueError, match="at least two levels, but stages=1"):
        SwinPlan.of(architecture, (20, 128, 96), stages=1)
    with pytest.raises(ValueError, match="not divisible"):
        SwinPlan.of(architecture, (20, 128, 95))


# ------------------------------------------------------------------ heads
def test_logits_are_those_of_the_own_head() -> None:
    net, x = make_net(), images()
    net.train()
    logits = net(x, modality=MODALITY).logits
    for sample, m in enumerate(MODALITY.tolist()):
        own = net.head.classes[m]
        others = [k for k in range(4) if k not in own]
        assert own == [k for k, has in enumerate(list(CT_AND_MR.values())[m]) if has]
        p = logits[sample].softmax(0)
        assert p[others].max() == 0, "not 0 as logit: that would beat whatever is negative"
        assert p[own].min() > 0
    assert all(f"head.seg_layers.{m}.weight" in net.state_dict() for m in range(2))


def test_classes_that_a_modality_does_not_have() -> None:
    """METHODS 4.5-2: 3 classes of 16, with logits far below 0."""
    net, x = make_net(modalities={"CT": (True,) * 3 + (False,) * 13, "MR": (True,) * 16}), images()
    with torch.no_grad():
        net.head.seg_layers[0].bias.sub_(100)
    net.train()
    logits = net(x, modality=torch.zeros(3, dtype=torch.long)).logits
    net.eval().modality = 0
    for out in (logits, net(x)):
        assert out.argmax(1).max() < 3
        assert out.softmax(1)[:, 3:].sum(1).max() < 1e-6
        torch.testing.assert_close(out.log_softmax(1)[:, :3], out[:, :3].log_softmax(1))


@pytest.mark.parametrize("regions", [False, True])
def test_predictions_survive_half_precision(regions: bool) -> None:
    """As nnU-Net adds them up: 8 overlapping tiles, weights up to 10, half precision."""
    net, x = make_net(modalities=BRAIN if regions else CT_AND_MR, regions=regions), images()
    for modality in (None, 0, 1):
        net.modality = modality
        with torch.autocast("cpu", torch.float16):
            out = net(x)
        total = sum(10 * out.half() for _ in range(8))
        assert total.isfinite().all() and (total / 80).half().isfinite().all()
        p = (total / 80).float().sigmoid() if regions else (total / 80).float().softmax(1)
        torch.testing.assert_close(p, net.label_space.probabilities(out.float()), atol=2e-2, rtol=0)
    with torch.autocast("cpu", torch.float16):
        assert net.train()(x, modality=MODALITY).logits.isfinite().all()


# ------------------------------------------------------------------ modalities
def test_known_modality() -> None:
    """What training showed, as log-probabilities; by attribute for the whole batch, or by sample."""
    net, x = make_net(), images()
    by_sample = net(x, modality=MODALITY)
    logits = net.train()(x, modality=MODALITY).logits
    torch.testing.assert_close(by_sample.softmax(1), logits.softmax(1), atol=1e-6, rtol=1e-5)
    net.eval().modality = 1
    torch.testing.assert_close(net(x)[1], by_sample[1])
    assert net(x)[:, [1, 3]].max() < -30, "MR has neither"


def sure_of(net: M4oENet, m: int) -> None:
    """Let the modality gate prefer ``m``, just so."""
    with torch.no_grad():
        net.modality_gate.rows.weight.zero_()
        net.modality_gate.rows.bias.zero_()[m] = 0.1


@pytest.mark.parametrize(
    "options", [{}, {"gate": "none"}, {"gate": "channel"}, {"where": "decoder"}, {"where": "none"}]
)
def test_unknown_modality_is_what_the_gate_tells(options: dict[str, Any]) -> None:
    """However unsure it is: a label that one modality has must not be voted down by the background of others."""
    net, x = make_net(**options), images()
    for m in range(2):
        sure_of(net, m)
        assert 0.5 < net.tell(x).exp()[:, m].min() < 0.6
        net.modality = None
        unknown = net(x)
        net.modality = m
        torch.testing.assert_close(unknown.softmax(1), net(x).softmax(1), atol=1e-6, rtol=1e-4)
    net.modality = None
    mixed = net(torch.cat([x, x]))
    torch.testing.assert_close(mixed[: len(x)], net(x))


def certain_of(net: M4oENet, m: int, label: int) -> None:
    """Let modality ``m`` find one of its labels everywhere, whatever the image."""
    with torch.no_grad():
        net.head.seg_layers[m].weight.zero_()
        net.head.seg_layers[m].bias.fill_(-20.0)
        net.head.seg_layers[m].bias[net.head.classes[m].index(label)] = 20.0


def test_untold_every_label_is_asked_of_those_who_have_it() -> None:
    """Not of the others, whose background is no evidence against it."""
    both = {"CT": (True, True, True), "MR": (True, False, True)}
    net, x = make_net(modalities=both, where="none", tells=False), images()
    certain_of(net, 0, 1)
    certain_of(net, 1, 0)
    assert net(x).softmax(1)[:, 1].min() > 0.999
    certain_of(net, 0, 2)
    torch.testing.assert_close(net(x).softmax(1)[:, 2], torch.full((3, *x.shape[2:]), 0.5))
    certain_of(net, 0, 1)
    certain_of(net, 1, 2)  # more than there is room for
    p = net(x).softmax(1)
    torch.testing.assert_close(p[:, 1], 2 * p[:, 2])


def test_where_nothing_tells_the_modality() -> None:
    x = images()
    untaught = make_net(tells=False)
    assert untaught.tell(x) is None
    tokens, gates, _ = untaught._run(x, None)
    assert gates and torch.equal(untaught(x), untaught.head.union(tokens, untaught.active))
    untaught.train()
    assert untaught(x, modality=MODALITY).told is None
    single = make_net(modalities={"MR": (True, True)})
    assert make_net(modalities={"MR": (True, True)}, where="none").experts == 1
    assert single.experts == 3 and single.tell(x) is None, "there is nothing to tell"
    single.eval().modality = 0
    known = single(x)
    single.modality = None
    torch.testing.assert_close(known, single(x))


@pytest.mark.parametrize("top1", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_order_of_the_samples_does_not_matter(gate: str, top1: bool) -> None:
    """The paper's "invariance to shuffling across modalities"."""
    if top1 and gate not in ("token", "sample"):
        pytest.skip("no probabilities")
    net, x, order = make_net(gate=gate, top1=top1), images(), torch.tensor([2, 0, 1])
    torch.testing.assert_close(net(x[order]), net(x)[order], atol=1e-4, rtol=1e-4)
    net.train()
    mixed = net(x, modality=MODALITY)
    shuffled = net(x[order], modality=MODALITY[order])
    torch.testing.assert_close(shuffled.logits, mixed.logits[order], atol=1e-4, rtol=1e-4)
    for a, b in zip(shuffled.encoder_gates, mixed.encoder_gates, strict=True):
        torch.testing.assert_close(a.mean, b.mean[order])
    torch.testing.assert_close(shuffled.told, mixed.told[order])


def test_hard_routing_trains_but_the_experts_that_are_shown() -> None:
    net = make_net(gate="none").train()
    net(images(), modality=torch.zeros(3, dtype=torch.long)).logits.sum().backward()
    for name, p in net.named_parameters():
        if ".ffn." in name:
            assert p.grad[0].abs().max() > 0 and p.grad[1].abs().max() == 0, name
        elif name.startswith("head.seg_layers.1"):
            assert p.grad.abs().max() == 0
        elif "attention.out" in name:
            assert p.grad.abs().max() > 0


# ------------------------------------------------------------------ contracts
def test_contradicting_arguments() -> None:
    def message(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            make_net(**options)

    message("1 experts are not enough for 2 modalities", experts=1)
    message("Without a gate, 2 of 4 experts would never be used", experts=4, gate="none")
    message("Experts 'bottleneck' are unknown; choose one of both, encoder", where="bottleneck")
    message("Modality 1 needs background and another class", modalities={"CT": (True, True), "MR": (False, True)})
    message("Modality 0 needs a region", modalities={"CT": (False,), "MR": (True,)}, regions=True)
    message(r"No modality has the heads \[2\]", modalities={"CT": (True, True, False)})
    message("Modality 1 names 2 heads, but there are 3", modalities={"CT": (True, True, True), "MR": (True, True)})
    with pytest.raises(ValueError, match="needs to know the modality of every sample"):
        make_net().train()(images())


@torch.no_grad()
def test_no_state_between_passes() -> None:
    net, x = make_net(), images()
    before = pickle.dumps(net)
    first = net(x)
    net.train()(x, modality=MODALITY)
    assert pickle.dumps(net.eval()) == before
    for other in (pickle.loads(before), copy.deepcopy(net)):
        assert torch.equal(other(x), first)


@pytest.mark.parametrize("gate", GATES)
def test_shapes_do_not_depend_on_data(gate: str) -> None:
    """So that the memory of a training step can be counted without data."""
    net = make_net(gate=gate).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = net(torch.empty(3, 1, 16, 24), modality=torch.zeros(3, dtype=torch.long))
    assert isinstance(out.logits, FakeTensor) and out.logits.shape == (3, 4, 16, 24)


@pytest.mark.parametrize("options", [{}, {"top1": True}])
def test_it_compiles_as_one_graph(options: dict[str, Any]) -> None:
    """In training, and at prediction with and without the modality."""
    torch._dynamo.reset()
    net, x = make_net(**options), images()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    torch.testing.assert_close(compiled(x, modality=MODALITY), net(x, modality=MODALITY))
    logits = compiled.train()(x, modality=MODALITY).logits
    torch.testing.assert_close(logits, net(x, modality=MODALITY).logits)
