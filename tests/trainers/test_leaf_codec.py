"""What LEAF builds on: a mask autoencoder trained before or a pretrained one, checked before time is lost."""

from __future__ import annotations

import json
import shutil
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import DATASET, Kind, make_plans, make_trainer, parameters_of
from tiny_latent import FLAT, SMALL, batch_of, changed, leaf, offline, save_codec, use_autoencoder
from tiny_prior import finish, save_prior

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.pretrained import PretrainedError
from nnunet_diffext.stages import FINAL, StageError

CODEC = "nnUNet_diffext_codec"


@pytest.fixture(autouse=True)
def alone(nnunet_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's folders of one test, and nothing pretrained anywhere."""
    offline(monkeypatch, tmp_path)


# ------------------------------------------------------------------ the codec
def test_weights_of_the_codec_are_in_the_network() -> None:
    model = save_codec()
    wanted = read_safely(model / "fold_0" / FINAL)["network_weights"]
    for tokens, starts in (("noAlign", True), ("noAlign_scratchEncoder", False)):
        torch.manual_seed(9)
        trainer = leaf(tokens, codec=False)
        assert all(torch.equal(v, wanted[k]) for k, v in trainer.network.codec.state_dict().items())
        name = "encoder.stages.1.0.convs.0.conv.weight"
        assert torch.equal(trainer.network.state_dict()[name], wanted[name]) == starts


def test_no_codec() -> None:
    command = f"nnUNetv2_train {DATASET} 2d 0 -tr MaskAutoencoderTrainer -p nnUNetPlans"
    with pytest.raises(StageError, match=f"No codec for fold 0 in .*{DATASET}. Train it first:\n  {command}"):
        leaf("noAlign", codec=False)


def test_codec_of_other_labels() -> None:
    save_codec(labels={"background": 0, "a": 1, "b": 2})
    with pytest.raises(StageError, match="trained with other labels: .*'b': 2.*Train it again"):
        leaf("noAlign", codec=False)


def test_something_else_as_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CODEC, str(finish(leaf("noAlign"))))
    with pytest.raises(StageError, match="trained by LEAFTrainer itself, which cannot be its own codec"):
        leaf("noAlign", codec=False)


def test_codec_by_variable_and_of_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings travel along in the plans; the checkpoint brings its weights."""
    model = save_codec("stride1_channels3")
    monkeypatch.setenv(CODEC, str(model))
    trainer = leaf("noAlign", codec=False)
    assert trainer.network.codec.channels == 3 and trainer.network.codec.stride == (1, 1)
    own = finish(trainer)
    blocks = json.loads((own / "plans.json").read_text())["diffext"]
    assert blocks["LEAFTrainer"]["codec_trainer"] == "MaskAutoencoderTrainer_stride1_channels3"
    assert blocks["MaskAutoencoderTrainer"]["channels"] == 3
    shutil.rmtree(model)
    monkeypatch.delenv(CODEC)
    resumed = make_trainer("noAlign", FLAT, base="LEAFTrainer")
    resumed.load_checkpoint(str(own / "fold_0" / FINAL))
    assert changed(parameters_of(trainer.network), resumed.network) == set() and resumed.stage is None


def test_codec_of_another_architecture() -> None:
    save_codec(kind=Kind(FLAT.patch, FLAT.strides, features=(8, 8, 8)))
    with pytest.raises(StageError, match="do not fit the network that MaskAutoencoderTrainer builds from these plans"):
        leaf("noAlign", codec=False)


def test_stock_network_as_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CODEC, str(save_prior(kind=FLAT)[0]))
    message = "trained by nnUNetTrainer, which is no autoencoder of masks. Train one with -tr MaskAutoencoderTrainer"
    with pytest.raises(StageError, match=message):
        leaf("noAlign", codec=False)


# ------------------------------------------------------------------ preflight (METHODS 3.5-4)
def start(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of a training, with random labels."""
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    trainer.dataloader_train = repeat(batch_of(trainer))
    trainer.on_train_start()


def test_preflight_stops_before_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = leaf("noAlign")
    with pytest.raises(StageError) as caught:
        start(trainer, monkeypatch)
    message = str(caught.value)
    for part in ("too much of ball (Dice 0.", "stride 2x2 and 4 channels", "MaskAutoencoderTrainer_stride1_channels8"):
        assert part in message
    assert "nnUNet_diffext_codec" in message and "token preflight0p8" in message


def test_preflight_can_be_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = leaf("noAlign_preflight0")
    trainer.network.codec.encoder.to_latent.weight.data.zero_()
    start(trainer, monkeypatch)
    wanted = read_safely(Path(trainer.stage.folder) / "fold_0" / FINAL)["network_weights"]["encoder.to_latent.weight"]
    assert torch.equal(trainer.network.codec.encoder.to_latent.weight, wanted), "-pretrained_weights went over it"
    assert torch.equal(trainer.teacher.codec.encoder.to_latent.weight, wanted)


