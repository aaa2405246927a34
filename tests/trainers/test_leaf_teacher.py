"""LEAF's teacher where there is no pretrained one: a masked autoencoder of the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DATASET, Kind, make_trainer, parameters_of
from tiny_latent import FLAT, SMALL, batch_of, changed, leaf, offline, save_codec
from tiny_m4oe import CASES, LABELS, TWO
from tiny_prior import finish, save_prior
from torch import Tensor

from nnunet_diffext.networks.swin_teacher import SwinTeacher
from nnunet_diffext.stages import StageError

TEACHER = "nnUNet_diffext_teacher"
SIZE = "dim8_window3"


@pytest.fixture(autouse=True)
def alone(nnunet_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's folders of one test, and nothing pretrained anywhere."""
    offline(monkeypatch, tmp_path)


def save_teacher(kind: Kind = FLAT, tokens: str = SIZE, **options: Any) -> Path:
    """Model folder of an untrained masked autoencoder."""
    torch.manual_seed(1)
    trainer = make_trainer(tokens, kind, base="M4oEPretrainTrainer", **options)
    trainer.initialize()
    return finish(trainer)


def student(monkeypatch: pytest.MonkeyPatch, kind: Kind = FLAT, tokens: str = "", **options: Any) -> Any:
    """LEAF's trainer with such a teacher."""
    monkeypatch.setenv(TEACHER, str(save_teacher(kind, **options)))
    return leaf(tokens, kind, **options)


@pytest.mark.parametrize("kind", [FLAT, SMALL])
def test_one_step(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = student(monkeypatch, kind)
    assert isinstance(trainer.vision, SwinTeacher)
    before = [parameters_of(part) for part in (trainer.vision, trainer.projector)]
    report = trainer.train_step(batch_of(trainer))
    assert 0 < float(report["align"]) < 2
    assert changed(before[0], trainer.vision) == set()
    assert changed(before[1], trainer.projector) == set(before[1])
    assert not any("autoencoder" in key or "vision" in key for key in trainer.network.state_dict())


def test_features_learn_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss can be reduced: student and teacher see the same places."""
    trainer = student(monkeypatch, tokens="align50_lr1e-3_warmup0")
    batch = batch_of(trainer)
    losses = [float(trainer.train_step(batch)["align"]) for _ in range(60)]
    assert losses[-1] < 0.3 < 0.8 < losses[0]


def test_found_by_name() -> None:
    model = save_teacher(tokens="")
    assert model.name.startswith("M4oEPretrainTrainer__")
    assert isinstance(leaf("ownTeacher").vision, SwinTeacher)


def test_tokens_are_standardised_and_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a volume, every slice of the grid is one map; nothing is mixed between samples or slices."""
    teacher = student(monkeypatch, SMALL).vision
    image = torch.randn(2, 1, *SMALL.patch, generator=torch.Generator().manual_seed(3))
    tokens = teacher(image)
    assert tokens.shape[:2] == (2, teacher.channels) and not tokens.requires_grad
    places = tuple(range(2, tokens.ndim))
    torch.testing.assert_close(tokens.mean(places), torch.zeros(2, teacher.channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.std(places, correction=0), torch.ones(2, teacher.channels), atol=1e-3, rtol=0)
    features = torch.randn(2, 5, *tokens.shape[2:])
    pair: tuple[Tensor, Tensor] = teacher.pair(image, features, 1)
    depth = tokens.shape[2]
    for got, whole in zip(pair, (features, tokens), strict=True):
        assert got.shape == (2 * depth, whole.shape[1], *whole.shape[3:])
        torch.testing.assert_close(got[depth + 1], whole[1, :, 1])


def test_experts_follow_the_modality(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = student(monkeypatch, labels=LABELS, diffext=TWO)
    ct, mr = (next(case for case, name in CASES.items() if name == m) for m in ("CT", "MR"))
    image = batch_of(trainer)["data"][:1].repeat(2, 1, 1, 1)
    same, different = (trainer.vision(image, keys) for keys in ([ct, ct], [ct, mr]))
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], different[0])
    assert (different[0] - different[1]).abs().max() > 1e-4


def test_no_teacher_of_this_name() -> None:
    save_codec()
    trainer = make_trainer("ownTeacher", FLAT, base="LEAFTrainer")
    command = f"nnUNetv2_train {DATASET} 2d 0 -tr M4oEPretrainTrainer -p nnUNetPlans"
    with pytest.raises(StageError, match=f"No teacher for fold 0 in .*Train it first:\n  {command}") as error:
        trainer.initialize()
    assert "token noAlign" in str(error.value)
    assert trainer.network is None


def test_another_training_is_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TEACHER, str(save_prior(kind=FLAT)[0]))
    with pytest.raises(StageError, match="trained by nnUNetTrainer, which is no masked autoencoder"):
        leaf("")


def test_modalities_of_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = {"modalities": {case: TWO["modalities"][case] for case in reversed(CASES)}}
    monkeypatch.setenv(TEACHER, str(save_teacher(labels=LABELS, diffext=turned)))
    with pytest.raises(StageError, match="knows the modalities MR, CT; this training is on CT, MR"):
        leaf("", labels=LABELS, diffext={"modalities": CASES})
