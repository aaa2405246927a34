from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import MEAN, STD, VIT, Malicious, make_vit, save_vit_folder
from torch import Tensor, nn

from nnunet_diffext.pretrained import PretrainedError
from nnunet_diffext.pretrained.vision import VARIABLE, PatchTeacher, load_teacher, teacher_images

GRID = (3, 5)
PATCH = VIT["patch_size"]


def images(grid: tuple[int, int] = GRID, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, PATCH * grid[0], PATCH * grid[1], generator=generator)


@pytest.fixture
def registered() -> dict[str, Tensor]:
    """Weights, with a classifier, of the architecture that timm knows as test_vit."""
    import timm

    torch.manual_seed(0)
    return {key: value.clone() for key, value in timm.create_model("test_vit").state_dict().items()}


def use(monkeypatch: pytest.MonkeyPatch, path: Path) -> Path:
    monkeypatch.setenv(VARIABLE, str(path))
    return path


# ---------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("axis", [0, 1])
def test_tokens_follow_a_shift_by_one_patch(axis: int) -> None:
    vit = make_vit()
    nn.init.zeros_(vit.pos_embed)
    teacher = PatchTeacher(vit, MEAN, STD)
    tokens, shifted = teacher(images()), teacher(images().roll(PATCH, axis + 2))
    assert tokens.shape == (2, VIT["embed_dim"], *GRID)
    torch.testing.assert_close(shifted, tokens.roll(1, axis + 2))
    assert (shifted - tokens).abs().max() > 0.1


@pytest.mark.parametrize("axis", [0, 1])
def test_positions_lie_along_the_same_axes(axis: int) -> None:
    vit = make_vit()
    ramp = torch.linspace(-1, 1, 4).view(4, 1) if axis == 0 else torch.linspace(-1, 1, 4).view(1, 4)
    with torch.no_grad():
        vit.pos_embed.copy_(vit.pos_embed[:, :1] * ramp.expand(4, 4).reshape(1, 16, 1))
    tokens = PatchTeacher(vit, MEAN, STD)(torch.full_like(images(), 0.5))
    assert tokens.diff(dim=2 + axis).abs().amax(1).min() > 1e-3
    assert tokens.diff(dim=3 - axis).abs().max() < 1e-4


def test_tokens_are_the_normalised_patch_tokens_of_the_model() -> None:
    vit = make_vit()
    teacher = PatchTeacher(vit, MEAN, STD)
    normalised = (images((4, 4)) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = vit.forward_features(normalised)
    assert expected.shape[1] == 16 + 1 + VIT["reg_tokens"]
    found = teacher(images((4, 4)))
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected[:, 1 + VIT["reg_tokens"] :])
    assert (teacher.patch, teacher.channels) == (PATCH, VIT["embed_dim"])


def test_the_teacher_stays_frozen_in_eval_mode_and_in_float32() -> None:
    teacher = PatchTeacher(make_vit(proj_drop_rate=0.5), MEAN, STD)
    nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    expected = teacher(images())
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher(images().requires_grad_())
    assert found.dtype == torch.float32 and not found.requires_grad and torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 3, 8, 9), (1, 3, 10, 8), (3, 8, 8)])
def test_images_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected images \(B, 3, 4 h, 4 w\)"):
        PatchTeacher(make_vit(), MEAN, STD)(torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------------- images


def test_images_show_every_grid_point_in_its_patch() -> None:
    image = torch.zeros(1, 1, 24, 40)
    image[..., 8:16, 32:40] = 5.0
    seen = teacher_images(image, GRID, 14)
    assert seen.shape == (1, 3, 42, 70) and seen.dtype == torch.float32
    means = nn.functional.avg_pool2d(seen, 14)[0, 0]
    assert means[1, 4] > 0.9 and means.sum() - means[1, 4] < 0.5


def test_intensities_are_rescaled_robustly_to_0_1() -> None:
    image = torch.linspace(-3, 3, 1600).view(1, 1, 40, 40).clone()
    plain = teacher_images(image, (10, 10), 4)
    image[..., 0, 0] = 1e4
    assert (teacher_images(image, (10, 10), 4) - plain)[..., 4:, :].abs().max() < 0.02
    assert plain.min() == 0 and plain.max() == 1
    assert plain.median() == pytest.approx(0.5, abs=0.02)


def test_every_sample_and_channel_is_rescaled_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 16, 16, generator=generator)
    changed = image * torch.tensor([1.0, 7.0]).view(2, 1, 1, 1) + torch.tensor([0.0, 2.0, -3.0]).view(3, 1, 1)
    torch.testing.assert_close(teacher_images(changed, (4, 4), 4), teacher_images(image, (4, 4), 4))


@pytest.mark.parametrize("value", [0.0, -2.5, 1e4])
def test_a_constant_image_becomes_zeros(value: float) -> None:
    noise = 1e-7 * value * torch.randn(1, 2, 12, 20, generator=torch.Generator().manual_seed(0))
    assert teacher_images(value + noise, GRID, PATCH).abs().max() == 0


