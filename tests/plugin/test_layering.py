"""Imports run downwards only, and the mathematical layers depend on torch alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "nnunet_diffext"

# From the bottom to the top. A component may import from its own row and from those before it.
LAYERS = (
    {"", "settings", "variants", "files"},  # "" is the package itself: __version__
    {"diffusion"},
    {"networks"},
    {"losses"},
    {"data", "stages", "checkpoints", "pretrained"},
    {"inference", "evaluation"},
    {"trainers", "planners"},
    {"demo", "report"},
    {"cli", "ext_trainers"},
)
RANK = {component: rank for rank, row in enumerate(LAYERS) for component in row}
ALLOWED_PACKAGES = {
    "diffusion": {"torch"},
    "networks": {"torch", "dynamic_network_architectures"},
    "losses": {"torch", "dynamic_network_architectures"},
}


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the distribution: its dotted name and its file."""
    for folder in (PACKAGE, "trainers", "planners"):
        package = PACKAGE if folder == PACKAGE else f"{PACKAGE}.{folder}"
        for file in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = file.relative_to(REPOSITORY / folder).with_suffix("").parts
            yield ".".join([package, *parts]), file


def imported(module: str, source: str) -> Iterator[str]:
    """Dotted names that a module imports anywhere in its text, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(module.split(".")[: -node.level]) + "." if node.level else ""
            origin = (start + (node.module or "")).rstrip(".")
            # "from nnunet_diffext import trainers" reaches the component trainers.
            yield from (f"{origin}.{alias.name}" for alias in node.names) if origin == PACKAGE else (origin,)


def component(dotted: str) -> str:
    """``nnunet_diffext.losses.dice`` -> ``losses``; a plain attribute of the package -> the empty string."""
    name = (dotted.split(".") + [""])[1]
    return name if name in RANK else ""


def violations(module: str, source: str) -> list[str]:
    """What a module imports although it must not."""
    own = component(module)
    found = []
    for name in imported(module, source):
        root = name.split(".")[0]
        if root == PACKAGE:
            if RANK[component(name)] > RANK[own]:
                found.append(f"{module} imports {name}, which lies above it")
        elif own in ALLOWED_PACKAGES and root not in ALLOWED_PACKAGES[own] and root not in sys.stdlib_module_names:
            found.append(f"{module} imports {name}; {own}/ may import {sorted(ALLOWED_PACKAGES[own])} only")
    return found


def test_imports_run_downwards() -> None:
    modules = list(sources())
    assert len(modules) > 10
    assert [v for module, file in modules for v in violations(module, file.read_text(encoding="utf-8"))] == []


def test_every_component_has_a_layer() -> None:
    components = {(module.removesuffix(".__init__").split(".") + [""])[1] for module, _ in sources()} - {"__init__"}
    assert components - set(RANK) == set(), "name its layer in LAYERS"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses.dice", "from nnunet_diffext.trainers import TRAINERS"),
        ("losses.dice", "from nnunet_diffext import trainers"),
        ("losses.dice", "from ..trainers import base"),
        ("losses.dice", "import nnunet_diffext.cli.main"),
        ("diffusion.schedules", "def f():\n    from nnunetv2.paths import nnUNet_raw"),
        ("diffusion.schedules", "import dynamic_network_architectures"),
        ("networks.blocks.time", "from nnunet_diffext.losses import dice"),
        ("networks.blocks.time", "from ...losses import dice"),
        ("settings", "import nnunet_diffext.diffusion"),
    ],
)
def test_the_scan_sees_a_violation(module: str, source: str) -> None:
    assert len(violations(f"{PACKAGE}.{module}", source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cli.main", "from nnunet_diffext import __version__\nimport nnunetv2"),
        ("losses.dice", "import math\nimport torch\nfrom .schedules import ramp\nfrom ..diffusion import LabelSpace"),
        ("trainers.dmed", "from nnunet_diffext.losses import dice\nfrom nnunet_diffext.trainers import base"),
    ],
)
def test_the_scan_lets_the_rest_pass(module: str, source: str) -> None:
    assert violations(f"{PACKAGE}.{module}", source) == []
