"""List the trainers, the tokens of one trainer, and the settings that a full variant name stands for."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import Any

WIDTH = 110


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``variants``."""
    parser = subparsers.add_parser(
        "variants",
        description="Without argument: the trainers. With a trainer: its tokens, which are appended to its name "
        "with '_'. With a full name such as DMEDSegTrainer_noCACL_50epochs: the settings it resolves to as well.",
    )
    parser.add_argument("trainer_name", nargs="?", metavar="TRAINER_NAME", help="trainer, with or without tokens")


def run(args: argparse.Namespace) -> int:
    """Print the listing."""
    from nnunet_diffext.trainers import TRAINERS

    if args.trainer_name is None:
        print("Trainers (nnunet_diffext variants TRAINER_NAME lists the tokens):")
        for name in TRAINERS:
            print(_entry(name, _summary(name)))
        return 0
    print("\n".join(describe(args.trainer_name)))
    return 0


def describe(name: str) -> list[str]:
    """The lines about one trainer name.

    Raises:
        ValueError: for an unknown trainer (the known ones are listed) or token (UnknownTokenError, lists the tokens).
    """
    from nnunet_diffext.trainers import TRAINERS, find_trainer
    from nnunet_diffext.variants import describe_tokens

    try:
        cls = find_trainer(name)
    except AttributeError:
        # An error inside the trainer's module is no wrong name.
        if name.split("_")[0] in TRAINERS:
            raise
        raise ValueError(f"there is no trainer '{name}'. Known trainers: {', '.join(TRAINERS)}") from None
    base = name.split("_")[0]
    lines = [f"{base}: {_summary(base)}", "", "Tokens (decimals are written 0p5):"]
    lines += [_entry(t.pattern, t.meaning + _default(t.default)) for t in describe_tokens(cls.Settings)]
    if name != base:
        settings = cls.Settings(**cls.overrides).as_dict()
        lines += ["", f"{name} resolves to (* = set by the name; a plans file may change the others):"]
        lines += [f"{'*' if key in cls.overrides else ' '} {key} = {value!r}" for key, value in settings.items()]
    return lines


def _summary(base: str) -> str:
    from nnunet_diffext.trainers import TRAINERS, find_trainer

    try:
        doc = find_trainer(base).__doc__ or ""
    except ImportError as error:
        return f"not available: {error}"
    first = " ".join(doc.strip().split("\n\n")[0].split())
    return re.sub(r":\w+:`~?([^`]+)`", r"\1", first).replace("``", "") or TRAINERS[base]


def _entry(term: str, text: str) -> str:
    indent = " " * 22
    return textwrap.fill(text, WIDTH, initial_indent=f"  {term:<18}  ", subsequent_indent=indent)


def _default(value: Any) -> str:
    return "" if value is None else f" (default: {value!r})"
