"""The latent methods on two ranks, and as the second stage of a cascade."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from ranks import Results, check_ranks_agree, train_on_two_ranks
from workspace import MAIN, Workspace, curves, log_of, make_trainer, predict, train

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.networks.swin_teacher import SwinTeacher
from nnunet_diffext.stages import FINAL

sys.path.insert(0, str(Path(__file__).parents[1] / "pretrained"))
from tiny_models import make_vit, save_vit_folder  # noqa: E402

pytestmark = pytest.mark.slow

VARIABLES = ("nnUNet_diffext_codec", "nnUNet_diffext_teacher")
CODEC = "MaskAutoencoderTrainer_1epochs_2iters_1valiters_stride2"
LOW = "nnUNetTrainer_1epochs_1iters_1valiters"
BUDGET = "2epochs_2iters_1valiters_preflight0"
FULL = (
    f"LEAFTrainer_alignUntil0p5_{BUDGET}",
    f"TextDiffSegTrainer_randomText_2steps_stride2_{BUDGET}",
    "MaskAutoencoderTrainer_2epochs_2iters_1valiters_stride2",
)
STEPS = (
    *(f"LEAFTrainer_{token}_2iters_seed3" for token in ("convProjector", "eps_noAlign", "paper_noAlign")),
    *(
        f"TextDiffSegTrainer_randomText_{token}_2iters_seed3"
        for token in ("zeta1", "zeta2", "zeta3", "twoStage", "paper_stride2", "throughEncoder_anchor0_noRecycle", "v")
    ),
)


@pytest.fixture(scope="module")
def results(workspace: Workspace, main_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What both ranks report."""
    folder = tmp_path_factory.mktemp("ddp")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in workspace.environment.items():
            patch.setenv(name, value)
        train(main_dataset, CODEC)
    codec, vit = workspace.model(MAIN, CODEC), save_vit_folder(folder / "vit", make_vit().state_dict())
    environment = {**workspace.environment, VARIABLES[0]: str(codec), VARIABLES[1]: str(vit)}
    return train_on_two_ranks(folder, MAIN, [FULL[0], *STEPS, *FULL[1:]], environment)


@pytest.mark.parametrize("name", [*FULL, *STEPS])
def test_ranks_agree(results: Results, name: str) -> None:
    one, other = (rank[name] for rank in results)
    check_ranks_agree(one, other)
    assert (one["state"]["projector"] is not None) == (name.startswith("LEAF") and "noAlign" not in name)


def test_alignment_stops_on_both(results: Results) -> None:
    for rank in results:
        assert ["align" in step for step in rank[FULL[0]]["losses"]] == [True, True, False, False]


@pytest.mark.parametrize("name", FULL)
def test_rank_0_leaves_a_complete_model(results: Results, name: str, workspace: Workspace) -> None:
    fold = workspace.model(MAIN, name) / "fold_0"
    logged = curves(fold / "checkpoint_final.pth")
    assert len(logged.pop("train_align", [0.0])) == 1, "it stops after the first of two epochs"
    assert {len(v) for v in logged.values()} == {2}
    assert any((fold / "validation").iterdir()) and "non-finite" not in log_of(fold)


# ------------------------------------------------------------------ a cascade
def test_second_stage_of_a_cascade(
    workspace: Workspace, main_dataset: str, test_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks of the stage before are input channels of the image encoder; the codec, which sees labels, has none."""
    cascade = "3d_cascade_fullres"
    train(main_dataset, LOW, "3d_lowres", "all")
    low = predict(workspace.model(MAIN, LOW, "3d_lowres"), test_images, tmp_path / "low", ("all",))
    train(main_dataset, CODEC, cascade)
    monkeypatch.setenv(VARIABLES[0], str(workspace.model(MAIN, CODEC, cascade)))
    monkeypatch.setenv(VARIABLES[1], str(save_vit_folder(tmp_path / "vit", make_vit().state_dict())))
    for name in (
        "LEAFTrainer_1epochs_1iters_1valiters_preflight0",
        "TextDiffSegTrainer_randomText_2steps_stride2_1epochs_1iters_1valiters",
    ):
        earlier = (workspace.model(MAIN, trainer, "3d_lowres") / "predicted_next_stage" for trainer in (LOW, name))
        shutil.copytree(*earlier)  # as if this trainer had been trained on low resolution, too
        train(main_dataset, name, cascade)
        model = workspace.model(MAIN, name, cascade)
        weights = read_safely(model / "fold_0" / FINAL)["network_weights"]
        assert weights["encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 2, "image and previous mask"
        assert weights["codec.encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 2, "background and ball"
        output = predict(model, test_images, tmp_path / name, folder_with_segs_from_prev_stage=str(low))
        assert len(list(output.glob("*.nii.gz"))) == 2 and "non-finite" not in log_of(model / "fold_0")


def test_own_teacher_in_a_cascade(workspace: Workspace, main_dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masked autoencoder knows no masks: it is that of the images alone, in the configuration they come from."""
    cascade, teacher = "3d_cascade_fullres", "M4oEPretrainTrainer_dim8_window3_1epochs_1iters_1valiters"
    train(main_dataset, teacher, "3d_fullres")
    train(main_dataset, CODEC, cascade)
    monkeypatch.setenv(VARIABLES[0], str(workspace.model(MAIN, CODEC, cascade)))
    monkeypatch.setenv(VARIABLES[1], str(workspace.model(MAIN, teacher)))
    made = make_trainer(main_dataset, "LEAFTrainer_ownTeacher_preflight0", cascade)
    made.initialize()
    assert isinstance(made.vision, SwinTeacher) and made.num_input_channels == 2