@pytest.mark.parametrize(("channels", "order"), [(1, [0, 0, 0]), (2, [0, 0, 1]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_channels(channels: int, order: list[int]) -> None:
    image = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([teacher_images(image[:, c : c + 1], (4, 4), 4)[:, :1] for c in range(channels)], 1)
    assert torch.equal(teacher_images(image, (4, 4), 4), alone[:, order])


def test_volumes_are_refused() -> None:
    with pytest.raises(ValueError, match="2D images"):
        teacher_images(torch.zeros(1, 1, 8, 8, 8), GRID, PATCH)


# --------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    vit = make_vit()
    use(monkeypatch, save_vit_folder(tmp_path / "vit", vit.state_dict(), file))
    teacher = load_teacher()
    torch.testing.assert_close(teacher(images()), PatchTeacher(vit, MEAN, STD)(images()))
    assert not any("state_dict" in getattr(m, "pretrained_cfg", {}) for m in teacher.modules()), "weights held twice"


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: dict[str, Tensor], wrap) -> None:
    torch.save(wrap(registered), use(monkeypatch, tmp_path / "vit.pth"))
    teacher = load_teacher("test_vit")
    assert "head.weight" in registered
    loaded = {key.removeprefix("vit."): value for key, value in teacher.state_dict().items()}
    assert {key for key in registered if not key.startswith("head.")} == set(loaded)
    assert all(torch.equal(value, registered[key]) for key, value in loaded.items())
    assert teacher.mean.flatten().tolist() == [0.5] * 3, "what timm says about this architecture"


def test_safetensors_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: dict[str, Tensor]) -> None:
    save_file(registered, use(monkeypatch, tmp_path / "vit.safetensors"))
    assert torch.equal(load_teacher("test_vit").vit.cls_token, registered["cls_token"])


def test_file_as_dinov2_publishes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = make_vit()
    state = dict(vit.state_dict())
    position = torch.randn(1, 1, VIT["embed_dim"])
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - position
    state["mask_token"] = torch.zeros(1, VIT["embed_dim"])
    use(monkeypatch, save_vit_folder(tmp_path / "vit", state, "pytorch_model.bin"))
    torch.testing.assert_close(load_teacher()(images()), PatchTeacher(vit, MEAN, STD)(images()))


def test_loading_leaves_the_random_generator_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, save_vit_folder(tmp_path / "vit", make_vit().state_dict()))
    before = torch.get_rng_state()
    load_teacher()
    assert torch.equal(before, torch.get_rng_state())


def refused(name: str = "test_vit") -> str:
    """The message of a teacher that cannot be loaded; it always names the ways out."""
    with pytest.raises(PretrainedError) as caught:
        load_teacher(name)
    message = str(caught.value)
    assert all(part in message for part in (VARIABLE, name, "network once", ".safetensors", "folder", "noAlign"))
    return message


def test_nothing_is_available() -> None:
    assert "the hub (test_vit)" in refused()


def test_no_weights_on_the_hub_are_not_replaced_by_random_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models import _builder

    monkeypatch.setattr(_builder, "_resolve_pretrained_source", lambda config: ("", ""))
    assert "No pretrained weights" in refused()


def test_hub_weights_are_loaded_strictly(monkeypatch: pytest.MonkeyPatch, registered: dict[str, Tensor]) -> None:
    from timm.models import _builder

    monkeypatch.setattr(_builder, "_resolve_pretrained_source", lambda config: ("state_dict", dict(registered)))
    teacher = load_teacher("test_vit")
    assert torch.equal(teacher.vit.cls_token, registered["cls_token"])
    assert not any("head" in key for key in teacher.state_dict())
    del registered["blocks.3.mlp.fc1.weight"]
    assert 'Missing key(s) in state_dict: "blocks.3.mlp.fc1.weight"' in refused()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("blocks.5.")},
            'Missing key(s) in state_dict: "blocks.5',
        ),
        (lambda s: s | {"blocks.6.norm1.weight": torch.zeros(64)}, 'Unexpected key(s) in state_dict: "blocks.6'),
        (lambda s: s | {"patch_embed.proj.weight": torch.zeros(64, 3, 14, 14)}, "patches of (14, 14) pixels"),
        (lambda s: s | {"norm.weight": torch.zeros(32)}, "size mismatch for norm.weight"),
        (lambda s: {"conv1.weight": torch.zeros(3)}, "other weights than those of test_vit"),
        (lambda s: {}, "holds no weights"),
        (lambda s: {k: v for k, v in s.items() if k.startswith("head.")}, "holds no weights"),
        (lambda s: {"epoch": 3}, "no table of weights"),
        (lambda s: [torch.zeros(3)], "no table of weights"),
    ],
)
def test_weights_of_another_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: dict[str, Tensor], change, said: str
) -> None:
    torch.save(change(registered), use(monkeypatch, tmp_path / "vit.pth"))
    assert said in refused()


def test_a_folder_with_weights_of_another_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, save_vit_folder(tmp_path / "vit", make_vit().state_dict(), depth=3))
    assert "blocks.2" in refused()


def test_a_malicious_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"cls_token": Malicious(tmp_path / "ran")}, use(monkeypatch, tmp_path / "vit.pth"))
    assert "could run code" in refused()
    folder = save_vit_folder(tmp_path / "vit", {}, "pytorch_model.bin")
    torch.save({"cls_token": Malicious(tmp_path / "ran")}, use(monkeypatch, folder) / "pytorch_model.bin")
    assert "could run code" in refused()
    assert not (tmp_path / "ran").exists()


def test_paths_that_hold_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path / "nowhere")
    assert "no such file or folder" in refused()
    folder = use(monkeypatch, tmp_path / "folder")
    folder.mkdir()
    assert "config.json does not exist" in refused()
    (folder / "config.json").write_text("{}")
    assert "no key 'architecture'" in refused()
    (folder / "config.json").write_text('{"architecture": "test_vit"}')
    assert "model.safetensors" in refused()
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    use(monkeypatch, tmp_path / "damaged.safetensors")
    refused()


def test_other_architectures_are_no_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({}, use(monkeypatch, tmp_path / "weights.pth"))
    refused("resnet18")
    with pytest.raises(PretrainedError, match="Linear cannot be a teacher"):
        PatchTeacher(nn.Linear(2, 2), MEAN, STD)
    with pytest.raises(PretrainedError, match="3 input channels"):
        PatchTeacher(make_vit(in_chans=1), MEAN, STD)
