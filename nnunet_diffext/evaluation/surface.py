"""Surface metrics of two masks, by MONAI: HD95, ASD and the normalised surface Dice (NSD).

Two families of surface exist, and they give different numbers for the same masks:
  * HD95 and ASD use voxels: those that a mask loses under one erosion by a 6-neighbourhood, all of equal weight.
    MONAI's default; medpy and MetricsReloaded agree with it.
  * NSD uses surface elements between the voxels' centres, weighted by their area in mm^2 (``use_subvoxels=True``), as
    in the definition by Nikolov et al. (2018) and its implementation, DeepMind's surface-distance. With voxels, thick
    slices would make every element count alike whatever its size, and a thin mask would be all surface.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

NSD_TOLERANCE_MM = 2.0


def surface_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], nsd_tolerance: float = NSD_TOLERANCE_MM
) -> dict[str, float]:
    """``hd95`` and ``asd`` in mm and ``nsd`` in [0, 1] of two boolean masks, 2D or 3D, neither of them empty.

    Args:
        prediction: boolean mask.
        reference: boolean mask of the same shape.
        spacing: voxel size in mm in the order of the array's axes.
        nsd_tolerance: distance in mm up to which a surface element counts as found.

    Raises:
        ValueError: the tolerance is negative or not finite.
    """
    # Here, not at the top: MONAI takes seconds to import and not every user of this module has surfaces to measure.
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    if not (np.isfinite(nsd_tolerance) and nsd_tolerance >= 0):
        raise ValueError(f"the NSD tolerance must be a distance in mm, not negative; got {nsd_tolerance}")
    box = _crop_to_union(prediction, reference)
    pred, ref = (torch.from_numpy(np.ascontiguousarray(m[box]))[None, None].float() for m in (prediction, reference))
    options = {"include_background": True, "spacing": [float(s) for s in spacing]}
    with warnings.catch_warnings():
        # MONAI 1.6 passes itself an argument that it has deprecated.
        warnings.filterwarnings("ignore", message=".*get_mask_edges", category=FutureWarning)
        hd95 = compute_hausdorff_distance(pred, ref, percentile=95, **options)
        asd = compute_average_surface_distance(pred, ref, symmetric=True, **options)
        nsd = compute_surface_dice(pred, ref, [float(nsd_tolerance)], use_subvoxels=True, **options)
    return {"hd95": float(hd95), "asd": float(asd), "nsd": float(nsd)}


def _crop_to_union(prediction: np.ndarray, reference: np.ndarray) -> tuple[slice, ...]:
    """Bounding box of the union of two masks that are not both empty."""
    union = prediction | reference
    axes = range(union.ndim)
    extents = [np.flatnonzero(union.any(axis=tuple(a for a in axes if a != axis))) for axis in axes]
    return tuple(slice(int(e[0]), int(e[-1]) + 1) for e in extents)
