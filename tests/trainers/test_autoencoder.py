"""The mask autoencoder's training: labels alone, all kinds of them, up to a reconstruction that can be built on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import Kind, make_batch, make_plans, ready_trainer
from tiny_latent import FLAT, SMALL
from torch import Tensor

from nnunet_diffext.inference.reconstruction import ReconstructionDice, too_lossy
from nnunet_diffext.networks.mask_autoencoder import MaskAutoencoder
from nnunet_diffext.trainers import find_trainer

QUICK = "warmup5_lr1e-2"
DEEP = Kind((32, 32), ((1, 1), (2, 2), (2, 2)), features=(8, 16, 16))
THREE = {"background": 0, "disc": 1, "core": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}


def autoencoder(tokens: str = QUICK, kind: str | Kind = FLAT, **options: Any) -> Any:
    return ready_trainer(tokens, kind, base="MaskAutoencoderTrainer", **options)


def labels_of(kind: Kind, batch: int = 4, seed: int = 0) -> Tensor:
    """Discs (1) with a core (2) anywhere: ``(B, 1, *patch)``."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*[torch.arange(float(s)) for s in kind.patch], indexing="ij")
    size, drawn = min(kind.patch[-2:]), []
    for _ in range(batch):
        centre = [s * (0.3 + 0.4 * float(torch.rand((), generator=generator))) for s in kind.patch]
        distance = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)).sqrt()
        drawn.append((distance < 0.35 * size).short() + (distance < 0.2 * size).short())
    return torch.stack(drawn)[:, None]


def target_of(trainer: Any, labels: Tensor) -> Tensor:
    """As nnU-Net's loader gives it; a stripe is ignored if there is an ignore label."""
    space = trainer.label_space
    stripe = torch.zeros_like(labels, dtype=torch.bool)
    stripe[..., :3] = space.ignore_label is not None
    if space.regions:
        masks = torch.cat([labels > 0, labels > 1, *([stripe] if space.ignore_label is not None else [])], 1)
        return masks
    return labels.clamp(max=space.num_heads - 1).masked_fill(stripe, space.ignore_label or 0)


def batch_of(trainer: Any, kind: Kind = FLAT, seed: int = 0) -> dict[str, Tensor]:
    labels = labels_of(kind, seed=seed)
    return {"data": torch.full((len(labels), 1, *kind.patch), torch.nan), "target": target_of(trainer, labels)}


# ------------------------------------------------------------------ does it learn?
CASES: dict[str, tuple[Kind, dict[str, Any]]] = {
    "classes": (DEEP, {"labels": THREE}),
    "ignore": (DEEP, {"labels": {**THREE, "ignore": 3}}),
    "regions": (DEEP, {"labels": REGIONS}),
    "regions-ignore": (DEEP, {"labels": {**REGIONS, "ignore": 3}}),
    "3d-aniso": (Kind((6, 24, 24), SMALL.strides, features=(8, 16, 16)), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_learns_to_reconstruct(case: str) -> None:
    """Shapes it has not seen, through latents of 1/4 of the voxels, without ever seeing an image."""
    kind, options = CASES[case]
    trainer = autoencoder(f"{QUICK}_width1", kind=kind, **options)
    for step in range(60 if len(kind.patch) == 3 else 120):
        trainer.train_step(batch_of(trainer, kind, step % 20))
    trainer.network.eval()
    score = ReconstructionDice(trainer.network, trainer.label_space)
    for seed in (100, 101):
        score.add(*trainer.label_space.encode(batch_of(trainer, kind, seed)["target"]))
    assert len(score.dice()) == trainer.label_space.num_heads - (not trainer.label_space.regions)
    assert min(score.dice()) > 0.95
    assert too_lossy(score.dice(), ["a", "b"][: len(score.dice())], 0.95) == {}


# ------------------------------------------------------------------ what it learns from
@pytest.mark.parametrize("values", [0.0, 1e4, torch.nan])
def test_images_do_not_matter(values: float) -> None:
    trainer = autoencoder()
    losses = []
    for data in (torch.randn(2, 1, *FLAT.patch), torch.full((2, 1, *FLAT.patch), values)):
        torch.manual_seed(3)
        found = trainer.compute_losses({**make_batch(trainer, unlabeled=False), "data": data})
        losses.append({name: loss.item() for name, loss in found.items()})
    assert losses[0] == losses[1] and losses[0]["sup"] > 0.1


@pytest.mark.parametrize("labels", [{"background": 0, "ball": 1, "ignore": 2}, {**REGIONS, "ignore": 3}])
def test_ignored_voxels_bring_no_gradient(labels: dict[str, Any]) -> None:
    trainer = autoencoder(labels=labels)
    logits: list[Tensor] = []
    trainer.network.decoder.register_forward_hook(lambda _, __, out: out.retain_grad() or logits.append(out))
    batch = batch_of(trainer)
    losses = trainer.compute_losses(batch)
    losses["sup"].backward()
    gradient = logits[0].grad.abs().amax(1, keepdim=True)
    assert gradient[..., :3].max() == 0
    assert gradient[..., 3:].amax((1, 2, 3)).min() > 0
    if trainer.label_space.regions:
        batch["target"][:, -1] = True
    else:
        batch["target"][:] = 2
    assert float(trainer.compute_losses(batch)["sup"]) == 0


def test_one_step_reaches_every_parameter() -> None:
    for kind in (FLAT, "3d-aniso-resenc"):
        trainer = autoencoder(kind=kind)
        report = trainer.train_step(make_batch(trainer, unlabeled=False))
        assert report.keys() == {"loss", "sup", "size"}
        assert [n for n, p in trainer.network.named_parameters() if p.grad is None] == []
        assert int(trainer.network.scale.updates) == 1


def test_weight_of_the_latents_size() -> None:
    report = autoencoder("size0p5").train_step(make_batch(autoencoder(), unlabeled=False))
    assert float(report["loss"]) == pytest.approx(float(report["sup"] + 0.5 * report["size"]), rel=1e-5)


# ------------------------------------------------------------------ validation
def test_validation_reconstructs_masks_and_writes_it_down() -> None:
    trainer = autoencoder(labels={"background": 0, "disc": 1, "core": 2})
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(batch_of(trainer))])
    trainer.network.eval()
    with torch.no_grad():
        result = trainer.validation_step(batch_of(trainer))
        clean, _ = trainer.label_space.encode(batch_of(trainer)["target"])
        hard = trainer.network(clean.bool()).argmax(1)
    hits = [int(((hard == c) & (clean[:, c] == 1)).sum()) for c in (1, 2)]
    assert list(result["tp_hard"]) == hits
    trainer.on_validation_epoch_end([result])
    trainer.perform_actual_validation()
    written = json.loads((Path(trainer.output_folder) / "validation" / "reconstruction.json").read_text())["dice"]
    wanted = 2 * result["tp_hard"] / (2 * result["tp_hard"] + result["fp_hard"] + result["fn_hard"])
    assert list(written) == ["disc", "core"] and list(written.values()) == pytest.approx(wanted.tolist())


