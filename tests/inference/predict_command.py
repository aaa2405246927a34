"""``nnunet_diffext predict`` as the tests call it."""

from __future__ import annotations

from pathlib import Path

from nnunet_diffext.cli.main import main

HERE = ("-device", "cpu", "-npp", "0", "-nps", "0", "--disable_progress_bar", "--disable_tta", "-f", "0")


def command(model: Path, images: Path, out: Path, *more: str) -> int:
    """``nnunet_diffext predict``; its exit status."""
    return main(["predict", "-m", str(model), "-i", str(images), "-o", str(out), *HERE, *more])
