"""TextDiffSeg's trainer: every variant takes a step, texts are read once, the label encoder is watched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import Kind, make_dataset_json, make_trainer
from tiny_latent import FLAT, SMALL, batch_of, offline, save_codec, use_bert
from tiny_prior import finish
from torch import Tensor

from nnunet_diffext.data.prompts import PromptError
from nnunet_diffext.inference.reconstruction import label_share
from nnunet_diffext.pretrained import PretrainedError
from nnunet_diffext.pretrained.text import TextTokens, mean_token
from nnunet_diffext.settings import SettingsError
from nnunet_diffext.stages import FINAL, StageError
from nnunet_diffext.trainers import find_trainer

ORGANS = {"background": 0, "liver": 1, "kidney": 2}


@pytest.fixture(autouse=True)
def alone(nnunet_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's folders of one test, and nothing pretrained anywhere."""
    offline(monkeypatch, tmp_path)


@pytest.fixture
def bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The text encoder."""
    return use_bert(monkeypatch, tmp_path / "bert")


def text(tokens: str = "randomText", kind: str | Kind = FLAT, **options: Any) -> Any:
    """A trainer in training mode."""
    trainer = make_trainer(tokens, kind, base="TextDiffSegTrainer", **options)
    trainer.initialize()
    trainer.network.train()
    return trainer


def plans_with(**prompts: str) -> dict[str, Any]:
    return {**make_dataset_json(ORGANS), "diffext": {"prompts": prompts}}


# ------------------------------------------------------------------ one step of every variant
TOKENS = (
    "",
    "zeta1",
    "zeta2",
    "zeta3",
    "twoStage",
    "v",
    "eps",
    "paper",
    "throughEncoder",
    "TOnly",
    "ddpm",
    "dpmpp_2samples",
)


@pytest.mark.parametrize("tokens", TOKENS)
def test_one_step_reaches_every_parameter(tokens: str) -> None:
    if tokens == "twoStage":
        save_codec()
    trainer = text(f"randomText_3steps_{tokens}" if tokens else "randomText")
    report = trainer.train_step(batch_of(trainer))
    assert report.keys() == {"loss", "sup", "diffusion"} | (set() if tokens in ("twoStage", "paper") else {"anchor"})
    assert all(np.isfinite(v) for v in report.values()) and trainer.bad_steps == 0
    missing = [n for n, p in trainer.network.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == [], "DDP refuses these"
    with torch.no_grad():
        out = trainer.network.eval()(batch_of(trainer)["data"])
    assert torch.isfinite(out).all() and out.abs().max() < 800


@pytest.mark.parametrize("labels", [{"background": 0, "a": [1, 2], "b": 2, "ignore": 3}, {**ORGANS, "ignore": 3}])
def test_nothing_is_learned_where_nobody_looked(labels: dict[str, Any]) -> None:
    trainer = text(labels=labels, kind=SMALL)
    batch = batch_of(trainer)
    assert float(trainer.train_step(batch)["loss"]) > 0
    if trainer.label_space.regions:
        batch["target"][:, -1] = True
    else:
        batch["target"][:] = 3
    assert {float(v) for v in trainer.train_step(batch).values()} == {0.0}


def test_weights_of_the_losses() -> None:
    """Eq. 4 and 6: gamma is Dice's, lambda the diffusion's."""
    report = text("randomText_lambda3_anchor0p5").train_step(batch_of(text()))
    wanted = report["sup"] + 3 * report["diffusion"] + 0.5 * report["anchor"]
    assert float(report["loss"]) == pytest.approx(float(wanted), rel=1e-5)
    losses = []
    for gamma in (0, 1, 2):
        torch.manual_seed(0)
        trainer = text(f"randomText_gamma{gamma}")
        torch.manual_seed(1)
        losses.append(trainer.compute_losses(batch_of(trainer))["sup"].item())
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4) and losses[1] > losses[0]


def test_estimates_that_say_nothing_teach_nothing() -> None:
    """METHODS 3.1.3: eq. 4 of predicted noise is weighted by ``min(1, abar_t / 0.01)``, sample by sample."""
    report = text("randomText_eps_TOnly").train_step(batch_of(text()))
    assert 0 < report["sup"] < 1e-4 < 0.1 < report["anchor"]
    trainer = text("randomText_eps")
    clean, valid = trainer.label_space.encode(batch_of(trainer)["target"])
    logits = torch.randn(clean.shape, requires_grad=True)
    gradients = []
    for trust in ((1.0, 1.0), (1.0, 0.01)):
        loss = trainer.estimate_loss(logits, clean, valid, torch.tensor(trust).view(2, 1, 1, 1))
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert gradients[0].abs().amax((1, 2, 3)).min() > 0
    torch.testing.assert_close(gradients[1][0], gradients[0][0])
    torch.testing.assert_close(gradients[1][1], 0.01 * gradients[0][1])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [("T5_10steps", "steps=10 is more than"), ("twoStage_zeta3", "'twoStage' trains no label encoder")],
)
def test_contradictory_settings(tokens: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        find_trainer(f"TextDiffSegTrainer_{tokens}")
    with pytest.raises(SettingsError, match="use the token 'eps', which sets both"):
        find_trainer("TextDiffSegTrainer").Settings(kind="eps")


def test_label_encoder_that_nothing_would_train() -> None:
    with pytest.raises(SettingsError, match="would train the label encoder"):
        find_trainer("TextDiffSegTrainer_anchor0")
    for tokens in ("anchor0_throughEncoder_noRecycle", "anchor0_zeta3", "anchor0_twoStage"):
        find_trainer(f"TextDiffSegTrainer_{tokens}")


def test_two_stages() -> None:
    with pytest.raises(StageError, match="No codec for fold 0"):
        text("randomText_twoStage")
    save_codec()
    trainer = text("randomText_twoStage_lr1")
    before = {k: v.clone() for k, v in trainer.network.codec.state_dict().items()}
    trainer.train_step(batch_of(trainer))
    assert all(torch.equal(v, before[k]) for k, v in trainer.network.codec.state_dict().items())
    assert trainer.codec_is_frozen and not text().codec_is_frozen


# ------------------------------------------------------------------ texts
def test_prompts_are_encoded_and_recorded(bert: torch.nn.Module) -> None:
    trainer = text("", labels=ORGANS)
    block = trainer.plans_manager.plans["diffext"]["TextDiffSegTrainer"]
    assert block["prompts"] == {"liver": "MR0 image of the liver", "kidney": "MR0 image of the kidney"}
    assert block["text_shape"] == [2, 7, 16] == list(trainer.network.tokens.shape)
    with torch.no_grad():
        # [CLS] [UNK] image of the liver [SEP]
        wanted = bert(input_ids=torch.tensor([[2, 1, 7, 8, 9, 5, 3]])).last_hidden_state[0]
    torch.testing.assert_close(trainer.network.tokens[0], wanted)
    assert not torch.equal(trainer.network.tokens[0], trainer.network.tokens[1])
    assert trainer.network.token_mask.all()
    trainer.train_step(batch_of(trainer))
    torch.testing.assert_close(trainer.network.tokens[0], wanted)


def test_single_vector(bert: torch.nn.Module) -> None:
    """Eq. 1 and 2 at their word: one key, whose weight is 1 everywhere."""
    full, trainer = text("", labels=ORGANS), text("singleVector", labels=ORGANS)
    net = trainer.network
    assert net.tokens.shape == (1, 1, 16)
    torch.testing.assert_close(net.tokens[0, 0], full.network.tokens.flatten(0, 1).mean(0))
    features = net.image_features(batch_of(trainer)["data"])
    weights = net.text.weights(features, net.tokens.expand(2, -1, -1), net.token_mask.expand(2, -1))
    assert torch.equal(weights, torch.ones_like(weights))
    assert np.isfinite(trainer.train_step(batch_of(trainer))["loss"])


def test_random_text_is_the_same_every_time_and_needs_no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    a, b, other = (text(f"randomText_{t}", labels=ORGANS).network.tokens for t in ("noise0", "noise0_lr1e-4", "noise1"))
    assert a.shape == (2, 8, 768) and torch.equal(a, b) and not torch.equal(a, other)
    assert float(a.std()) == pytest.approx(0.5, rel=0.05)


def test_pretrained_weights_bring_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of -pretrained_weights hold the prompts of another dataset."""
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    trainer = text("randomText", labels=ORGANS)
    wanted = trainer.network.tokens.clone()
    trainer.network.tokens.zero_()
    trainer.network.token_mask.zero_()
    trainer.on_train_start()
    for network in (trainer.network, trainer.teacher):
        assert torch.equal(network.tokens, wanted) and network.token_mask.all()


