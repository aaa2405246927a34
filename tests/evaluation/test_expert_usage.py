"""Which experts are used: counted by hand, written as valid JSON, drawn, and a starving one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import Tensor

from nnunet_diffext.evaluation.expert_usage import ExpertUsage
from nnunet_diffext.networks.blocks.experts import Gate


def gate(*weights: tuple[float, ...]) -> Gate:
    """A layer that gave every sample these weights."""
    load = torch.tensor(weights)
    return Gate(load, load)


def modality(*indices: int) -> Tensor:
    return torch.tensor(indices)


def written(usage: ExpertUsage, folder: Path, epoch: int = 3) -> dict[str, Any]:
    usage.save(folder, epoch)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / "expert_usage.json").read_text(), parse_constant=refuse)


def test_means_by_hand(tmp_path: Path) -> None:
    """Over the samples of a modality, however they were spread over batches."""
    usage = ExpertUsage(("CT", "MR"), 2)
    usage.add([gate((0.8, 0.2), (0.4, 0.6))], [gate((1.0, 0.0), (0.0, 1.0))], modality(0, 1))
    usage.add([gate((0.2, 0.8), (0.6, 0.4))], [gate((0.5, 0.5), (0.5, 0.5))], modality(0, 0))
    content = written(usage, tmp_path)
    assert content["layers"] == ["encoder 0", "decoder 0"] and content["experts"] == 2 and content["epoch"] == 3
    ct, mr = content["usage"]["CT"], content["usage"]["MR"]
    assert ct[0] == pytest.approx([1.6 / 3, 1.4 / 3], abs=1e-5) and ct[1] == pytest.approx([2 / 3, 1 / 3], abs=1e-5)
    assert mr == [[0.4, 0.6], [0.0, 1.0]]


def test_modality_that_was_told() -> None:
    """The third of four samples is taken for CT; also where there are no gates over experts."""
    usage = ExpertUsage(("CT", "MR"), 3)
    usage.add([gate((0.1, 0.8, 0.1), (0.8, 0.1, 0.1))], [], modality(0, 1), torch.tensor([[-0.1, -3], [-4, -0.1]]))
    assert usage.told == 1
    usage.add([], [], modality(1, 0), torch.tensor([[-0.1, -3], [-0.1, -3]]))
    assert usage.told == 0.75
    empty = ExpertUsage(("CT", "MR"), 3)
    empty.add([], [], modality(1, 0), torch.tensor([[-0.1, -3], [-0.1, -3]]))
    assert empty.empty and empty.told == 0.5


def test_where_nothing_tells_the_modality(tmp_path: Path) -> None:
    """Which is no number."""
    usage = ExpertUsage(("CT", "MR"), 2)
    usage.add([], [gate((0.5, 0.5))], modality(0))
    content = written(usage, tmp_path)
    assert content["told"] is None and content["layers"] == ["decoder 0"]


def test_modality_that_was_not_seen(tmp_path: Path) -> None:
    usage = ExpertUsage(("CT", "MR"), 2)
    usage.add([gate((0.5, 0.5))], [], modality(1))
    assert list(written(usage, tmp_path)["usage"]) == ["MR"]


def test_nothing_was_added() -> None:
    usage = ExpertUsage(("CT",), 3)
    assert usage.empty and list(usage.starved()) == []


def test_starving_experts() -> None:
    """In most layers, over all modalities: a specialist of one modality does not starve."""
    usage = ExpertUsage(("CT", "MR"), 3)
    starving, fed = (0.5, 0.499, 0.001), (0.4, 0.3, 0.3)
    usage.add([gate(starving, starving), gate(starving, starving)], [gate(fed, fed)], modality(0, 1))
    ((expert, line),) = usage.starved()
    assert expert == 2
    assert line.startswith("expert 2 gets less than 3.3% of the weight in 2 of 3 layers") and "balance0p01" in line
    switched_off = ExpertUsage(("CT", "MR"), 3, inactive=[2])
    switched_off.add([gate(starving, starving)], [], modality(0, 1))
    assert list(switched_off.starved()) == [], "nothing could feed it"
    usage = ExpertUsage(("CT", "MR"), 2)
    usage.add([gate((1.0, 0.0), (0.0, 1.0))], [], modality(0, 1))
    assert list(usage.starved()) == []
    usage.add([gate(*[(1.0, 0.0)] * 60)], [], modality(*[0] * 60))
    assert list(usage.starved()) == [], "MR is rare, but it uses its expert"
    usage = ExpertUsage(("CT", "MR"), 2)
    usage.add([gate((1.0, 0.0), (1.0, 0.0))], [], modality(0, 1))
    assert [line[:16] for _, line in usage.starved()] == ["expert 1 (of MR)"]


def test_half_of_the_layers_are_not_most() -> None:
    usage = ExpertUsage(("CT",), 2)
    usage.add([gate((1.0, 0.0)), gate((0.5, 0.5))], [], modality(0))
    assert list(usage.starved()) == []


def test_picture(tmp_path: Path) -> None:
    """A panel per modality, also for one that was not seen; larger with more layers."""
    heights = []
    for layers in (2, 8):
        usage = ExpertUsage(("CT", "MR", "US"), 3)
        usage.add([gate((0.7, 0.2, 0.1), (0.1, 0.8, 0.1))] * layers, [], modality(0, 1))
        usage.save(tmp_path, 0)
        picture = matplotlib.image.imread(tmp_path / "expert_usage.png")
        assert picture.ndim == 3 and picture[..., :3].std() > 0.05
        heights.append(len(picture))
    assert heights[1] > heights[0]


def test_gradients_and_half_precision_are_let_go() -> None:
    usage = ExpertUsage(("CT",), 2)
    layer = gate((0.5, 0.5))
    usage.add([Gate(layer.mean.requires_grad_(), layer.load.half())], [], modality(0))
    assert usage.mean().dtype == torch.float32 and not usage.mean().requires_grad
