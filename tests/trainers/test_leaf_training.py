"""LEAF's trainer: what is trained and what is not, and the teacher outside of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import Kind, make_trainer, parameters_of
from tiny_latent import FLAT, SMALL, batch_of, changed, leaf, offline, save_codec, use_teacher
from tiny_prior import finish
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.pretrained import PretrainedError
from nnunet_diffext.settings import SettingsError
from nnunet_diffext.stages import FINAL
from nnunet_diffext.trainers import find_trainer


@pytest.fixture(autouse=True)
def alone(nnunet_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's folders of one test, and nothing pretrained anywhere."""
    offline(monkeypatch, tmp_path)


@pytest.fixture
def vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny vision transformer is the teacher."""
    use_teacher(monkeypatch, tmp_path / "vit")


@pytest.fixture
def no_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's ``on_train_start``, which reads a dataset, does nothing."""
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)


# ------------------------------------------------------------------ one step of every variant
TOKENS = ("noAlign", "v", "eps", "paper", "TOnly", "l2", "seg0", "cosine_noZeroSNR", "scratchEncoder", "imageLatents0")


@pytest.mark.parametrize("tokens", TOKENS)
def test_one_step_reaches_every_parameter(tokens: str) -> None:
    trainer = leaf(tokens if tokens == "noAlign" else f"{tokens}_noAlign")
    report = trainer.train_step(batch_of(trainer))
    assert report.keys() == {"loss", "latent"} | (set() if tokens in ("seg0", "paper") else {"sup"})
    assert all(torch.isfinite(torch.tensor(float(v))) for v in report.values())
    trained = {n: p for n, p in trainer.network.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    assert {n.split(".")[0] for n in trained} == {"encoder", "unet"}
    with torch.no_grad():
        assert torch.isfinite(trainer.network.eval()(batch_of(trainer)["data"])).all()


@pytest.mark.parametrize(
    "labels", [{"background": 0, "a": [1, 2], "b": 2, "ignore": 3}, {"background": 0, "a": 1, "ignore": 2}]
)
def test_nothing_is_learned_where_nobody_looked(labels: dict[str, Any]) -> None:
    trainer = leaf("noAlign", labels=labels)
    batch = batch_of(trainer)
    assert float(trainer.train_step(batch)["loss"]) > 0
    if trainer.label_space.regions:
        batch["target"][:, -1] = True
    else:
        batch["target"][:] = 2
    report = trainer.train_step(batch)
    assert report["latent"] == report["sup"] == report["loss"] == 0


def test_contradictory_settings() -> None:
    with pytest.raises(SettingsError, match="steps=20 is more than the schedule has"):
        find_trainer("LEAFTrainer_T10_20steps")
    with pytest.raises(SettingsError, match="use the token 'eps', which sets both"):
        find_trainer("LEAFTrainer").Settings(kind="eps")


# ------------------------------------------------------------------ alignment (METHODS 5.5-3, 5.5-4)
@pytest.mark.parametrize("tokens", ["", "convProjector_alignLevel0"])
@pytest.mark.parametrize("kind", [FLAT, SMALL])
def test_who_is_trained(kind: Kind, tokens: str, vit: None) -> None:
    trainer = leaf(tokens, kind)
    parts = {"network": trainer.network, "vision": trainer.vision, "projector": trainer.projector}
    before = {name: parameters_of(part) for name, part in parts.items()}
    scale = trainer.network.codec.scale.mean.clone()
    report = trainer.train_step(batch_of(trainer))
    assert 0 < float(report["align"]) < 2
    moved = changed(before["network"], trainer.network)
    assert {n.split(".")[0] for n in moved} == {"encoder", "unet"}
    assert changed(before["vision"], trainer.vision) == set()
    assert changed(before["projector"], trainer.projector) == set(before["projector"])
    assert torch.equal(trainer.network.codec.scale.mean, scale)
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for part in (trainer.vision, trainer.network.codec) for p in part.parameters()}


def test_inference_is_the_same_with_and_without_alignment(vit: None) -> None:
    """Parameters, names and operations; a checkpoint's network_weights hold neither teacher nor projector."""
    found = []
    for tokens in ("", "noAlign"):
        trainer = leaf(tokens)
        trainer.train_step(batch_of(trainer))
        trainer.start_teacher()
        saved = read_safely(finish(trainer) / "fold_0" / FINAL)
        assert ("diffext_projector" in saved) == (tokens == "")
        net = trainer.network.eval()
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            net(batch_of(trainer)["data"])
        sizes = {k: tuple(v.shape) for k, v in saved["network_weights"].items()}
        found.append((sum(p.numel() for p in net.parameters()), sizes, flops.get_total_flops()))
    assert found[0] == found[1] and found[0][2] > 1e5
    assert {key.split(".")[0] for key in found[0][1]} == {"codec", "encoder", "unet"}
    assert not any(word in key for key in found[0][1] for word in ("vision", "teacher", "projector", "vit"))


@pytest.mark.parametrize(("level", "grid"), [(0, (8, 12)), (1, (4, 6))])
def test_teacher_sees_one_patch_per_feature(level: int, grid: tuple[int, int], vit: None) -> None:
    """METHODS 5.5-2, for a patch that is not square."""
    trainer = leaf(f"alignLevel{level}")
    seen: list[Tensor] = []
    trainer.vision.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    trainer.compute_losses(batch_of(trainer))
    assert seen[0].shape[2:] == tuple(trainer.vision.patch * n for n in grid) and seen[1].shape[2:] == grid
    assert not seen[1].requires_grad