def test_mean_token_ignores_padding() -> None:
    states = torch.tensor([[[1.0], [3.0], [99.0]], [[5.0], [99.0], [99.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert mean_token(TextTokens(states, mask)).states.tolist() == [[[3.0]]]


def refused(error: type[Exception], message: str, dataset: dict[str, Any]) -> None:
    """Before anything is built."""
    trainer = make_trainer("", FLAT, base="TextDiffSegTrainer", labels=ORGANS)
    trainer.dataset_json = dataset
    with pytest.raises(error, match=message):
        trainer.initialize()
    assert trainer.network is None


def test_wrong_prompts_surface_before_work_starts(bert: torch.nn.Module) -> None:
    refused(PretrainedError, "label 'liver' has 14 tokens, .* at most 12", plans_with(liver="liver " * 12, kidney="ct"))
    refused(PromptError, "no label 'spleen'", plans_with(liver="ct", kidney="ct", spleen="ct"))
    refused(PromptError, "no prompt for kidney", plans_with(liver="ct"))


def test_no_text_encoder() -> None:
    refused(PretrainedError, "three ways out: .*nnUNet_diffext_text_encoder.* randomText", make_dataset_json(ORGANS))


# ------------------------------------------------------------------ the checkpoint is enough
def test_predicts_and_resumes_without_transformers(bert: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = text("2steps_noEMA", labels=ORGANS)
    trainer.train_step(batch_of(trainer))
    model, image = finish(trainer), batch_of(trainer)["data"]
    with torch.no_grad():
        wanted = trainer.network.eval()(image)
    monkeypatch.delenv("nnUNet_diffext_text_encoder")
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), FINAL)
    with torch.no_grad():
        predictor.network.load_state_dict(predictor.list_of_parameters[0], strict=True)
        torch.testing.assert_close(predictor.network.eval()(image), wanted)

    resumed = make_trainer("2steps_noEMA", FLAT, base="TextDiffSegTrainer", labels=ORGANS)
    resumed.dataset_json = plans_with(liver="another text", kidney="that cannot be encoded now")
    resumed.load_checkpoint(str(model / "fold_0" / FINAL))
    assert torch.equal(resumed.network.tokens, trainer.network.tokens)
    assert resumed.settings.prompts == trainer.settings.prompts == {
        "liver": "MR0 image of the liver", "kidney": "MR0 image of the kidney"
    }  # fmt: skip
    assert np.isfinite(resumed.train_step(batch_of(resumed))["loss"])
    assert json.loads((model / "plans.json").read_text())["diffext"]["TextDiffSegTrainer"]["text_shape"] == [2, 7, 16]


# ------------------------------------------------------------------ has the label encoder collapsed?
def latents(share: float) -> Tensor:
    """A pattern that all cases have in common, and one that is each case's own."""
    generator = torch.Generator().manual_seed(0)
    common, own = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(64, 4, 8, 8, generator=generator)
    return (1 - share) ** 0.5 * common + share**0.5 * own


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_the_label(share: float) -> None:
    """0 if the latents do not depend on the label: then the noise is trivially predicted, and nothing is segmented."""
    assert label_share(latents(share)) == pytest.approx(share, abs=0.05 * (share > 0) + 1e-6)
    assert label_share(7 * latents(share) + 3) == pytest.approx(label_share(latents(share)), abs=1e-5)
    assert np.isnan(label_share(latents(1.0)[:1]))


def test_monitors_are_logged() -> None:
    trainer = text(labels=ORGANS)
    for epoch in range(2):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        outputs = [trainer.train_step(batch_of(trainer, step)) for step in range(2)]
        counted = trainer._reconstruction.counts[1].clone()
        trainer.on_train_epoch_end(outputs)
        assert (counted > 100).all() and trainer._reconstruction is None, "every epoch is counted anew"
    shares = trainer.logger.local_logger.my_fantastic_logging["label_variance_share"]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)
    (log,) = Path(trainer.output_folder).glob("training_log*")
    said = [line for line in log.read_text().splitlines() if "Labels reconstructed: " in line]
    assert len(said) == 2 and "liver 0." in said[0] and "kidney 0." in said[0]


def test_collapsed_encoder_is_noticed() -> None:
    trainer = text()
    trainer.network.codec.encoder.to_latent.weight.data.zero_()
    trainer.network.codec.encoder.to_latent.bias.data.copy_(torch.arange(4.0))
    trainer.on_train_epoch_start()
    trainer.compute_losses(batch_of(trainer))
    assert label_share(trainer._latents) == 0
