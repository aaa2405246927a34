"""Variant names: ``DMEDSegTrainer_noCACL_50epochs`` = base trainer + ``_``-joined tokens.

The full name is the class name, hence the name of the result folder and of the trainer in the checkpoint: an override
is always recorded. Tokens come from the fields of the method's settings (:func:`nnunet_diffext.settings.setting`) and
from its presets. Numbers are written without a dot, because Python pickles classes by dotted name: ``cac0p5`` is 0.5,
``lr1e-3`` 0.001.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

from nnunet_diffext.settings import SettingsError, TrainingSettings, default_of

NUMBER = r"(\d+(?:p\d+)?(?:e-?\d+)?)"


class UnknownTokenError(ValueError):
    """A variant name holds a token that the method does not know; the message lists those it knows."""


class TokenInfo(NamedTuple):
    """One token: how it is written, what it does, and the value of the field without it."""

    pattern: str
    meaning: str
    default: Any


def split_name(name: str, bases: Iterable[str]) -> tuple[str, list[str]] | None:
    """``"Base_token1_token2"`` -> ``("Base", ["token1", "token2"])``, or ``None`` if no base fits."""
    base, *tokens = name.split("_")
    return (base, tokens) if base in set(bases) else None


def parse_tokens(settings: type[TrainingSettings], tokens: Iterable[str], name: str = "") -> dict[str, Any]:
    """Field values that the tokens stand for; later tokens win over presets before them.

    Raises:
        UnknownTokenError: for a token that no field or preset declares.
        SettingsError: for a number out of range, or two tokens that set one field to different values.
    """
    values: dict[str, Any] = {}
    explicit: dict[str, tuple[str, Any]] = {}
    for token in tokens:
        if token in settings.presets:
            preset = settings.presets[token][1]
            clash = sorted(k for k in preset if values.get(k, preset[k]) != preset[k])
            if clash:
                raise SettingsError(f"Token '{token}' of '{name}' contradicts a token before it on {', '.join(clash)}.")
            values.update(preset)
            continue
        field_name, value = _match_field(settings, token, name)
        if field_name in explicit and explicit[field_name][1] != value:
            raise SettingsError(
                f"Tokens '{explicit[field_name][0]}' and '{token}' of '{name}' both set '{field_name}'. Keep one."
            )
        explicit[field_name] = (token, value)
    values.update({k: v for k, (_, v) in explicit.items()})
    return values


def _match_field(settings: type[TrainingSettings], token: str, name: str) -> tuple[str, Any]:
    for f in fields(settings):
        if token in f.metadata["switches"]:
            return f.name, f.metadata["switches"][token]
        if f.metadata["number"]:
            match = re.fullmatch(f.metadata["number"].replace("#", NUMBER), token)
            if match:
                number = float(match.group(1).replace("p", "."))
                if not math.isfinite(number):
                    raise SettingsError(f"Token '{token}' of '{name}' is too large a number for '{f.name}'.")
                if str(f.type).startswith("int"):
                    if match.group(1).isdigit():
                        return f.name, int(match.group(1))
                    if number != int(number):
                        raise SettingsError(f"Token '{token}' of '{name}' needs a whole number for '{f.name}'.")
                    number = int(number)
                return f.name, number
    listing = "\n".join(f"  {t.pattern:<18} {t.meaning}" for t in describe_tokens(settings))
    raise UnknownTokenError(
        f"Unknown token '{token}' in trainer name '{name}'. Tokens are joined with '_', decimals are written '0p5'. "
        f"Known tokens:\n{listing}"
    )


def describe_tokens(settings: type[TrainingSettings]) -> list[TokenInfo]:
    """Every token the method understands, presets first, then field by field."""
    infos = [TokenInfo(token, meaning, None) for token, (meaning, _) in settings.presets.items()]
    for f in fields(settings):
        doc, default = f.metadata["doc"], default_of(f)
        if f.metadata["number"]:
            infos.append(TokenInfo(f.metadata["number"].replace("#", "<number>"), f"{f.name}: {doc}", default))
        for token, value in f.metadata["switches"].items():
            infos.append(TokenInfo(token, f"{f.name} = {value!r}: {doc}", default))
    return infos
