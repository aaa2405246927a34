"""Settings of a training: one frozen dataclass per method, one documented field per choice.

A field is declared with :func:`setting`, which ties the value to its documentation (equation or table of the paper) and
to the variant tokens that change it (see :mod:`nnunet_diffext.variants`). Values are resolved once, when a trainer
starts: ``defaults <- plans["diffext"][<trainer>] <- variant name``; the result is written back to the plans, which
nnU-Net copies into the model folder and hands to ``build_network_architecture`` at prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

S = TypeVar("S", bound="TrainingSettings")

PLANS_KEY = "diffext"
"""Key of the plans dictionary under which the settings of all methods live, by trainer name."""

LABELS_KEY, PLANNER_KEY = "label_space", "planner"
"""What else lives there: the label space, which prediction needs, and a planner's notes."""


class SettingsError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the message names it and what is allowed."""


def setting(
    default: Any,
    doc: str,
    *,
    number: str | None = None,
    switches: Mapping[str, Any] | None = None,
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declare a settings field.

    Args:
        default: value of the field when nothing changes it.
        doc: meaning, unit and source (paper, equation or table).
        number: prefix or suffix of a numeric token, with ``#`` for the number: ``"lr#"``, ``"#epochs"``.
        switches: token -> value, for tokens that are plain words.
        choices: the allowed values, when they can be listed.
        minimum, maximum: inclusive bounds of a numeric value.
    """
    metadata = {
        "doc": doc, "number": number, "switches": dict(switches or {}),
        "choices": choices, "minimum": minimum, "maximum": maximum,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What every trainer of this package understands. The defaults are nnU-Net's."""

    presets: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {}
    """Tokens that change several fields at once: token -> (meaning, {field: value})."""

    epochs: int = setting(1000, "number of epochs", number="#epochs", minimum=1)
    iterations: int = setting(250, "training iterations per epoch", number="#iters", minimum=1)
    val_iterations: int = setting(50, "iterations of the online validation per epoch", number="#valiters", minimum=1)
    initial_lr: float = setting(1e-2, "initial learning rate, decayed with power 0.9", number="lr#", minimum=0)
    weight_decay: float = setting(3e-5, "weight decay of SGD", number="wd#", minimum=0)
    momentum: float = setting(0.99, "Nesterov momentum of SGD", number="momentum#", minimum=0, maximum=1)
    save_every: int = setting(50, "epochs between two writes of checkpoint_latest.pth", number="save#", minimum=1)
    seed: int | None = setting(
        None,
        "seed of initialisation and noise; data order still depends on the workers",
        number="seed#",
        minimum=0,
        maximum=2**63 - 1,
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            _check(f, getattr(self, f.name), type(self).__name__)

    @classmethod
    def resolve(cls: type[S], from_plans: Mapping[str, Any] | None, from_name: Mapping[str, Any]) -> S:
        """Defaults, overridden by the plans' block, overridden by the variant name.

        Raises:
            SettingsError: for a key that is no field (the known ones are listed) or a value out of range.
        """
        values = dict(from_plans or {})
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise SettingsError(
                f"Unknown setting(s) {unknown} in the plans' '{PLANS_KEY}' block for {cls.__name__}. "
                f"Known: {', '.join(known)}."
            )
        return cls(**{**values, **from_name})

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary, as stored in the plans."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class MethodSettings(TrainingSettings):
    """What the trainers of the methods add to the stock trainer's settings."""

    cpu_bfloat16: bool = setting(
        False, "mixed precision on a CPU that computes bfloat16 natively", switches={"bf16": True}
    )


def default_of(f: Field) -> Any:
    """The default value of a settings field."""
    return None if f.default is MISSING else f.default


def _check(f: Field, value: Any, owner: str) -> None:
    """Type, choice and range of one value. ``None`` is allowed where the default or the annotation says so."""
    if value is None and (f.default is None or "None" in str(f.type)):
        return
    kind = str(f.type).split(" |")[0]
    accepted = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict": dict, "list": list}[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind in ("int", "float")):
        raise SettingsError(f"{owner}.{f.name} must be of type {f.type}, got {value!r} ({f.metadata['doc']}).")
    if kind == "float" and not math.isfinite(value):
        raise SettingsError(f"{owner}.{f.name} must be finite, got {value!r} ({f.metadata['doc']}).")
    choices, low, high = (f.metadata.get(k) for k in ("choices", "minimum", "maximum"))
    if choices and value not in choices:
        raise SettingsError(f"{owner}.{f.name} must be one of {choices}, got {value!r} ({f.metadata['doc']}).")
    if (low is not None and value < low) or (high is not None and value > high):
        raise SettingsError(f"{owner}.{f.name} must lie in [{low}, {high}], got {value!r} ({f.metadata['doc']}).")