@pytest.mark.parametrize(("tokens", "slices"), [("alignSlices1", 1), ("", 2), ("alignSlices9", 6)])
def test_slices_of_volumes(tokens: str, slices: int, vit: None) -> None:
    trainer = leaf(f"{tokens}_alignLevel0" if tokens else "alignLevel0", SMALL)
    seen: list[Tensor] = []
    trainer.vision.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    trainer.compute_losses(batch_of(trainer))
    assert len(seen[0]) == 2 * slices


def test_repeating_the_batch_does_not_change_the_alignment(vit: None) -> None:
    trainer = leaf("")
    image, features = batch_of(trainer)["data"], torch.randn(2, trainer.network.align_channels, 4, 6)
    once, twice = (trainer.alignment(image.repeat(n, 1, 1, 1), features.repeat(n, 1, 1, 1)) for n in (1, 2))
    torch.testing.assert_close(once, twice)


def test_teacher_does_not_see_the_masks_of_a_cascade(vit: None) -> None:
    """They come as further channels behind the image's."""
    trainer = leaf("")
    image, features = batch_of(trainer)["data"], torch.randn(2, trainer.network.align_channels, 4, 6)
    masks = torch.rand(2, 2, *FLAT.patch)
    alone, cascade = (trainer.alignment(x, features) for x in (image, torch.cat([image, masks], 1)))
    assert torch.equal(alone, cascade)


def test_weight_of_the_alignment(vit: None) -> None:
    report = leaf("align2_seg0p5").train_step(batch_of(leaf("noAlign")))
    wanted = report["latent"] + 2 * report["align"] + 0.5 * report["sup"]
    assert float(report["loss"]) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(("until", "epochs"), [("0p3", 3), ("0", 0), ("1", 10)])
def test_alignment_stops(until: str, epochs: int, vit: None) -> None:
    trainer = leaf(f"alignUntil{until}_10epochs_1iters")
    aligned = []
    for epoch in range(10):
        trainer.current_epoch, trainer._steps_this_epoch = epoch, 0
        aligned.append("align" in trainer.train_step(batch_of(trainer)))
    assert aligned == [True] * epochs + [False] * (10 - epochs)


def test_alignment_never_stops_within_an_epoch(vit: None) -> None:
    """Its losses could not be averaged."""
    trainer = leaf("alignUntil0p3_4epochs_2iters")
    for epoch, aligned in enumerate([True, True, False]):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        reports = [trainer.train_step(batch_of(trainer)) for _ in range(2)]
        assert ["align" in report for report in reports] == [aligned] * 2
        trainer.on_train_epoch_end(reports)
    assert len(trainer.logger.local_logger.my_fantastic_logging["train_align"]) == 2


def test_without_a_teacher() -> None:
    """The ways out; and nothing has been built when it is said."""
    save_codec()
    trainer = make_trainer("", FLAT, base="LEAFTrainer")
    with pytest.raises(PretrainedError) as caught:
        trainer.initialize()
    ways = ("network once", "nnUNet_diffext_teacher to a file", "folder in timm's layout", "ownTeacher", "noAlign")
    for way in ways:
        assert way in str(caught.value)
    assert trainer.network is None
    assert leaf("noAlign").vision is None


def test_projector_is_resumed(vit: None, no_loaders: None) -> None:
    trainer = leaf("ema0p9")
    trainer.train_step(batch_of(trainer))
    file = str(finish(trainer) / "fold_0" / FINAL)
    resumed = make_trainer("ema0p9", FLAT, base="LEAFTrainer")
    torch.manual_seed(5)
    resumed.load_checkpoint(file)
    resumed.on_train_start()
    assert changed(parameters_of(trainer.projector), resumed.projector) == set()
    reports = []
    for t in (trainer, resumed):
        torch.manual_seed(1)
        reports.append(t.train_step(batch_of(t, 1)))
    assert reports[0] == reports[1]


@pytest.mark.parametrize(("until", "needed"), [("0p5", False), ("0p9", True)])
def test_continuing_needs_the_teacher_while_it_aligns(
    until: str, needed: bool, vit: None, no_loaders: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of ten epochs are done. Loading alone, as for validating, never needs it."""
    tokens = f"alignUntil{until}_10epochs_1iters_ema0p9"
    trainer = leaf(tokens)
    trainer.train_step(batch_of(trainer))
    trainer.current_epoch = 5
    file = str(finish(trainer) / "fold_0" / FINAL)
    monkeypatch.delenv("nnUNet_diffext_teacher")
    resumed = make_trainer(tokens, FLAT, base="LEAFTrainer")
    resumed.load_checkpoint(file)
    assert resumed.current_epoch == 6 and resumed.vision is None
    assert changed(parameters_of(trainer.projector), resumed.projector) == set()
    if needed:
        with pytest.raises(PretrainedError, match="token noAlign"):
            resumed.on_train_start()
        return
    resumed.on_train_start()
    trainer.current_epoch = 6
    reports = []
    for t in (trainer, resumed):
        torch.manual_seed(1)
        reports.append(t.train_step(batch_of(t, 1)))
    assert reports[0] == reports[1] and "align" not in reports[0]


def test_continuing_with_another_teacher(vit: None, no_loaders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = leaf("")
    width = trainer.vision.channels
    file = str(finish(trainer) / "fold_0" / FINAL)
    resumed = make_trainer("", FLAT, base="LEAFTrainer")
    resumed.load_checkpoint(file)
    resumed.current_epoch = 1
    monkeypatch.setattr("nnunet_diffext.trainers.leaf.find_teacher", lambda trainer, name: Wider(width))
    with pytest.raises(PretrainedError, match=f"width {2 * width}, but this training began with .* of width {width}"):
        resumed.on_train_start()


class Wider(torch.nn.Module):
    """A teacher with other tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = 2 * width
