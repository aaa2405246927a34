from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Malicious, make_autoencoder

from nnunet_diffext.pretrained import PretrainedError
from nnunet_diffext.pretrained.autoencoder import autoencoder_from_config, load_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_autoencoder().save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


def reconstruct(model: torch.nn.Module) -> torch.Tensor:
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.decode(model.encode(image).latent_dist.mode()).sample


def test_loaded_as_saved_and_frozen(folder: Path) -> None:
    model, _ = load_autoencoder(str(folder))
    assert torch.equal(reconstruct(model), reconstruct(make_autoencoder()))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    make_autoencoder().half().save_pretrained(tmp_path / "half")
    model, _ = load_autoencoder(str(tmp_path / "half"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_configuration_builds_the_same_architecture(folder: Path) -> None:
    model, config = load_autoencoder(str(folder))
    text = json.dumps(config)
    assert str(folder) not in text and not any(key.startswith("_") for key in config)
    before = torch.get_rng_state()
    again = autoencoder_from_config(json.loads(text))
    assert torch.equal(before, torch.get_rng_state())
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert not torch.equal(reconstruct(again), reconstruct(model))
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(reconstruct(again), reconstruct(model))


def test_loading_leaves_the_random_generator_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    load_autoencoder(str(folder))
    assert torch.equal(before, torch.get_rng_state())


def test_a_configuration_that_cannot_be_built(folder: Path) -> None:
    _, config = load_autoencoder(str(folder))
    with pytest.raises(PretrainedError, match="another version of diffusers"):
        autoencoder_from_config(config | {"down_block_types": ["NoSuchBlock"] * 2})


@pytest.mark.parametrize("call", [load_autoencoder, lambda source: autoencoder_from_config({})])
def test_diffusers_is_missing(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(PretrainedError, match=r"pip install 'nnunet_diffext\[pretrained\]'"):
        call("somewhere")


@pytest.mark.parametrize("source", ["nobody/nothing", "/no/such/folder"])
def test_no_such_source(source: str) -> None:
    with pytest.raises(PretrainedError, match=f"{source} cannot be loaded: .* connect to the network once"):
        load_autoencoder(source)


@pytest.mark.parametrize("channels", [{"in_channels": 1}, {"out_channels": 1}])
def test_other_channels(tmp_path: Path, channels: dict[str, int]) -> None:
    model = make_autoencoder(**channels)
    model.save_pretrained(tmp_path / "kl")
    with pytest.raises(PretrainedError, match="it must have 3 of both"):
        load_autoencoder(str(tmp_path / "kl"))
    with pytest.raises(PretrainedError, match="it must have 3 of both"):
        autoencoder_from_config(dict(model.config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "decoder.conv_in.weight"}, "decoder.conv_in.weight"),
        (lambda s: s | {"decoder.extra.weight": torch.zeros(2)}, "decoder.extra.weight"),
        (lambda s: s | {"decoder.conv_in.bias": torch.zeros(2)}, ""),
    ],
)
def test_weights_that_do_not_fit_are_never_random(folder: Path, change, said: str) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(PretrainedError, match=f"cannot be loaded: .*{said}"):
        load_autoencoder(str(folder))


def test_old_names_of_the_weights_are_known(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {key.replace(new, old): value for key, value in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(reconstruct(load_autoencoder(str(folder))[0]), reconstruct(make_autoencoder()))


def test_another_class_of_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"_class_name": "VQModel"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PretrainedError, match="it is a VQModel, not an AutoencoderKL"):
        load_autoencoder(str(folder))


def test_a_malicious_file_does_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"decoder.conv_in.weight": Malicious(tmp_path / "ran")}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(PretrainedError, match="cannot be loaded"):
        load_autoencoder(str(folder))
    assert not (tmp_path / "ran").exists()
