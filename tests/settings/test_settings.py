"""Settings: types, ranges, and the order in which values are resolved."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any

import pytest

from nnunet_diffext.settings import SettingsError, TrainingSettings, default_of, setting
from nnunet_diffext.trainers import TRAINERS, find_trainer

SETTINGS = list(dict.fromkeys(find_trainer(name).Settings for name in TRAINERS))


@dataclass(frozen=True, kw_only=True)
class Example(TrainingSettings):
    """One field of each sort."""

    share: float = setting(0.5, "a share", minimum=0, maximum=1)
    kind: str = setting("a", "one of two", choices=("a", "b"))
    flag: bool = setting(False, "a switch")
    count: int = setting(2, "a number", minimum=1)
    optional: float | None = setting(None, "may be absent", minimum=0)


def test_defaults_are_nnunets() -> None:
    """What the stock trainer sets; a plain ``nnUNetTrainer_seed1`` must be nnU-Net."""
    s = TrainingSettings()
    assert (s.epochs, s.iterations, s.val_iterations, s.save_every) == (1000, 250, 50, 50)
    assert (s.initial_lr, s.weight_decay, s.momentum, s.seed) == (1e-2, 3e-5, 0.99, None)


def test_resolution_order() -> None:
    resolved = Example.resolve({"share": 0.25, "kind": "b"}, {"share": 0.75})
    assert (resolved.share, resolved.kind, resolved.flag) == (0.75, "b", False)
    assert Example.resolve(None, {}) == Example()
    assert Example.resolve({}, {"count": 7}).count == 7


def test_unknown_key_of_the_plans_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"\['shaer', 'zzz'\].*diffext.*Example") as error:
        Example.resolve({"zzz": 1, "shaer": 0.25}, {})
    assert all(f.name in str(error.value) for f in fields(Example))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("share", 1.01, r"Example\.share must lie in \[0, 1\], got 1\.01 \(a share\)"),
        ("share", -0.01, r"\[0, 1\]"),
        ("count", 0, r"\[1, None\]"),
        ("optional", -1.0, r"\[0, None\]"),
        ("kind", "c", r"one of \('a', 'b'\), got 'c' \(one of two\)"),
        ("share", "0.5", "type float, got '0.5'"),
        ("count", 2.0, "type int"),
        ("count", True, "type int"),
        ("share", True, "type float"),
        ("flag", 1, "type bool"),
        ("kind", None, "type str"),
        ("share", None, "type float"),
        ("optional", "1", "type float"),
    ],
)
def test_wrong_values(field: str, value: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Example(**{field: value})
    with pytest.raises(SettingsError, match=message):  # in a plans file as well
        Example.resolve({field: value}, {})


@pytest.mark.parametrize(
    ("field", "value"), [("share", 0), ("share", 1), ("optional", None), ("optional", 3), ("seed", 5)]
)
def test_bounds_are_inclusive_and_integers_are_numbers(field: str, value: Any) -> None:
    assert getattr(Example(**{field: value}), field) == value


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Example().share = 0.1


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.__name__)
def test_survives_the_plans_file(settings: type[TrainingSettings]) -> None:
    """nnU-Net stores the plans as JSON; what comes back resolves to the same settings."""
    original = settings()
    stored = json.loads(json.dumps(original.as_dict()))
    assert settings.resolve(stored, {}) == original


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.__name__)
def test_every_field_is_documented_and_checked(settings: type[TrainingSettings]) -> None:
    for f in fields(settings):
        assert len(f.metadata["doc"]) > 5, f.name
        checked = ("int", "float", "bool", "str", "dict", "list")
        assert str(f.type).split(" |")[0] in checked, f"{f.name}: {f.type} is not checked"
        assert default_of(f) == getattr(settings(), f.name)
        with pytest.raises(SettingsError):
            settings(**{f.name: object()})
