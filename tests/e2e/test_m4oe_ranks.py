"""M4oE on two ranks, in a cascade, and on an ordinary dataset of one modality."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ranks import Results, check_ranks_agree, train_on_two_ranks
from workspace import MAIN, Workspace, curves, log_of, make_trainer, predict, train

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.inference.modality import set_modality
from nnunet_diffext.inference.predictor import Predictor
from nnunet_diffext.stages import FINAL
from nnunet_diffext.trainers.m4oe import ONE_MODALITY
from nnunet_diffext.trainers.m4oe_growth import add_modality

pytestmark = pytest.mark.slow

VARIABLE = "nnUNet_diffext_pretraining"
SIZE = "dim8_window3_depth1"
SMALL = f"{SIZE}_1epochs_2iters_1valiters_noMAE"
BUDGET = "2epochs_2iters_1valiters"
GROWN = f"M4oETrainer_{SIZE}_experts4"
FULL = (f"{GROWN}_{BUDGET}", f"M4oEPretrainTrainer_{SIZE}_{BUDGET}")
FREEZE = f"{GROWN}_freezeOld_2iters_seed3"
STEPS = (
    FREEZE,
    *(
        f"M4oETrainer_{SIZE}_noMAE_{token}_2iters_seed3"
        for token in ("noGN", "top1_balance0p01", "sampleGate", "officialGate_asBackground", "woMoE", "swinUNet")
    ),
)
CASES = ("case_000", "case_001", "case_002", "case_003", "case_004", "extra_000", "extra_001")


def set_modalities(workspace: Workspace, *names: str) -> None:
    """Give the cases modalities in turn, in the copy of ``dataset.json`` that trainings read."""
    file = workspace.preprocessed(MAIN) / "dataset.json"
    modalities = {case: names[i % len(names)] for i, case in enumerate(CASES)}
    file.write_text(json.dumps({**json.loads(file.read_text()), "diffext": {"modalities": modalities}}))


@pytest.fixture(scope="module")
def own(workspace: Workspace, main_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The main dataset with two modalities."""
    made = Workspace(tmp_path_factory.mktemp("modalities"))
    (made.root / "nnUNet_results").mkdir()
    for folder in ("raw", "preprocessed"):
        shutil.copytree(getattr(workspace, folder)(main_dataset), getattr(made, folder)(main_dataset))
    return made


@pytest.fixture(scope="module")
def results(own: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What both ranks report: of trainings that go on from a model with one modality, and of others."""
    folder = tmp_path_factory.mktemp("ddp")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.environment.items():
            patch.setenv(name, value)
        set_modalities(own, "MR")
        train(MAIN, f"M4oETrainer_{SMALL}")
        set_modalities(own, "MR", "CT")
        larger = add_modality(own.model(MAIN, f"M4oETrainer_{SMALL}"), MAIN, folder / "larger", [0])
    assert f"M4oETrainer_{SIZE}" in larger.trainer and larger.trainer.endswith("experts4")
    environment = {**own.environment, VARIABLE: str(larger.folder)}
    return train_on_two_ranks(folder, MAIN, [FULL[0], *STEPS, FULL[1]], environment)


@pytest.mark.parametrize("name", [*FULL, *STEPS])
def test_ranks_agree(results: Results, name: str) -> None:
    check_ranks_agree(*(rank[name] for rank in results))


def test_only_what_is_new_is_trained(results: Results) -> None:
    """Heads and experts of the new modality; attention, norms and the like have no gradient at all."""
    one = results[0][FREEZE]
    assert 0 < sum(one["trained"]) < len(one["trained"]) / 2
    moved = [a != b for a, b in zip(one["before"], one["state"]["parameters"], strict=True)]
    assert not any(m for m, trained in zip(moved, one["trained"], strict=True) if not trained)


@pytest.mark.parametrize("name", FULL)
def test_rank_0_leaves_a_complete_model(results: Results, name: str, own: Workspace) -> None:
    fold = own.model(MAIN, name) / "fold_0"
    assert {len(v) for v in curves(fold / FINAL).values()} == {2}
    assert any((fold / "validation").iterdir()) and "non-finite" not in log_of(fold)
    assert (fold / "expert_usage.json").is_file() == (name == FULL[0])


def test_ordinary_dataset(workspace: Workspace, main_dataset: str, test_images: Path, tmp_path: Path) -> None:
    name = f"M4oETrainer_{SMALL}"
    train(main_dataset, name, "2d")
    model = workspace.model(MAIN, name, "2d")
    logged = curves(model / "fold_0" / FINAL)
    assert {"train_sup"} == {k for k in logged if k.startswith("train_")} - {"train_losses"}
    assert ONE_MODALITY in log_of(model / "fold_0")
    assert len(list(predict(model, test_images, tmp_path / "out").glob("*.nii.gz"))) == 2
    with pytest.raises(ValueError, match="--modality CT: this model knows MR"):
        set_modality(Predictor(model, (0,)).nnunet, "CT")


def test_cascade(workspace: Workspace, main_dataset: str, test_images: Path, tmp_path: Path) -> None:
    """The second stage sees what the first one has segmented. Phase 1 makes no such masks, and says so."""
    name, cascade = f"M4oETrainer_{SMALL}", "3d_cascade_fullres"
    train(main_dataset, name, "3d_lowres", "all")
    train(main_dataset, name, cascade)
    weights = read_safely(workspace.model(MAIN, name, cascade) / "fold_0" / FINAL)["network_weights"]
    assert weights["encoder.stem.convs.0.conv.weight"].shape[1] == 2, "image and previous mask"
    low = predict(workspace.model(MAIN, name, "3d_lowres"), test_images, tmp_path / "low", ("all",))
    model = workspace.model(MAIN, name, cascade)
    output = predict(model, test_images, tmp_path / "out", folder_with_segs_from_prev_stage=str(low))
    assert len(list(output.glob("*.nii.gz"))) == 2
    with pytest.raises(NotImplementedError, match="Train 3d_cascade_fullres without it: M4oETrainer_noMAE"):
        make_trainer(main_dataset, f"M4oEPretrainTrainer_{SIZE}", cascade).initialize()
