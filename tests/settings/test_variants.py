"""Variant names: every token of every method, numbers, conflicts, and classes that pickle."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, fields
from typing import Any

import pytest

import nnunet_diffext.trainers
from nnunet_diffext.settings import SettingsError, TrainingSettings, setting
from nnunet_diffext.trainers import TRAINERS, find_trainer
from nnunet_diffext.variants import TokenInfo, UnknownTokenError, describe_tokens, parse_tokens, split_name

ALL_TOKENS = [(base, info) for base in TRAINERS for info in describe_tokens(find_trainer(base).Settings)]


@dataclass(frozen=True, kw_only=True)
class Example(TrainingSettings):
    """Tokens of each sort."""

    presets = {
        "quick": ("a short training", {"epochs": 2, "share": 0.25}),
        "long": ("a long training", {"epochs": 9}),
    }  # fmt: skip
    share: float = setting(
        0.5, "a share", number="share#", switches={"none": 0.0, "half": 0.5}, minimum=0, maximum=1
    )  # fmt: skip
    flag: bool = setting(True, "a switch", switches={"off": False})


def parse(*tokens: str) -> dict[str, Any]:
    return parse_tokens(Example, tokens, "Example_" + "_".join(tokens))


@pytest.mark.parametrize(
    ("token", "field", "value"),
    [
        ("50epochs", "epochs", 50),
        ("1e2epochs", "epochs", 100),
        ("20iters", "iterations", 20),
        ("5valiters", "val_iterations", 5),
        ("lr1e-3", "initial_lr", 1e-3),
        ("lr0p5", "initial_lr", 0.5),
        ("lr2p5e-4", "initial_lr", 2.5e-4),
        ("lr3", "initial_lr", 3.0),
        ("seed7", "seed", 7),
        ("share1", "share", 1.0),
        ("none", "share", 0.0),
        ("off", "flag", False),
    ],
)
def test_tokens(token: str, field: str, value: Any) -> None:
    parsed = parse(token)
    assert parsed == {field: pytest.approx(value)}
    assert type(parsed[field]) is type(value)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (("quick",), {"epochs": 2, "share": 0.25}),
        (("quick", "7epochs"), {"epochs": 7, "share": 0.25}),
        (("7epochs", "quick"), {"epochs": 7, "share": 0.25}),
        (("none", "share0"), {"share": 0.0}),
        (("half", "half"), {"share": 0.5}),
        ((), {}),
    ],
)
def test_a_token_for_a_field_beats_a_preset_in_either_order(tokens: tuple[str, ...], expected: dict[str, Any]) -> None:
    assert parse(*tokens) == expected


@pytest.mark.parametrize("tokens", [("5epochs", "6epochs"), ("none", "half"), ("half", "share0p25")])
def test_contradicting_tokens_are_named(tokens: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match=f"'{tokens[0]}' and '{tokens[1]}' of 'Example_.*both set"):
        parse(*tokens)


@pytest.mark.parametrize(
    "token", ["Off", "epochs", "5.5epochs", "-5epochs", "5epoch", "x5epochs", "5epochsx", "lr", "lr1e", "share0.5", ""]
)
def test_unknown_token_lists_the_known_ones(token: str) -> None:
    with pytest.raises(UnknownTokenError) as error:
        parse(token)
    message = str(error.value)
    assert f"Unknown token '{token}' in trainer name 'Example_{token}'" in message
    for info in describe_tokens(Example):
        assert info.pattern in message and info.meaning in message


def test_whole_numbers_where_they_are_needed() -> None:
    with pytest.raises(SettingsError, match="'1p5epochs' of 'Example_1p5epochs' needs a whole number for 'epochs'"):
        parse("1p5epochs")


@pytest.mark.parametrize("name", ["DMEDSegTrainer_ema2", "DMEDSegTrainer_0epochs", "nnUNetTrainer_0iters"])
def test_out_of_range_is_reported_when_the_class_is_made(name: str) -> None:
    with pytest.raises(SettingsError, match="must lie in"):
        find_trainer(name)


def test_descriptions() -> None:
    infos = describe_tokens(Example)
    assert [i.pattern for i in infos[:2]] == ["quick", "long"]
    assert TokenInfo("share<number>", "share: a share", 0.5) in infos
    assert TokenInfo("off", "flag = False: a switch", True) in infos


# numbers for tokens whose range leaves out 1
WITHOUT_ONE = {
    "T": "500", "momentum": "0p5", "dim": "8", "stages": "3", "window": "5", "mask": "0p5", "droppath": "0p5"
}  # fmt: skip


@pytest.mark.parametrize(("base", "info"), ALL_TOKENS, ids=[f"{b}-{i.pattern}" for b, i in ALL_TOKENS])
def test_every_described_token_makes_a_trainer(base: str, info: TokenInfo) -> None:
    """The class differs from its base in its settings, unless the token spells out a default."""
    settings = find_trainer(base).Settings
    token = info.pattern.replace("<number>", WITHOUT_ONE.get(info.pattern.removesuffix("<number>"), "1"))
    name = f"{base}_{token}"
    variant = find_trainer(name)
    assert variant.__name__ == name and issubclass(variant, find_trainer(base))
    assert variant.base_name == base
    assert set(variant.overrides) <= {f.name for f in fields(settings)}
    resolved, default = settings(**variant.overrides), settings()
    spelled_default = "<number>" in info.pattern and info.default == 1
    assert (resolved != default) != spelled_default


def test_names_are_parsed_from_the_left() -> None:
    bases = ("A", "B")
    assert split_name("A", bases) == ("A", [])
    assert split_name("B_x_y", bases) == ("B", ["x", "y"])
    assert split_name("C_x", bases) is None
    assert split_name("_A", bases) is None


@pytest.mark.parametrize("name", ["DMEDSegTrainer__noEMA", "DMEDSegTrainer_noEMA_", "DMEDSegTrainer_noEMA__IEFA"])
def test_names_with_two_underscores_are_impossible(name: str) -> None:
    """nnU-Net splits ``<trainer>__<plans>__<configuration>`` at them."""
    with pytest.raises(UnknownTokenError, match="Unknown token ''"):
        find_trainer(name)


@pytest.mark.parametrize("base", TRAINERS)
def test_no_token_can_break_a_name(base: str) -> None:
    """Neither the separator nor a dot (pickle) nor a path separator, in any token; and no token occurs twice."""
    assert "_" not in base
    patterns = [info.pattern.replace("<number>", "#") for info in describe_tokens(find_trainer(base).Settings)]
    assert all(re.fullmatch(r"[A-Za-z0-9#]+", p) for p in patterns)
    assert len(set(patterns)) == len(patterns)


@pytest.mark.parametrize("base", TRAINERS)
@pytest.mark.parametrize("number", ["0", "1", "2p5", "1e-3"])
def test_no_token_has_two_readings(base: str, number: str) -> None:
    settings = find_trainer(base).Settings
    for info in describe_tokens(settings):
        if "<number>" in info.pattern:
            token = info.pattern.replace("<number>", number)
            matching = [
                f.name
                for f in fields(settings)
                if f.metadata["number"]
                and re.fullmatch(f.metadata["number"].replace("#", r"\d+(?:p\d+)?(?:e-?\d+)?"), token)
            ]
            assert len(matching) == 1


def test_variants_pickle_by_name_and_are_made_once() -> None:
    name = "DMEDSegTrainer_noCACL_cac0p5"
    with pytest.raises(SettingsError):
        find_trainer(name)
    variant = getattr(nnunet_diffext.trainers, "DMEDSegTrainer_IEFA_3epochs")  # noqa: B009 - as nnU-Net does
    assert variant.__module__ == "nnunet_diffext.trainers"
    assert pickle.loads(pickle.dumps(variant)) is variant
    assert variant.overrides == {"lambda_iefa": 0.5, "epochs": 3}
    assert find_trainer("DMEDSegTrainer").overrides == {}


@pytest.mark.parametrize("name", ["NoSuchTrainer", "DMEDSegTrainer2", "dmedSegTrainer_5epochs", "__nothing__"])
def test_other_names_are_missing_attributes(name: str) -> None:
    """nnU-Net asks every module with ``hasattr``; an unknown base must not end its search."""
    assert not hasattr(nnunet_diffext.trainers, name)


def test_unknown_trainer_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="NoSuchTrainer.*DMEDSegTrainer, .*PGRDTrainer, .*nnUNetTrainer"):
        find_trainer("NoSuchTrainer")


def test_the_papers_recipe() -> None:
    """Section 4.2, without anything of ours."""
    s = find_trainer("DMEDSegTrainer").Settings(**find_trainer("DMEDSegTrainer_paper").overrides)
    assert (s.epochs, s.momentum, s.initial_lr, s.weight_decay) == (300, 0.9, 1e-2, 3e-5)
    assert (s.lambda_cac, s.lambda_iefa) == (1.0, 0.5)
    assert (s.copy_paste, s.strong_intensity, s.ema_decay, s.fuse_predictions) == (0.0, False, 0.0, False)
    assert (s.ramp, s.confidence_threshold, s.experts, s.fusion) == (1.0, None, "both", "transformer")
    assert s.coupled  # eq. 4 trains everything through the fused prediction


def test_the_recipe_of_pgrd() -> None:
    """Section III-A, without anything of ours."""
    s = find_trainer("PGRDTrainer").Settings(**find_trainer("PGRDTrainer_paper").overrides)
    assert (s.initial_lr, s.ema_decay, s.prior_kind, s.terminal_share) == (1e-3, 0.0, "insample", 0.0)
    assert (s.kappa, s.readout, s.steps, s.step_power, s.sampler) == (1.0, "softmax", 300, 1.0, "ddim")
    assert find_trainer("PGRDTrainer").Settings().initial_lr == 3e-4
    assert find_trainer("PGRDTrainer_vanillaDDPM").overrides["initial_lr"] == 1e-3


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("CEonly", {"experts": "ce"}),
        ("DEonly", {"experts": "de"}),
        ("fixedAverage", {"fusion": "average", "lambda_cac": 0.0}),
        ("noCACL_IEFA", {"lambda_cac": 0.0, "lambda_iefa": 0.5}),
        ("IEFA", {"lambda_iefa": 0.5}),
        ("noCACL", {"lambda_cac": 0.0}),
        ("eq4", {"expert_supervision": 0.0}),
        ("TOnly", {"diffusion_weight": 0.0}),
        ("5percent", {"labeled_percent": 5.0}),
        ("cac1p5_iefa0p2", {"lambda_cac": 1.5, "lambda_iefa": 0.2}),
    ],
)
def test_rows_of_the_papers_tables(tokens: str, expected: dict[str, Any]) -> None:
    assert find_trainer(f"DMEDSegTrainer_{tokens}").overrides == expected


@pytest.mark.parametrize("tokens", ["CEonly_leaky", "CEonly_recycle", "CEonly_halfDE", "recycle_TOnly"])
def test_tokens_that_cancel_each_other_are_refused(tokens: str) -> None:
    """A name must not promise an ablation that does nothing."""
    with pytest.raises(SettingsError, match="leaves out"):
        find_trainer(f"DMEDSegTrainer_{tokens}")


def test_recycling_without_effect_is_refused() -> None:
    with pytest.raises(SettingsError, match="'recycle' needs clean latents"):
        find_trainer("LEAFTrainer_eps_recycle")


def test_untrained_heads_are_not_read() -> None:
    with pytest.raises(SettingsError, match="'dds0' trains none"):
        find_trainer("PGRDTrainer_dds0")
    assert find_trainer("PGRDTrainer_dds0_simplex").overrides


@pytest.mark.parametrize(
    ("name", "recycles"),
    [
        ("TextDiffSegTrainer", True),
        ("TextDiffSegTrainer_noRecycle", False),
        ("TextDiffSegTrainer_v", False),
        ("TextDiffSegTrainer_paper", False),
        ("LEAFTrainer", False),
        ("LEAFTrainer_recycle", True),
    ],
)
def test_recycling_is_for_clean_latents(name: str, recycles: bool) -> None:
    trainer = find_trainer(name)
    assert trainer.Settings(**trainer.overrides).recycles == recycles


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("PGRDTrainer", (1, 1, "ddim")),
        ("PGRDTrainer_ddpm", (1, 10, "ddpm")),
        ("PGRDTrainer_eq5mean", (1, 10, "eq5_mean")),
        ("PGRDTrainer_4samples", (4, 10, "ddim")),
        ("PGRDTrainer_4samples_20steps", (4, 20, "ddim")),
        ("PGRDTrainer_paper", (5, 300, "ddim")),
        ("LEAFTrainer_4samples", (4, 10, "ddim")),
        ("TextDiffSegTrainer_1steps", (1, 1, "ddim")),
    ],
)
def test_samples_take_several_steps(name: str, drawn: tuple[int, int, str]) -> None:
    """One step gives the same answer for every noise and sampler."""
    trainer = find_trainer(name)
    s = trainer.Settings(**trainer.overrides).sampling
    assert (s.samples, s.steps, s.sampler) == drawn


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TextDiffSegTrainer_anchor0_throughEncoder", "sees nothing of them: add the token 'noRecycle'"),
        ("TextDiffSegTrainer_twoStage_stride4", "'twoStage' takes the latent space as it was trained"),
        ("LEAFTrainer_kl8_imageLatents16", "brings its own image encoder"),
        ("M4oETrainer_woMoE_balance0p01", "'woMoE' has no experts"),
        ("M4oETrainer_woMoE_experts5", "'woMoE' has no experts"),
    ],
)
def test_tokens_that_another_one_cancels(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        find_trainer(name)
