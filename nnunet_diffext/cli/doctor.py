"""Check the installation, and say what to do about every problem."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from nnunet_diffext.cli._checks import ALL_CHECKS, Check


def examine() -> list[Check]:
    """The findings of all checks, in the order in which problems are best solved."""
    return [finding for check in ALL_CHECKS for finding in check()]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        description="Check versions, nnU-Net's folders, discovery of the trainers, device, disk and processes. "
        "Exit code 1 if a check fails; warnings do not count.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if one of them is a failure."""
    findings = examine()
    failed = sum(f.status == "fail" for f in findings)
    if args.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(f) for f in findings]}, indent=2))
        return int(failed > 0)
    for finding in findings:
        print(f"{'[' + finding.status + ']':<6} {finding.name}: {finding.message}")
        if finding.remedy:
            print(f"       -> {finding.remedy}")
    warned = sum(f.status == "warn" for f in findings)
    print(f"\n{failed} failed, {warned} warning(s), {len(findings) - failed - warned} ok")
    return int(failed > 0)
