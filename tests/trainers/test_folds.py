"""Folds of one model share the settings in its plans.json, which prediction reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import make_trainer
from tiny_latent import FLAT
from tiny_prior import finish

from nnunet_diffext.settings import SettingsError

TEXT = "TextDiffSegTrainer"


@pytest.fixture(autouse=True)
def alone(nnunet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's folders of one test; its ``on_train_start``, which reads a dataset, does nothing."""
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)


def of_prompts(prompt: str, fold: int) -> Any:
    return make_trainer("randomText", FLAT, base=TEXT, fold=fold, diffext={"prompts": {"ball": prompt}})


def test_another_fold_with_other_prompts_is_refused() -> None:
    """Its tokens have another shape, so that the first fold could not be loaded with the new plans."""
    first = of_prompts("a ball", 0)
    first.initialize()
    plans = finish(first) / "plans.json"
    before = plans.read_bytes()
    with pytest.raises(SettingsError, match=r"holds fold_0, trained with other settings: prompts \(prompts was"):
        of_prompts("something quite different", 1).on_train_start()
    assert plans.read_bytes() == before
    of_prompts("a ball", 1).on_train_start()


def test_the_same_fold_may_be_trained_again() -> None:
    first = of_prompts("a ball", 0)
    first.initialize()
    finish(first)
    of_prompts("something quite different", 0).on_train_start()
