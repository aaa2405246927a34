"""What M4oE's training and its online validation make of labels that nobody looked for; modalities of all cases."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import make_trainer
from tiny_m4oe import CASES, LABELS, TWO, batch_of, ready, trainer_of
from torch import Tensor

from nnunet_diffext.data.modalities import ModalityError

MIXED = {"modalities": CASES, "annotated": {"MR": ["b"], "ct_0": ["a"]}}
"""CT has both labels, but nobody looked for "b" in ct_0."""
IGNORE = {**LABELS, "ignore": 3}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
OF_REGIONS = {"modalities": CASES, "annotated": {"MR": ["whole"], "ct_0": ["core"]}}


def logits_of(trainer: Any, count: int = 2, seed: int = 0) -> Tensor:
    shape = (count, trainer.label_space.num_heads, *trainer.configuration_manager.patch_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss_of(trainer: Any, logits: Tensor, batch: dict[str, Any]) -> Tensor:
    modality = trainer.modality_of(batch["keys"], len(logits))
    return trainer.annotated_loss(logits, batch["target"], trainer.learned_heads(batch["keys"], modality))


# ------------------------------------------------------------------ training
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("tokens", ["", "asBackground"])
def test_labels_of_other_modalities_do_not_dilute_the_loss(tokens: str, batch_dice: bool) -> None:
    """However many there are: CT alone, and CT beside MR with three labels more."""
    alone = ready(tokens, labels={"background": 0, "a": 1}, diffext=None, batch_dice=batch_dice)
    names = {"background": 0, "a": 1, "b": 2, "c": 3, "d": 4}
    block = {"modalities": CASES, "annotated": {"CT": ["a"], "MR": ["b", "c", "d"]}}
    beside = ready(tokens, labels=names, diffext=block, batch_dice=batch_dice)
    batch, logits = batch_of(alone, ("ct_0", "ct_1")), logits_of(alone)
    absent = torch.full((2, 3, *logits.shape[2:]), -1e4)
    assert loss_of(beside, torch.cat([logits, absent], 1), batch).item() == pytest.approx(
        loss_of(alone, logits, batch).item(), abs=1e-6
    )


def test_a_batch_of_one_modality_leaves_the_other_head_alone() -> None:
    trainer = ready()
    trainer.train_step(batch_of(trainer, ("ct_0", "ct_1")))
    ct, mr = trainer.network.head.seg_layers
    assert ct.weight.grad.abs().max() > 0 and mr.weight.grad.abs().max() == 0


@pytest.mark.parametrize("tokens", ["", "asBackground"])
def test_label_that_nobody_looked_for_in_this_case(tokens: str) -> None:
    """As good as background in ct_0, unless it shall be background; ruled out in ct_1."""
    trainer = ready(tokens, diffext=MIXED)
    batch, logits = batch_of(trainer, ("ct_0", "ct_1")), logits_of(trainer).requires_grad_()
    batch["target"].zero_()
    loss_of(trainer, logits, batch).backward()
    pushed_away = logits.grad[:, 2] > 0
    assert pushed_away[1].all() and (pushed_away[0].all() if tokens else not pushed_away[0].any())


@pytest.mark.parametrize("labels", [LABELS, IGNORE])
@pytest.mark.parametrize("tokens", ["", "asBackground"])
def test_voxels_with_a_label_that_is_not_annotated_do_not_count(tokens: str, labels: dict[str, int]) -> None:
    """MR has no "a" at all: no gradient from such voxels, nor from ignored ones, and the loss stays finite."""
    trainer = ready(tokens, diffext=MIXED, labels=labels)
    batch, logits = batch_of(trainer, ("ct_1", "mr_0")), logits_of(trainer).requires_grad_()
    batch["target"][:, :, :3] = 1
    if "ignore" in labels:
        batch["target"][:, :, 3:6] = 3
    loss = loss_of(trainer, logits, batch)
    loss.backward()
    assert loss < 5
    assert logits.grad[0, :, :3].abs().min() > 0 and logits.grad[1, :, :3].abs().max() == 0
    if "ignore" in labels:
        assert logits.grad[:, :, 3:6].abs().max() == 0


def test_regions() -> None:
    trainer = ready(labels=REGIONS, diffext=OF_REGIONS)
    batch, logits = batch_of(trainer, ("ct_0", "ct_1", "mr_0")), logits_of(trainer, 3).requires_grad_()
    batch["target"][:] = True
    loss_of(trainer, logits, batch).backward()
    used = logits.grad.abs().amax((2, 3)) > 0
    assert used.tolist() == [[False, True], [True, True], [True, False]]


# ------------------------------------------------------------------ online validation
class Everywhere(torch.nn.Module):
    """Finds one head in every voxel of every sample."""

    def __init__(self, heads: int, found: int) -> None:
        super().__init__()
        self.heads, self.found = heads, found

    def forward(self, image: Tensor, *, modality: Tensor | None = None) -> Tensor:
        out = torch.full((len(image), self.heads, *image.shape[2:]), -5.0)
        out[:, self.found] = 5
        return out


def counts(trainer: Any, batch: dict[str, Any], found: int) -> dict[str, list[float]]:
    trainer.network = Everywhere(trainer.label_space.num_heads, found)
    result = trainer.validation_step({**batch, "target": batch["target"].clone()})
    assert result["loss"] < 10
    return {key: result[key].tolist() for key in ("tp_hard", "fp_hard", "fn_hard")}


@pytest.mark.parametrize("tokens", ["", "asBackground"])
def test_validation_does_not_count_what_nobody_looked_for(tokens: str) -> None:
    trainer = ready(tokens, diffext=MIXED)
    size = 16 * 24
    for key, false in (("ct_0", 0), ("ct_1", size)):
        batch = batch_of(trainer, (key,))
        batch["target"].zero_()
        found = counts(trainer, batch, 2)
        assert found == {"tp_hard": [0, 0], "fp_hard": [0, false], "fn_hard": [0, 0]}, key


def test_validation_does_not_count_voxels_whose_label_does_not_count() -> None:
    """Whatever is predicted there: neither missed nor wrong."""
    trainer = ready(diffext=MIXED, labels=IGNORE)
    batch = batch_of(trainer, ("ct_0",))
    batch["target"][:] = 1
    batch["target"][:, :, :4] = 2
    batch["target"][:, :, 4:8] = 3
    for head in range(3):
        found = counts(trainer, batch, head)
        missed, hit = (0.0, 8 * 24.0) if head == 1 else (8 * 24.0, 0.0)
        assert found == {"tp_hard": [hit, 0], "fp_hard": [0, 0], "fn_hard": [missed, 0]}, head


def test_validation_of_regions() -> None:
    trainer = ready(labels=REGIONS, diffext=OF_REGIONS)
    batch = batch_of(trainer, ("ct_0", "mr_0"))
    batch["target"][:] = True
    found = counts(trainer, batch, 0)
    assert found == {"tp_hard": [16 * 24.0, 0], "fp_hard": [0, 0], "fn_hard": [0, 16 * 24.0]}, "core missed in CT alone"


def test_validation_knows_the_modality() -> None:
    """And uses the network and the loss of the training, which are themselves again afterwards."""
    trainer = ready()
    network, loss, batch = trainer.network.eval(), trainer.loss, batch_of(trainer)
    with torch.no_grad():
        result = trainer.validation_step({**batch, "target": batch["target"].clone()})
        logits = network(batch["data"], modality=torch.tensor([0, 1]))
    assert result["loss"] == pytest.approx(loss_of(trainer, logits, batch).item(), rel=1e-4)
    assert trainer.network is network and trainer.loss == loss
    with pytest.raises(ModalityError):
        trainer.validation_step({**batch, "keys": ["ct_0", "unknown"]})
    with pytest.raises(ValueError):
        trainer.validation_step({**batch, "data": batch["data"][:, :, :5]})
    assert trainer.network is network and trainer.loss == loss


# ------------------------------------------------------------------ stock nnU-Net with the same loss
stock = partial(make_trainer, kind="2d-deep", base="nnUNetTrainer", **{"labels": LABELS, "diffext": MIXED})


@pytest.mark.parametrize("labels", [LABELS, IGNORE])
def test_loss_of_the_stock_trainer(labels: dict[str, int]) -> None:
    """On every level of deep supervision. Without the token it is nnU-Net."""
    for tokens in ("", "maskUnannotated"):
        trainer = stock(tokens, labels=labels)
        trainer.initialize()
        batch = {"keys": ["ct_0", "ct_1"], "data": torch.randn(2, 1, 64, 64)}
        output = [level.detach().requires_grad_() for level in trainer.network(batch["data"])]
        batch["target"] = [torch.zeros(2, 1, *level.shape[2:], dtype=torch.short) for level in output]
        for target in batch["target"]:
            target[:, :, :2] = 2
        trainer._note_annotated(batch)
        trainer.loss(output, batch["target"]).backward()
        assert len(output) == 5
        for level in output[:-1]:  # nnU-Net gives the last one no weight
            ruled_out = level.grad[:, 2, 2:] > 0
            assert ruled_out[1].all() and (not ruled_out[0].any() if tokens else ruled_out[0].all())
            wrong = level.grad[:, :, :2].abs()
            assert wrong[1].min() > 0 and (wrong[0].max() == 0 if tokens else wrong[0].min() > 0)
        assert torch.isfinite(torch.as_tensor(trainer.train_step(batch)["loss"]))


@pytest.mark.parametrize("tokens", ["", "maskUnannotated"])
def test_validation_of_the_stock_trainer(tokens: str) -> None:
    trainer = stock(tokens)
    trainer.initialize()
    batch = {"keys": ["ct_0"], "data": torch.randn(1, 1, 64, 64)}
    target = [torch.zeros(1, 1, 64 >> level, 64 >> level, dtype=torch.short) for level in range(5)]
    target[0][:, :, :4] = 2
    trainer.network = lambda image: [
        10 * torch.eye(3)[2].view(1, 3, 1, 1) + torch.zeros(1, 3, *t.shape[2:]) for t in target
    ]
    result = trainer.validation_step({**batch, "target": target})
    false, true = (0, 0) if tokens else (60 * 64, 4 * 64)
    assert [result[k].tolist() for k in ("tp_hard", "fp_hard", "fn_hard")] == [[0, true], [0, false], [0, 0]]


@pytest.mark.parametrize(("diffext", "useless"), [(None, True), ({"modalities": CASES}, True), (MIXED, False)])
def test_stock_trainer_says_when_everything_is_annotated(diffext: Any, useless: bool) -> None:
    trainer, said = stock("maskUnannotated", diffext=diffext), []
    trainer.print_to_log_file = lambda *text, **_: said.append(" ".join(map(str, text)))
    trainer.initialize()
    assert any("maskUnannotated changes nothing" in line for line in said) == useless


# ------------------------------------------------------------------ every case has a modality
@pytest.mark.parametrize("base", ["M4oETrainer", "M4oEPretrainTrainer", "nnUNetTrainer"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_case_without_a_modality_is_refused_before_the_training(base: str, part: str, nnunet_folders: Any) -> None:
    trainer = trainer_of(base=base) if base != "nnUNetTrainer" else stock("maskUnannotated")
    split = {"train": ["ct_0", "mr_0"], "val": ["ct_1"]}
    split[part].append("case_7")
    folder = Path(trainer.preprocessed_dataset_folder_base)
    (folder / "splits_final.json").write_text(json.dumps([split]))
    said: list[str] = []
    trainer.print_to_log_file = lambda *text, **_: said.append(" ".join(map(str, text)))
    with pytest.raises(ModalityError, match="no modality for the case 'case_7'.*nnUNet_preprocessed"):
        trainer.run_training()
    assert not any("Epoch" in line for line in said) and trainer.dataloader_train is None


def test_unlabelled_image_without_a_modality_is_refused(nnunet_folders: Any) -> None:
    trainer = ready(base="M4oEPretrainTrainer")
    folder = Path(trainer.preprocessed_dataset_folder_base)
    splits = [{"train": ["ct_0"], "val": ["mr_0"], "unlabeled": ["case_000"]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    trainer.do_split()
    with pytest.raises(ModalityError, match="no modality for the case 'case_000'"):
        trainer._find_pool()


def test_dataset_json_is_checked_when_the_trainer_is_made() -> None:
    with pytest.raises(ModalityError, match="'c' cannot be annotated"):
        trainer_of(diffext={**TWO, "annotated": {"CT": ["c"]}})


@pytest.mark.parametrize("gate", ["", "noGN"])
def test_modality_without_a_training_case_does_not_answer(
    gate: str, nnunet_folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing teaches its expert and its head, as if add_modality had just made them."""
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    trainer = ready(gate)
    folder = Path(trainer.preprocessed_dataset_folder_base)
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["ct_0", "ct_1"], "val": ["mr_0"]}]))
    said: list[str] = []
    trainer.print_to_log_file = lambda *text, **_: said.append(" ".join(map(str, text)))
    trainer.on_train_start()
    assert [line for line in said if "nothing teaches MR, of which fold 0 has no training case" in line]
    report = trainer.train_step(batch_of(trainer, ("ct_0", "mr_0")))
    assert float(report["modality"]) < 2, "what cannot be told is no error"
    network = trainer.network.eval()
    assert network.active.tolist() == [True, False]
    image = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    with torch.no_grad():
        assert network.tell(image).exp()[:, 1].max() == 0
        assert network(image).softmax(1)[:, 2].max() < 1e-6, "the label that only MR has"
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["ct_0", "mr_1"], "val": ["mr_0"]}]))
    both = ready(gate)
    both.on_train_start()
    assert both.module.active.all()
