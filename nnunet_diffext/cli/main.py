"""``nnunet_diffext VERB ...``: finds the verb, runs it, turns the user's mistakes into one clear message.

A verb is a module of this package with ``add_parser(subparsers)``, which registers a parser under the module's name,
and ``run(args) -> int``, the exit code. Only the module of the verb in use is imported, so that ``--help`` and
``trainer_dir`` do not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from nnunet_diffext import __version__

VERBS: dict[str, str] = {
    "doctor": "check paths, versions, discovery, device and disk, and say what to do",
    "enable": "let bare nnUNetv2_train find the trainers in this Python environment",
    "disable": "undo enable",
    "trainer_dir": "print the directory for the variable nnUNet_extTrainer",
    "variants": "list trainers, their variant tokens, and what a full name resolves to",
    "demo": "train, predict and evaluate on a small synthetic dataset",
    "evaluate": "score predictions, with calibration, and compare models",
    "predict": "predict images with uncertainty maps and quality scores, for any model of nnU-Net",
    "calibrate": "fit the temperature of a model's probabilities on its validation cases",
    "report": "write one HTML page about trained models: results, pictures, calibration, curves",
    "plan": "run a planner of this package on a preprocessed dataset",
    "preprocess_unlabeled": "preprocess images without labels for semi-supervised training",
    "split": "write a semi-supervised split into splits_final.json",
    "merge": "make one dataset out of several, with a modality per case, for one network",
    "add_modality": "give a trained M4oE model an expert and a head for another modality",
    "prompts": "show the text prompt of every label, and check them with the text encoder",
}
"""Verb, which is also the name of its module, and what ``--help`` says about it."""

USER_ERRORS = (ValueError, FileNotFoundError, NotImplementedError)
"""What verbs raise when the call or the data is wrong, with a message that says what to do. Anything else is a bug."""


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the complete arguments of ``verb`` (default: of no verb, which is enough for ``--help``)."""
    parser = argparse.ArgumentParser(prog="nnunet_diffext", description="Plug-in methods for nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"nnunet_diffext {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        if name != verb:
            subparsers.add_parser(name, help=summary, add_help=False)
            continue
        import_module(f"nnunet_diffext.cli.{name}").add_parser(subparsers)
        subparsers.choices[name].add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: arguments without the program's name; default: those of the process.

    Returns:
        The exit code: 0, or 1 after an error or a failed check. Wrong arguments exit with 2 (argparse).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = next((a for a in argv if not a.startswith("-")), None)
    args = build_parser(verb).parse_args(argv)
    try:
        return import_module(f"nnunet_diffext.cli.{args.verb}").run(args)
    except USER_ERRORS as error:
        if args.debug:
            raise
        print(f"nnunet_diffext {args.verb}: error: {error or type(error).__name__}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