def test_nothing_to_write_before_the_first_validation() -> None:
    trainer = autoencoder("seed5")
    trainer.perform_actual_validation()
    assert not (Path(trainer.output_folder) / "validation").exists()


# ------------------------------------------------------------------ the score
def test_reconstruction_dice_by_hand() -> None:
    """Pooled over patches, over annotated voxels, and NaN for a label that no patch shows."""
    space = autoencoder(labels={"background": 0, "a": 1, "b": 2, "ignore": 3}).label_space
    truth = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 3]]])[:, None]
    given = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 0, 1]]])
    score = ReconstructionDice(torch.nn.Identity(), space)
    onehot, valid = space.encode(truth)
    logits = 10 * torch.nn.functional.one_hot(given, 3).movedim(-1, 1).float()
    score.count(logits[:1], onehot[:1], valid[:1])
    score.count(logits[1:], onehot[1:], valid[1:])
    dice = score.dice()
    assert dice[0] == pytest.approx(2 * 2 / (3 + 3)) and dice[1] != dice[1]
    assert too_lossy(dice, ["a", "b"], 0.95) == {"a": dice[0]} and too_lossy(dice, ["a", "b"], 0.5) == {}


# ------------------------------------------------------------------ as nnU-Net builds it
@pytest.mark.parametrize(("tokens", "stride", "channels"), [("", (1, 2, 2), 4), ("_stride1_channels2", (1, 1, 1), 2)])
def test_built_from_the_plans(tokens: str, stride: tuple[int, ...], channels: int) -> None:
    trainer = find_trainer(f"MaskAutoencoderTrainer{tokens}")
    plans = make_plans("3d-aniso-resenc")
    plans["diffext"] = {
        "MaskAutoencoderTrainer": trainer.Settings(**trainer.overrides).as_dict(),
        "label_space": {"num_heads": 3, "regions": False, "ignore_label": None},
    }
    manager = PlansManager(plans)
    arguments = (manager, manager.get_configuration("3d_fullres"), 4, 3)
    on, off = (trainer.build_network_architecture(*arguments, enable_deep_supervision=d) for d in (True, False))
    assert type(on) is MaskAutoencoder and (on.stride, on.channels) == (stride, channels)
    off.load_state_dict(on.state_dict(), strict=True)


# ------------------------------------------------------------------ AdamW
def rates(tokens: str, steps: int) -> list[float]:
    """Learning rates of the optimiser's steps."""
    trainer = autoencoder(tokens)
    seen: list[float] = []
    plain = trainer.optimizer.step
    trainer.optimizer.step = lambda *a, **k: seen.append(trainer.optimizer.param_groups[0]["lr"]) or plain(*a, **k)
    for step in range(steps):
        trainer._steps_this_epoch = step
        trainer.train_step(make_batch(trainer, unlabeled=False))
    return seen


def test_warm_up() -> None:
    assert rates("warmup4_lr1e-3_10iters", 6) == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert rates("warmup0_lr1e-3", 2) == [1e-3, 1e-3]


@pytest.mark.parametrize(
    ("token", "share"), [("", 0.5**0.9), ("_cosineLR", 0.5), ("_constantLR", 1.0)], ids=["poly", "cosine", "constant"]
)
def test_decay(token: str, share: float) -> None:
    """Half way through the training."""
    trainer = autoencoder(f"10epochs_lr1e-3_wd0p5_momentum0p8{token}")
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    group = trainer.optimizer.param_groups[0]
    assert group["weight_decay"] == 0.5 and group["betas"] == (0.8, 0.999)
    for _ in range(5):
        trainer.lr_scheduler.step()
    assert group["lr"] == pytest.approx(1e-3 * share)
    trainer.lr_scheduler.step(0)
    assert group["lr"] == pytest.approx(1e-3)
