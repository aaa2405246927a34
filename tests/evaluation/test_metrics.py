"""Metrics against distances known by construction and against an independent implementation."""

import math

import numpy as np
import pytest

from nnunet_diffext.evaluation.metrics import METRICS, implementation, mask_metrics

SPACING = (5.0, 0.8, 0.5)


def cube(shape, start, stop):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


def ellipsoid(shape, centre, radii):
    grid = np.ogrid[tuple(slice(0, n) for n in shape)]
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) <= 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shifted_plane_is_its_distance_in_mm(axis):
    # A plane one voxel thick through the whole image: every point of one is exactly `shift` voxels from the other.
    shift = 3
    planes = []
    for position in (2, 2 + shift):
        mask = np.zeros((12, 13, 14), dtype=bool)
        mask[(slice(None),) * axis + (position,)] = True
        planes.append(mask)
    result = mask_metrics(*planes, SPACING)
    assert result["dice"] == 0 and result["jaccard"] == 0
    assert result["hd95"] == pytest.approx(shift * SPACING[axis], rel=1e-6)
    assert result["asd"] == pytest.approx(shift * SPACING[axis], rel=1e-6)


def test_shifted_cube_overlap_and_asd_in_one_dimension():
    # Two lines of 10 voxels along x, shifted by 4, so 2D images one voxel high: all voxels are surface.
    a, b = cube((1, 20), (0, 0), (1, 10)), cube((1, 20), (0, 4), (1, 14))
    result = mask_metrics(a, b, (1.0, 2.0))
    assert result["dice"] == pytest.approx(12 / 20)
    assert result["jaccard"] == pytest.approx(6 / 14)
    # Distances of each line's voxels to the other: 4, 3, 2, 1 voxels outside, 0 for the 6 inside; 2 mm each.
    assert result["asd"] == pytest.approx(2 * (4 + 3 + 2 + 1) / 10)
    assert result["hd95"] == pytest.approx(2 * np.quantile([4, 3, 2, 1] + [0] * 6, 0.95))


def test_concentric_spheres_are_their_difference_of_radii_apart():
    shape, centre = (61, 61, 61), (30, 30, 30)
    result = mask_metrics(ellipsoid(shape, centre, (20,) * 3), ellipsoid(shape, centre, (26,) * 3), (1.0, 1.0, 1.0))
    # The digital surface of either sphere is at most one voxel diagonal off the ideal one.
    assert abs(result["asd"] - 6) < 0.5
    assert abs(result["hd95"] - 6) < 1
    volume = (20 / 26) ** 3
    assert result["dice"] == pytest.approx(2 * volume / (1 + volume), abs=0.005)


def test_result_does_not_depend_on_what_surrounds_the_masks():
    a, b = ellipsoid((20, 30, 30), (9, 14, 15), (5, 8, 9)), ellipsoid((20, 30, 30), (10, 16, 15), (5, 9, 8))
    padded = [np.pad(m, ((4, 9), (20, 3), (1, 17))) for m in (a, b)]
    result = mask_metrics(a, b, SPACING)
    assert mask_metrics(*padded, SPACING) == result
    assert set(result) == set(METRICS) and 0 < result["nsd"] < 1


def test_swapping_prediction_and_reference_changes_only_the_volumes():
    a, b = cube((20, 30, 30), (3, 4, 5), (12, 20, 21)), ellipsoid((20, 30, 30), (10, 16, 15), (5, 9, 8))
    one, other = mask_metrics(a, b, SPACING), mask_metrics(b, a, SPACING)
    for metric in ("dice", "jaccard", "hd95", "asd", "nsd"):
        assert one[metric] == pytest.approx(other[metric]), metric
    assert one["volume_pred_ml"] == other["volume_ref_ml"] != one["volume_ref_ml"]


def test_hd95_agrees_with_surface_distance_package():
    surface_distance = pytest.importorskip("surface_distance")
    # Isotropic and smooth, where the two definitions of a surface must agree to within a voxel's diagonal.
    shape = (48, 48, 48)
    for other in (((24, 24, 30), (15, 11, 12)), ((20, 28, 25), (9, 14, 17))):
        a, b = ellipsoid(shape, (24, 24, 24), (14, 12, 13)), ellipsoid(shape, *other)
        distances = surface_distance.compute_surface_distances(b, a, (1.0, 1.0, 1.0))
        oracle = surface_distance.compute_robust_hausdorff(distances, 95)
        assert abs(mask_metrics(a, b, (1.0, 1.0, 1.0))["hd95"] - oracle) < 1
        assert oracle > 3  # the comparison means nothing for surfaces that coincide


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.8, 0.8)])
@pytest.mark.parametrize("tolerance", [0.5, 1.0, 2.0, 4.0])
def test_nsd_agrees_with_surface_distance_package(spacing, tolerance):
    surface_distance = pytest.importorskip("surface_distance")
    shape = (16, 40, 40)
    a, b = ellipsoid(shape, (7, 19, 20), (5, 13, 12)), ellipsoid(shape, (8, 21, 18), (5, 11, 14))
    oracle = surface_distance.compute_surface_dice_at_tolerance(
        surface_distance.compute_surface_distances(b, a, spacing), tolerance
    )
    assert mask_metrics(a, b, spacing, nsd_tolerance=tolerance)["nsd"] == pytest.approx(oracle, abs=1e-5)
    assert 0.05 < oracle < 1


