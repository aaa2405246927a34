"""Settings of a training beside the defaults of its method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from nnunet_diffext.report.markup import Markup, details, element, join, missing, paragraph, table
from nnunet_diffext.report.model import ReportedModel
from nnunet_diffext.settings import LABELS_KEY, PLANNER_KEY, PLANS_KEY, default_of
from nnunet_diffext.trainers import TRAINERS, find_trainer
from nnunet_diffext.variants import split_name


@dataclass(frozen=True)
class Setting:
    """One field: its value, its default and what it means; both are empty where the method is not known here."""

    name: str
    value: Any
    default: Any = None
    meaning: str = ""
    known: bool = False

    @property
    def changed(self) -> bool:
        """Whether the value differs from a known default."""
        return self.known and self.value != self.default


def settings_of(model: ReportedModel) -> list[Setting]:
    """The settings that the training wrote into its plans; none for trainers without.

    Raises:
        ValueError: the plans hold something else in that place.
    """
    blocks = model.plans.get(PLANS_KEY, {})
    if not isinstance(blocks, Mapping):
        raise ValueError(f"The '{PLANS_KEY}' block of plans.json is no JSON object.")
    parts = split_name(model.trainer, TRAINERS)
    base = parts[0] if parts else next((k for k in blocks if k not in (LABELS_KEY, PLANNER_KEY)), "")
    values = blocks.get(base, {})
    if not isinstance(values, Mapping):
        raise ValueError(f"The settings of {base} in plans.json are no JSON object.")
    declared = {}
    if base in TRAINERS and values:
        try:
            declared = {f.name: f for f in fields(find_trainer(base).Settings)}
        except (ImportError, AttributeError):  # an optional dependency of the method is not installed here
            declared = {}
    return [
        Setting(name, value, default_of(declared[name]), declared[name].metadata["doc"], True)
        if name in declared
        else Setting(name, value)
        for name, value in values.items()
    ]


def citation_of(model: ReportedModel) -> str:
    """Publication of the method, as the training or its trainer states it; empty for nnU-Net's own trainer."""
    for fold in model.folds:
        if isinstance(fold.debug.get("reference"), str) and fold.debug["reference"]:
            return fold.debug["reference"]
    parts = split_name(model.trainer, TRAINERS)
    try:
        return str(getattr(find_trainer(parts[0]), "reference", "")) if parts else ""
    except (ImportError, AttributeError):
        return ""


def settings_html(model: ReportedModel) -> Markup:
    """What differs from the defaults, and all settings folded in."""
    try:
        settings = settings_of(model)
    except ValueError as error:
        return missing(str(error))
    if not settings:
        return missing("No settings of this package are recorded: the trainer is nnU-Net's own, or another plug-in's.")
    changed = [s for s in settings if s.changed]
    if not any(s.known for s in settings):
        first = missing("The method is not installed here: defaults are not known, so no differences are marked.")
    elif changed:
        first = _table("Settings that differ from the defaults", changed)
    else:
        first = paragraph("All settings have their defaults.")
    return join(first, details(f"All {len(settings)} settings", _table("All settings", settings)))


def _table(caption: str, settings: list[Setting]) -> Markup:
    rows = [
        (
            element("code", s.name),
            element("strong", repr(s.value), class_="changed") if s.changed else repr(s.value),
            repr(s.default) if s.known else "not known",
            s.meaning,
        )
        for s in settings
    ]
    return table(caption, ("Setting", "Value", "Default", "Meaning"), rows, numeric=False)
