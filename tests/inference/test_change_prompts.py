"""Another prompt at prediction: which weights change, for which label, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnunet_diffext.data.prompts import PromptError
from nnunet_diffext.inference import prompts
from nnunet_diffext.inference.prompts import change_prompts, replaced
from nnunet_diffext.pretrained.text import TextTokens

OLD = {"liver": "old liver", "lesion": "old lesion"}


class Reader(nn.Module):
    """Has tokens, as TextDiffSeg's network."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.arange(12.0).view(2, 3, 2))
        self.register_buffer("token_mask", torch.tensor([[True, True, True], [True, True, False]]))


def predictor(text: str = "tokens", network: nn.Module | None = None) -> Any:
    network = network or Reader()
    settings = {"text": text, "prompts": dict(OLD), "text_encoder": None}
    weights = [{k: v.clone() for k, v in network.state_dict().items()} for _ in (0, 1)]
    if "tokens" in weights[1]:
        weights[1]["tokens"][0] += 1  # folds need not agree in labels whose prompts stay
    manager = SimpleNamespace(plans={"diffext": {"TextDiffSegTrainer": settings}})
    return SimpleNamespace(plans_manager=manager, network=network, list_of_parameters=weights)


class Encoder:
    """Knows the tokens that lesion was trained with; gives ``length`` tokens of -1 for any other text."""

    source = "some encoder"

    def __init__(self, length: int, shift: float = 0.0, width: int = 2) -> None:
        self.length, self.shift, self.width = length, shift, width

    def encode(self, texts: dict[str, str]) -> TextTokens:
        if texts == {"lesion": OLD["lesion"]} and self.width == 2:
            states = Reader().tokens[1:, :2] + self.shift
        else:
            states = torch.full((len(texts), self.length, self.width), -1.0)
        return TextTokens(states, torch.ones(states.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize("length", [2, 5])
def test_the_tokens_of_one_label_change_in_every_fold(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(prompts, "load_text_encoder", lambda source: Encoder(length))
    p = predictor()
    before = [w["tokens"].clone() for w in p.list_of_parameters]
    assert change_prompts(p, {"lesion": "a dark spot"}) == {"liver": "old liver", "lesion": "a dark spot"}
    for old, weights in zip(before, p.list_of_parameters, strict=True):
        new, mask = weights["tokens"], weights["token_mask"]
        assert torch.equal(new[0, :3], old[0]) and mask[0].tolist() == [True] * 3 + [False] * (len(mask[0]) - 3)
        assert (new[1, :length] == -1).all() and mask[1].sum() == length and not new[1, length:].any()
        p.network.load_state_dict(weights)  # the network takes the longer text as well


def refused(p: Any, changes: dict[str, str], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        change_prompts(p, changes)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "load_text_encoder", lambda source: Encoder(2))
    refused(predictor(), {"kidney": "a kidney"}, "no label 'kidney'")
    refused(predictor("random"), {"lesion": "x"}, "trained with text 'random'")
    refused(predictor(network=nn.Linear(1, 1).requires_grad_(False)), {"lesion": "x"}, "takes no text")


@pytest.mark.parametrize("other", [Encoder(2, shift=0.5), Encoder(2, width=7)])
def test_another_encoder_than_that_of_the_training(monkeypatch: pytest.MonkeyPatch, other: Encoder) -> None:
    """Also one whose tokens have the same width: the model would see a text that means nothing to it."""
    monkeypatch.setattr(prompts, "load_text_encoder", lambda source: other)
    p = predictor()
    before = p.list_of_parameters[0]["tokens"].clone()
    refused(p, {"lesion": "x"}, "some encoder does not give the tokens .* Set nnUNet_diffext_text_encoder to")
    assert torch.equal(p.list_of_parameters[0]["tokens"], before)


def test_padding_never_counts() -> None:
    """A shorter text than before leaves no token of the old one behind."""
    tokens, mask = torch.ones(1, 4, 2), torch.ones(1, 4, dtype=torch.bool)
    new = TextTokens(torch.full((1, 2, 2), 5.0), torch.tensor([[True, False]]))
    out, known = replaced(tokens, mask, [0], new)
    assert known.tolist() == [[True, False, False, False]]
    assert isinstance(out, Tensor) and not out[0, 2:].any()
