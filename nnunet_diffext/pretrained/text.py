"""Frozen text encoders of transformers: one state per token of a prompt (TextDiffSeg, eq. 1 and 2)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_diffext.pretrained import PretrainedError, reason

VARIABLE = "nnUNet_diffext_text_encoder"
DEFAULT_ENCODER = "emilyalsentzer/Bio_ClinicalBERT"
"""BioBERT trained further on the notes of MIMIC-III, which is what TextDiffSeg describes; MIT licence."""


class TextTokens(NamedTuple):
    """Encoded texts.

    Attributes:
        states: last hidden states, float32 ``(N, L, D)``, L the length of the longest text; zero at padding.
        mask: bool ``(N, L)``, True at the tokens of a text, False at padding.
    """

    states: Tensor
    mask: Tensor


def mean_token(text: TextTokens) -> TextTokens:
    """The mean of all tokens of all prompts, as the only token (eq. 1)."""
    share = text.mask.float() / text.mask.sum()
    return TextTokens((share[..., None] * text.states).sum((0, 1)).view(1, 1, -1), torch.ones(1, 1, dtype=torch.bool))


class TextEncoder:
    """A tokenizer and its model.

    Attributes:
        source: hub id or folder.
        limit: tokens that a text may have, the special ones included.
    """

    def __init__(self, source: str, tokenizer: Any, model: nn.Module) -> None:
        self.source = source
        self._tokenizer = tokenizer
        self._model = model.float().eval().requires_grad_(False)
        self.limit = _token_limit(tokenizer, model)

    def token_counts(self, texts: Mapping[str, str]) -> dict[str, int]:
        """Tokens per text, the special ones included; may exceed :attr:`limit`."""
        return {label: len(self._token_ids(text)) for label, text in texts.items()}

    @torch.no_grad()
    def encode(self, texts: Mapping[str, str]) -> TextTokens:
        """Encode every text alone, so that its states do not depend on the others, not even in the last bit.

        Args:
            texts: label -> text.
        Raises:
            PretrainedError: no text, an empty one, or one that is too long (none is ever truncated).
        """
        if not texts:
            raise PretrainedError("There is no text to encode: name at least one label with its prompt.")
        states = []
        for label, text in texts.items():
            if not text.strip():
                raise PretrainedError(f"The prompt of label '{label}' is empty. Write what the label shows.")
            ids = self._token_ids(text)
            if len(ids) > self.limit:
                raise PretrainedError(
                    f"The prompt of label '{label}' has {len(ids)} tokens, but the text encoder {self.source} takes at "
                    f"most {self.limit}. Shorten the prompt."
                )
            tokens = torch.tensor([ids])
            states.append(self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0])
        padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
        lengths = torch.tensor([len(s) for s in states])
        return TextTokens(padded, torch.arange(padded.shape[1]) < lengths[:, None])

    def _token_ids(self, text: str) -> list[int]:
        return self._tokenizer(text, truncation=False, verbose=False)["input_ids"]


def encode_texts(texts: Mapping[str, str], source: str | None = None) -> TextTokens:
    """Last hidden states of texts, see :func:`load_text_encoder` and :meth:`TextEncoder.encode`.

    Args:
        texts: label -> text.
        source: hub id or folder of the encoder.
    """
    return load_text_encoder(source).encode(texts)


def load_text_encoder(source: str | None = None) -> TextEncoder:
    """A frozen encoder such as BERT.

    Args:
        source: hub id or local folder; default: the variable ``nnUNet_diffext_text_encoder``, else Bio_ClinicalBERT.
    Raises:
        PretrainedError: transformers is not installed; the encoder cannot be loaded, or its files lack weights.
    """
    source = source or os.environ.get(VARIABLE) or DEFAULT_ENCODER
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise PretrainedError(
            f"Text prompts need transformers, which cannot be imported ({reason(error)}): "
            "pip install 'nnunet_diffext[text]'"
        ) from error
    try:
        # What lacks weights is initialised at random, from the generator that training draws from.
        with torch.random.fork_rng(devices=[]):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model, loaded = AutoModel.from_pretrained(source, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # hubs, caches and parsers raise many kinds
        raise PretrainedError(_cannot_load(source, reason(error))) from error
    problem = _loading_problem(model, loaded) or _mismatch(tokenizer, model)
    if problem:
        raise PretrainedError(_cannot_load(source, problem))
    return TextEncoder(source, tokenizer, model)


def _cannot_load(source: str, why: str) -> str:
    return (
        f"The text encoder {source} cannot be loaded: {why}. There are three ways out: connect to the network once, so "
        f"that it is downloaded and kept; set {VARIABLE} to a local folder with its configuration, tokenizer and "
        "weights; or train with the token randomText of TextDiffSegTrainer, which needs no text encoder."
    )


def _loading_problem(model: nn.Module, loaded: Mapping[str, Any]) -> str | None:
    """Weights that are random or left over although transformers only warns. The pooler is not used here."""
    missing = sorted(key for key in loaded["missing_keys"] if "pooler" not in key.split("."))
    mismatched = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in loaded["mismatched_keys"])
    parts = {name for name, _ in model.named_children()} - {"pooler"}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # Heads of the pre-training lie outside the parts of the encoder; position_ids is a table that old files kept.
    unused = sorted(
        key
        for key in loaded["unexpected_keys"]
        if key.removeprefix(prefix).split(".")[0] in parts and not key.endswith("position_ids")
    )
    for keys, what in (
        (missing, "are missing in its files"),
        (mismatched, "have another shape in its files"),
        (unused, "in its files have no place in its configuration"),
    ):
        if keys:
            return f"{len(keys)} of the weights {what}, such as {keys[0]}"
    return None


def _mismatch(tokenizer: Any, model: nn.Module) -> str | None:
    """Whether tokenizer and model belong together. Without its files, a tokenizer knows its special tokens only."""
    embeddings = model.get_input_embeddings()
    if getattr(model.config, "is_encoder_decoder", False) or not isinstance(embeddings, nn.Embedding):
        return f"{type(model).__name__} is no text encoder such as BERT"
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        return "its tokenizer has no vocabulary"
    if len(tokenizer) > embeddings.num_embeddings:
        return f"its tokenizer knows {len(tokenizer)} tokens, the model {embeddings.num_embeddings}"
    return None


def _token_limit(tokenizer: Any, model: nn.Module) -> int:
    """The tokenizer's limit (a huge number where it has none) or the model's positions, whichever is less."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return int(tokenizer.model_max_length)
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    # RoBERTa counts positions from behind its padding index.
    reserved = 0 if getattr(table, "padding_idx", None) is None else table.padding_idx + 1
    return int(min(tokenizer.model_max_length, positions - reserved))
