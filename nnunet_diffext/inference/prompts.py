"""Other prompts for a trained TextDiffSeg model, at prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffext.data.prompts import PromptError, with_changes
from nnunet_diffext.inference.model_folder import network_of
from nnunet_diffext.pretrained.text import VARIABLE, TextTokens, load_text_encoder
from nnunet_diffext.settings import PLANS_KEY

TRAINER = "TextDiffSegTrainer"
TOLERANCE = 1e-2
"""Between tokens of one text from one encoder, whose entries are around 0.5, on two machines."""


def change_prompts(nnunet: Any, changes: Mapping[str, str]) -> dict[str, str]:
    """Encode the new prompts and put them into the weights of every fold.

    Args:
        nnunet: nnU-Net's predictor, with its model loaded.
        changes: label -> text. Labels that are not named keep their prompts.
    Returns:
        all prompts.
    Raises:
        PromptError: no TextDiffSeg model, one that was trained without tokens, an unknown label or an empty text; or
            the text encoder is not the one of the training, whose tokens mean something else.
        PretrainedError: the text encoder cannot be loaded, or takes no text of this length.
    """
    settings = nnunet.plans_manager.plans.get(PLANS_KEY, {}).get(TRAINER)
    network = network_of(nnunet)
    if settings is None or not hasattr(network, "tokens"):
        raise PromptError(f"--prompt: this model takes no text; {TRAINER} trains one that does.")
    if settings["text"] != "tokens":
        raise PromptError(
            f"--prompt: this model was trained with text '{settings['text']}', so prompts mean nothing to it."
        )
    prompts = with_changes(settings["prompts"], changes)
    rows = [list(prompts).index(label) for label in changes]
    encoder = load_text_encoder(settings["text_encoder"])
    encoded = encoder.encode({label: prompts[label] for label in changes})
    trained = encoder.encode({label: settings["prompts"][label] for label in changes})
    for weights in nnunet.list_of_parameters:
        if not _are_there(weights["tokens"], weights["token_mask"], rows, trained):
            raise PromptError(
                f"--prompt: the text encoder {encoder.source} does not give the tokens that this model was trained "
                f"with. Set {VARIABLE} to the encoder of the training. (If that is the one: dataset.json was changed "
                "between the folds; predict with the last one that was trained, -f.)"
            )
    for weights in nnunet.list_of_parameters:
        weights["tokens"], weights["token_mask"] = replaced(weights["tokens"], weights["token_mask"], rows, encoded)
    tokens, mask = replaced(network.tokens, network.token_mask, rows, encoded)
    network.tokens, network.token_mask = nn.Buffer(tokens), nn.Buffer(mask)
    return prompts


def replaced(tokens: Tensor, mask: Tensor, rows: list[int], new: TextTokens) -> tuple[Tensor, Tensor]:
    """Some rows of ``tokens`` ``(N, L, D)`` and ``mask`` ``(N, L)`` replaced, all padded to the longest text."""
    length = max(tokens.shape[1], new.states.shape[1])
    out = tokens.new_zeros(tokens.shape[0], length, tokens.shape[2])
    known = torch.zeros(mask.shape[0], length, dtype=torch.bool, device=mask.device)
    out[:, : tokens.shape[1]], known[:, : mask.shape[1]] = tokens, mask
    for i, row in enumerate(rows):
        out[row], known[row] = 0, False
        out[row, : new.states.shape[1]] = new.states[i].to(out)
        known[row, : new.mask.shape[1]] = new.mask[i].to(known)
    return out, known


def _are_there(tokens: Tensor, mask: Tensor, rows: list[int], texts: TextTokens) -> bool:
    """Whether some rows of ``tokens`` ``(N, L, D)`` and ``mask`` ``(N, L)`` are these texts."""
    for i, row in enumerate(rows):
        here, there = tokens[row][mask[row]].cpu(), texts.states[i][texts.mask[i]]
        if here.shape != there.shape or not torch.allclose(here, there, rtol=0, atol=TOLERANCE):
            return False
    return True
