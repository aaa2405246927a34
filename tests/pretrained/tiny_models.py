"""Untrained models of a few thousand weights, saved as their libraries save the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = ("liver", "kidney", "image", "of", "the", "ct", "left", "##s", ",")
BERT_POSITIONS = 12


def save_bert(folder: Path, **changes: Any) -> nn.Module:
    """A BERT with its head of the pre-training, and a WordPiece vocabulary; returns the encoder that was saved."""
    from transformers import BertConfig, BertForMaskedLM

    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    settings = {"vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"intermediate_size": 32, "max_position_embeddings": BERT_POSITIONS, **changes}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**settings)).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return model.bert


VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 16, "reg_tokens": 3}
VIT |= {"no_embed_class": True}
MEAN, STD = (0.2, 0.4, 0.6), (0.5, 0.25, 0.125)


def make_vit(**changes: Any) -> nn.Module:
    """timm's smallest vision transformer, made smaller, whose every weight is random (timm starts some at zero)."""
    import timm

    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True, **{**VIT, **changes}).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(0, 0.3)
    return vit


def save_vit_folder(
    folder: Path, state: dict[str, torch.Tensor], file: str = "model.safetensors", **changes: Any
) -> Path:
    """timm's local-dir layout."""
    from safetensors.torch import save_file

    folder.mkdir()
    pretrained = {"mean": MEAN, "std": STD, "num_classes": 1000, "classifier": "head", "input_size": [3, 16, 16]}
    config = {"architecture": "test_vit", "model_args": {**VIT, **changes}, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config))
    state = {key: value.contiguous() for key, value in state.items()}
    save_file(state, folder / file) if file.endswith(".safetensors") else torch.save(state, folder / file)
    return folder


def make_autoencoder(**changes: Any) -> nn.Module:
    """A KL autoencoder with one downsampling."""
    from diffusers import AutoencoderKL

    settings = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2, "sample_size": 16}
    settings |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    return AutoencoderKL(**{**settings, **changes}).eval()


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (str(self.marker),)
