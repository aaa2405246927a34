"""A dataset that nnU-Net has planned, as a test sees it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUMBER, NAME = 961, "Dataset961_Plan"
TRAINING_CASES = 40
SHAPE, SPACING = (24, 32, 32), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Planned:
    """A dataset that nnU-Net has planned; a test may change its files."""

    raw: Path
    folder: Path

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())

    def write(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(content))

    def add_cascade(self) -> None:
        """Give the plans a low-resolution stage and a cascade, as nnU-Net writes them."""
        plans = self.read("nnUNetPlans")
        full = plans["configurations"]["3d_fullres"]
        lowres = {**full, "data_identifier": "nnUNetPlans_3d_lowres", "next_stage": "3d_cascade_fullres"}
        plans["configurations"]["3d_lowres"] = lowres
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        self.write("nnUNetPlans", plans)