def test_preflight_of_a_good_codec_and_of_a_continued_training(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = leaf("noAlign")
    trainer.current_epoch = 1
    start(trainer, monkeypatch)
    trainer = leaf("noAlign")
    monkeypatch.setattr(type(trainer.network.codec), "decode", lambda self, z: z)
    monkeypatch.setattr(type(trainer.network.codec), "encode", lambda self, onehot: 10 * onehot)
    start(trainer, monkeypatch)


def test_what_would_fix_a_pretrained_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be trained longer."""
    use_autoencoder(monkeypatch, tmp_path / "kl")
    trainer = leaf("kl8_noAlign", codec=False)
    with pytest.raises(StageError, match=r"leave the token 'kl8' out. .*MaskAutoencoderTrainer_stride1_channels4\b"):
        start(trainer, monkeypatch)


# ------------------------------------------------------------------ a pretrained autoencoder as codec
KL = "kl8_noAlign_preflight0_ema0p9"


@pytest.fixture
def kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a tiny autoencoder."""
    use_autoencoder(monkeypatch, tmp_path / "kl")
    return tmp_path / "kl"


def test_kl8_trains_and_predicts_without_the_folder(kl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = leaf(KL, codec=False)
    assert trainer.stage is None and not trainer.network.codec.scale.updates
    before = parameters_of(trainer.network)
    trainer.network.codec.scale.update(1e3 * torch.randn(2, 2, 8, 12))  # -pretrained_weights, on other masks
    start(trainer, monkeypatch)
    scale = trainer.network.codec.scale
    assert int(scale.updates) == 10 and torch.equal(trainer.teacher.codec.scale.mean, scale.mean)
    z = trainer.network.encode_masks(trainer.label_space.encode(batch_of(trainer)["target"])[0])
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-2
    report = trainer.train_step(batch_of(trainer))
    assert torch.isfinite(torch.tensor(float(report["loss"])))
    assert {n.split(".")[0] for n in changed(before, trainer.network)} == {"encoder", "unet"}

    model = finish(trainer)
    plans = json.loads((model / "plans.json").read_text())
    assert plans["diffext"]["LEAFTrainer"]["codec_config"]["latent_channels"] == 2
    shutil.rmtree(kl)
    monkeypatch.delenv(CODEC)
    resumed = make_trainer(KL, FLAT, base="LEAFTrainer")
    resumed.load_checkpoint(str(model / "fold_0" / FINAL))
    assert changed(parameters_of(trainer.network), resumed.network) == set()
    with torch.no_grad(), trainer.averaged_weights():
        wanted = trainer.network.eval()(batch_of(trainer)["data"])
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), FINAL)
    with torch.no_grad():
        predictor.network.load_state_dict(predictor.list_of_parameters[0], strict=True)
        torch.testing.assert_close(predictor.network.eval()(batch_of(trainer)["data"]), wanted)


def test_kl8_starts_from_the_pretrained_encoder(kl: Path) -> None:
    net = leaf(KL, codec=False).network
    theirs = net.codec.autoencoder.encoder.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in net.encoder.encoder.state_dict().items())
    assert all(p.requires_grad for p in net.encoder.parameters())


NINE = {"background": 0, **{f"organ{i}": i for i in range(1, 9)}}
DEEPER = Kind((16, 24), ((1, 1), (4, 4), (2, 2)), features=(4, 8, 8))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SMALL, {}, "'kl8': the autoencoder is for 2D images. Use the 2d configuration"),
        (FLAT, {"channels": 4}, "the pretrained image encoder sees 3 channels, this dataset has 4"),
        (FLAT, {"labels": NINE}, "Colours tell 8 classes apart, this dataset has 9"),
        (DEEPER, {}, r"has stride 2, but no stage .* of this plan has: their strides are \[\(1, 1\), \(4, 4\)"),
    ],
)
def test_kl8_does_not_fit(kind: Kind, options: dict[str, Any], message: str, kl: Path) -> None:
    with pytest.raises(ValueError, match=message):
        leaf(KL, kind, codec=False, **options)


@pytest.mark.parametrize(
    ("scheme", "black_and_white"),
    [("ZScoreNormalization", (-3, 3)), ("CTNormalization", (-3, 3)), ("RGBTo01Normalization", (0, 1))],
)
def test_kl8_sees_the_range_that_nnunet_normalised_to(scheme: str, black_and_white: tuple, kl: Path) -> None:
    plans = make_plans(FLAT)
    plans["configurations"]["2d"]["normalization_schemes"] = [scheme]
    encoder = leaf(KL, codec=False, plans=plans).network.encoder
    seen: list[torch.Tensor] = []
    encoder.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for value, wanted in zip((*black_and_white, sum(black_and_white) / 2), (-1, 1, 0), strict=True):
        encoder(torch.full((1, 1, *FLAT.patch), float(value)))
        torch.testing.assert_close(seen[-1], torch.full((1, 3, *FLAT.patch), float(wanted)))


def test_kl8_with_images_of_unknown_range(kl: Path) -> None:
    plans = make_plans(FLAT)
    plans["configurations"]["2d"]["normalization_schemes"] = ["NoNormalization"]
    with pytest.raises(ValueError, match=r"all z-scores or all in \[0, 1\], not NoNormalization. Change the names"):
        leaf(KL, codec=False, plans=plans)


def test_kl8_without_weights() -> None:
    with pytest.raises(PretrainedError, match="stabilityai/sd-vae-ft-mse cannot be loaded"):
        leaf(KL, codec=False)
