"""Markup, choice of cases, and what is drawn of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from reported import Page

from nnunet_diffext.evaluation.task import Task
from nnunet_diffext.report.images import CaseImages
from nnunet_diffext.report.markup import Markup, breakable, element, table
from nnunet_diffext.report.pictures import draw_case, worst_slice
from nnunet_diffext.report.selection import best_and_worst


def row(case: str, *dice: float) -> dict:
    return {"case": case, "metrics": {str(i): {"Dice": d} for i, d in enumerate(dice)}}


def case_images(shape: tuple[int, ...], spacing: tuple[float, ...]) -> CaseImages:
    reference = np.zeros(shape, np.int16)
    return CaseImages(np.random.default_rng(0).normal(size=shape), reference, reference.copy(), None, spacing)


def task(labels: dict[str, tuple[int, ...]], ignore: int | None = None) -> Task:
    return Task(labels, {key: key for key in labels}, False, ignore, ".nii.gz", object)


def test_text_is_escaped_once_and_markup_never() -> None:
    inner = element("b", 'x<y & "z"', title='"><i>')
    assert inner == '<b title="&quot;&gt;&lt;i&gt;">x&lt;y &amp; &quot;z&quot;</b>'
    assert element("p", inner, None, 3) == f"<p>{inner}3</p>"
    assert isinstance(breakable("a_<b>"), Markup) and breakable("a_<b>") == "a_<wbr>&lt;b&gt;"


def test_table_names_its_rows_and_columns() -> None:
    page = Page(table("what", ("", "a"), [("first", "1"), ("group",), ("second", "2")]))
    assert [a["scope"] for a in page.all("th")] == ["col", "col", "row", "colgroup", "row"]
    assert page.all("th")[3]["colspan"] == "2"


def test_no_case_is_both_best_and_worst() -> None:
    rows = [row("a", 0.9), row("b", 0.1, 0.3), row("c", 0.5, math.nan), row("d", math.nan)]
    best, worst = best_and_worst(rows, 2)
    assert ([r["case"] for r in best], [r["case"] for r in worst]) == (["a"], ["b", "c"])
    assert best_and_worst(rows[3:], 2) == ([], [])


@pytest.mark.parametrize(("spacing", "axis", "index"), [((3, 1, 1), 0, 4), ((1, 1, 3), 2, 7), ((1, 1, 1), 0, 4)])
def test_slice_with_most_errors_across_thick_slices(spacing: tuple[float, ...], axis: int, index: int) -> None:
    images = case_images((8, 10, 12), spacing)
    images.reference[4, 2:6, 7], images.reference[1, 1, 1] = 1, 1
    assert worst_slice(images, task({"1": (1,)}))[:2] == (axis, index)


def test_ignored_voxels_are_no_errors_and_without_errors_foreground_counts() -> None:
    images = case_images((4, 6, 6), (1, 1, 1))
    images.reference[0], images.reference[2, 1:4, 1:4] = 9, 1
    images.prediction[0], images.prediction[2, 1:4, 1:4] = 1, 1
    assert worst_slice(images, task({"1": (1,)}, ignore=9)) == (0, 2, 0), "that with most foreground"
    images.reference[0] = 0
    assert worst_slice(images, task({"1": (1,)}, ignore=9)) == (0, 0, 36)


@pytest.mark.parametrize("spacing", [(3.0, 1.0, 1.0), (1.0, 0.5, 2.0)])
def test_picture_has_the_aspect_of_the_body(spacing: tuple[float, ...]) -> None:
    import io

    from PIL import Image

    images = case_images((6, 30, 30), spacing)  # without foreground the whole slice is shown
    png, where = draw_case(images, task({"1": (1,)}))
    width, height = Image.open(io.BytesIO(png)).size
    size = [n * s for i, (n, s) in enumerate(zip((6, 30, 30), spacing, strict=True)) if i != int(np.argmax(spacing))]
    assert width / 2 / height == pytest.approx(min(max(size[1] / size[0], 0.5), 2.5), rel=0.02)
    assert "0 wrong voxels" in where


def test_outlines_are_drawn_where_the_masks_end() -> None:
    import io

    from PIL import Image

    images = case_images((1, 20, 20), (999.0, 1.0, 1.0))
    images.image[:] = 0
    images.reference[0, :, :10] = 1
    drawn = np.asarray(Image.open(io.BytesIO(draw_case(images, task({"1": (1,)}))[0])).convert("RGB")).astype(int)
    half = drawn[:, drawn.shape[1] // 2 :]
    blue = (half[..., 2] > 200) & (half[..., 0] < 120)
    columns = np.flatnonzero(blue[half.shape[0] // 2])
    assert columns.max() / half.shape[1] == pytest.approx(0.5, abs=0.03)