def test_hd95_is_of_the_voxel_family_and_nsd_of_the_area_family():
    # HD95: every boundary voxel counts as one. surface-distance: every surface element counts by its area, and with
    # slices of 5 mm the sides of an ellipsoid have much more area per voxel than its top, so the 95th percentiles of
    # the same masks are not the same distance. NSD follows the second definition.
    surface_distance = pytest.importorskip("surface_distance")
    a, b = ellipsoid((24, 40, 40), (11, 19, 20), (8, 14, 14)), ellipsoid((24, 40, 40), (12, 20, 18), (8, 12, 15))
    spacing = (5.0, 0.8, 0.8)
    oracle = surface_distance.compute_surface_distances(b, a, spacing)
    result = mask_metrics(a, b, spacing)
    assert result["nsd"] == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(oracle, 2.0), abs=1e-5)
    by_area = surface_distance.compute_robust_hausdorff(oracle, 95)
    assert 0.01 < abs(result["hd95"] - by_area) < 5, "another definition, but within a slice's thickness"


def test_nsd_of_a_shifted_plane_is_a_step_at_the_shift():
    planes = [cube((20, 20, 20), (5, 0, 0), (10, 20, 20)), cube((20, 20, 20), (7, 0, 0), (12, 20, 20))]
    spacing = (2.0, 1.0, 1.0)
    # Both faces are 4 mm off; the rim at the image's border is shared up to that distance.
    below, above = (mask_metrics(*planes, spacing, nsd_tolerance=t)["nsd"] for t in (3.9, 4.1))
    assert above == 1 and 0 < below < 0.7


def test_volumes_use_the_spacing_and_the_error_is_signed():
    a, b = cube((8, 9, 10), (1, 1, 1), (3, 5, 6)), cube((8, 9, 10), (1, 1, 1), (5, 5, 6))
    result = mask_metrics(a, b, SPACING)
    assert result["volume_pred_ml"] == pytest.approx(40 * 5 * 0.8 * 0.5 / 1000)
    assert result["volume_ref_ml"] == pytest.approx(80 * 5 * 0.8 * 0.5 / 1000)
    assert result["volume_error"] == pytest.approx(-0.5)
    assert mask_metrics(b, a, SPACING)["volume_error"] == pytest.approx(1.0)
    flat = mask_metrics(a[1], b[1], SPACING[1:])
    assert math.isnan(flat["volume_pred_ml"]) and flat["volume_error"] == 0


def test_spacing_is_in_the_order_of_the_axes():
    a, b = cube((16, 16, 16), (4, 4, 4), (8, 8, 8)), cube((16, 16, 16), (6, 4, 4), (10, 8, 8))
    assert mask_metrics(a, b, (3.0, 1.0, 1.0))["hd95"] > mask_metrics(a, b, (1.0, 1.0, 3.0))["hd95"]
    assert mask_metrics(a, b, (3.0, 1.0, 1.0))["nsd"] < mask_metrics(a, b, (1.0, 1.0, 3.0))["nsd"]


def test_tolerance_is_part_of_the_stated_implementation():
    assert "tolerance 2 mm" in implementation() and "tolerance 0.5 mm" in implementation(0.5)
    with pytest.raises(ValueError, match="not negative"):
        a = cube((5, 6, 7), (1, 1, 1), (3, 3, 3))
        mask_metrics(a, a, SPACING, nsd_tolerance=-1.0)


def test_both_empty_is_nan_and_no_volume():
    empty = np.zeros((5, 6, 7), dtype=bool)
    result = mask_metrics(empty, empty, SPACING)
    assert result.pop("volume_pred_ml") == result.pop("volume_ref_ml") == 0
    assert len(result) == 6 and all(math.isnan(v) for v in result.values())


@pytest.mark.parametrize("swap", [False, True])
def test_one_empty_is_dice_zero_and_undefined_surface(swap):
    masks = [np.zeros((5, 6, 7), dtype=bool), cube((5, 6, 7), (1, 1, 1), (3, 3, 3))]
    result = mask_metrics(*(masks[::-1] if swap else masks), SPACING)
    assert result["dice"] == result["jaccard"] == result["nsd"] == 0
    assert math.isnan(result["hd95"]) and math.isnan(result["asd"])
    reference_empty = swap
    assert math.isnan(result["volume_error"]) if reference_empty else result["volume_error"] == -1


def test_ignored_voxels_count_for_nothing():
    reference = cube((8, 8, 8), (2, 2, 2), (6, 6, 6))
    prediction = reference.copy()
    prediction[:, :, 7] = True
    assert mask_metrics(prediction, reference, SPACING)["dice"] < 1
    ignore = np.zeros(reference.shape, dtype=bool)
    ignore[:, :, 7] = True
    volume = pytest.approx(64 * 5 * 0.8 * 0.5 / 1000)
    perfect = {"dice": 1.0, "jaccard": 1.0, "hd95": 0.0, "asd": 0.0, "nsd": 1.0, "volume_error": 0.0}
    result = mask_metrics(prediction, reference, SPACING, ignore)
    assert result == {**perfect, "volume_pred_ml": volume, "volume_ref_ml": volume}
