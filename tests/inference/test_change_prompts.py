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
    weights = [{k: v + fold if k == "tokens" else v for k, v in network.state_dict().items()} for fold in (0, 1)]
    manager = SimpleNamespace(plans={"diffext": {"TextDiffSegTrainer": settings}})
    return SimpleNamespace(plans_manager=manager, network=network, list_of_parameters=weights)


def encode(length: int, width: int = 2) -> Any:
    def encoder(texts: dict[str, str], source: str | None) -> TextTokens:
        states = torch.full((len(texts), length, width), -1.0)
        return TextTokens(states, torch.ones(len(texts), length, dtype=torch.bool))

    return encoder


@pytest.mark.parametrize("length", [2, 5])
def test_the_tokens_of_one_label_change_in_every_fold(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(prompts, "encode_texts", encode(length))
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
    monkeypatch.setattr(prompts, "encode_texts", encode(2, width=7))
    refused(predictor(), {"kidney": "a kidney"}, "no label 'kidney'")
    refused(predictor("random"), {"liver": "x"}, "trained with text 'random'")
    refused(predictor(network=nn.Linear(1, 1).requires_grad_(False)), {"liver": "x"}, "takes no text")
    refused(predictor(), {"liver": "x"}, "width 7, the model was trained with 2")


def test_padding_never_counts() -> None:
    """A shorter text than before leaves no token of the old one behind."""
    tokens, mask = torch.ones(1, 4, 2), torch.ones(1, 4, dtype=torch.bool)
    new = TextTokens(torch.full((1, 2, 2), 5.0), torch.tensor([[True, False]]))
    out, known = replaced(tokens, mask, [0], new)
    assert known.tolist() == [[True, False, False, False]]
    assert isinstance(out, Tensor) and not out[0, 2:].any()
