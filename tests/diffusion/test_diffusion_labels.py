"""LabelSpace: round trips, probabilities, entropy."""

import math
import pickle

import pytest
import torch

from nnunet_diffext.diffusion import LabelSpace

SPATIAL = [(6, 5), (4, 3, 5)]
DTYPES = [torch.float32, torch.int16, torch.int64, torch.uint8]


def labels_target(space, spatial, dtype=torch.float32):
    values = list(range(space.num_heads)) + ([] if space.ignore_label is None else [space.ignore_label])
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (2, 1, *spatial), generator=generator)
    return torch.tensor(values)[index].to(dtype)


def regions_target(space, spatial, dtype=torch.bool):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, space.target_channels, *spatial, generator=generator) > 0.6
    if space.ignore_label is not None:
        target[:, :-1] &= ~target[:, -1:]  # an ignored voxel is in no region
    return target.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignore", [None, 4])
@pytest.mark.parametrize("spatial", SPATIAL)
def test_label_round_trip(spatial, ignore, dtype):
    space = LabelSpace(4, ignore_label=ignore)
    target = labels_target(space, spatial, dtype)
    onehot, valid = space.encode(target, check=True)
    assert onehot.shape == (2, 4, *spatial) and onehot.dtype == torch.float32
    assert valid.shape == (2, 1, *spatial) and valid.dtype == torch.bool
    assert torch.equal(valid, target != 4) and (ignore is None) == bool(valid.all())
    assert torch.equal(onehot.sum(1, keepdim=True), valid.float())
    assert torch.equal(space.decode(onehot, valid if ignore else None).to(dtype), target)
    assert torch.equal(space.from_diffusion(space.to_diffusion(onehot)), onehot)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int16])
@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("spatial", SPATIAL)
def test_region_round_trip(spatial, ignore, dtype):
    space = LabelSpace(3, regions=True, ignore_label=ignore)
    target = regions_target(space, spatial, dtype)
    onehot, valid = space.encode(target, check=True)
    assert onehot.shape == (2, 3, *spatial) and onehot.dtype == torch.float32
    assert valid.shape == (2, 1, *spatial) and valid.dtype == torch.bool
    assert torch.equal(onehot, target[:, :3].float())
    assert torch.equal(space.decode(onehot, valid if ignore else None).to(dtype), target)


def test_ignored_voxels_are_all_zero_even_inside_a_region():
    space = LabelSpace(2, regions=True, ignore_label=9)
    target = torch.ones(1, 3, 2, 2, dtype=torch.bool)
    onehot, valid = space.encode(target)
    assert not valid.any() and not onehot.any()
    decoded = space.decode(onehot)
    assert decoded.shape == (1, 3, 2, 2) and not decoded.any(), "no ignore mask without `valid`"


def test_nnunet_region_targets_are_accepted():
    """A target made by nnU-Net's own transform."""
    transforms = pytest.importorskip("batchgeneratorsv2.transforms.utils.seg_to_regions")
    segmentation = torch.tensor([[0, 1, 2, 3]], dtype=torch.int16).view(1, 2, 2)
    to_regions = transforms.ConvertSegmentationToRegionsTransform(regions=[(1, 2), 2, 3], channel_in_seg=0)
    target = to_regions._apply_to_segmentation(segmentation)[None]
    onehot, valid = LabelSpace(2, regions=True, ignore_label=3).encode(target, check=True)
    assert onehot[0].tolist() == [[[0, 1], [1, 0]], [[0, 0], [1, 0]]]
    assert valid[0].tolist() == [[[True, True], [True, False]]]


@pytest.mark.parametrize(
    "space, target, message",
    [
        (LabelSpace(3), torch.tensor([0.0, 1, 2, 5, -1]), r"values \[-1.0, 5.0\]; allowed are \[0, 1, 2\]"),
        (LabelSpace(2, ignore_label=7), torch.tensor([0, 1, 7, 3, 2]), r"values \[2, 3\]; allowed are \[0, 1, 7\]"),
        (LabelSpace(1, regions=True), torch.tensor([0.0, 1, 0.5, 0, 1]), r"values \[0.5\]; allowed are \[0, 1\]"),
    ],
)
def test_unknown_labels_are_named_when_checked(space, target, message):
    with pytest.raises(ValueError, match=message):
        space.encode(target.view(1, 1, -1), check=True)
    space.encode(target.view(1, 1, -1))


@pytest.mark.parametrize(
    "space, channels",
    [(LabelSpace(3), 3), (LabelSpace(3, regions=True), 1), (LabelSpace(3, True, 4), 3), (LabelSpace(3, True), 4)],
)
def test_wrong_number_of_channels(space, channels):
    with pytest.raises(ValueError, match=rf"\(B, {space.target_channels}, \*spatial\).*\(2, {channels}, 4, 4\)"):
        space.encode(torch.zeros(2, channels, 4, 4))


def test_impossible_spaces():
    with pytest.raises(ValueError, match="num_heads >= 2, got 1"):
        LabelSpace(1)
    with pytest.raises(ValueError, match="num_heads >= 1, got 0"):
        LabelSpace(0, regions=True)
    with pytest.raises(ValueError, match="ignore_label=1 is one of the classes"):
        LabelSpace(3, ignore_label=1)
    with pytest.raises(ValueError, match="no ignore label"):
        LabelSpace(2).decode(torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 3, 3, dtype=torch.bool))


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_diffusion_range(scale):
    space = LabelSpace(2)
    x = space.to_diffusion(torch.tensor([[0.0, 0.5, 1.0]]), scale)
    torch.testing.assert_close(x, torch.tensor([[-scale, 0.0, scale]]))
    beyond = torch.tensor([-2 * scale, -scale, 0.5 * scale, scale, 3 * scale])
    torch.testing.assert_close(space.from_diffusion(beyond, scale), torch.tensor([0.0, 0.0, 0.75, 1.0, 1.0]))


@pytest.mark.parametrize("regions", [False, True])
def test_probabilities_and_their_inverse(regions):
    space = LabelSpace(4, regions=regions)
    logits = torch.randn(2, 4, 3, 4, generator=torch.Generator().manual_seed(0)) * 4
    probabilities = space.probabilities(logits)
    reference = logits.sigmoid() if regions else logits.softmax(1)
    torch.testing.assert_close(probabilities, reference)
    torch.testing.assert_close(
        space.probabilities(space.log_probabilities(probabilities)), probabilities, atol=1e-6, rtol=0
    )
    assert space.probabilities(logits.half()).dtype == torch.float32
    torch.testing.assert_close(space.probabilities(logits.half()), reference, atol=2e-3, rtol=0)


@pytest.mark.parametrize("regions", [False, True])
def test_certain_probabilities_have_finite_logits(regions):
    space = LabelSpace(3, regions=regions)
    onehot = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 2, 2)
    logits = space.log_probabilities(onehot.half())
    # nnU-Net sums 10 * logits in half precision (largest number 65504) over overlapping tiles.
    assert torch.isfinite(logits).all() and logits.abs().max() <= 16.2
    torch.testing.assert_close(space.probabilities(logits), onehot, atol=1e-6, rtol=0)


def test_harden():
    probabilities = torch.tensor([0.2, 0.5, 0.3]).view(1, 3, 1, 1)
    assert LabelSpace(3).harden(probabilities).flatten().tolist() == [0, 1, 0]
    regions = torch.tensor([0.2, 0.51, 0.9]).view(1, 3, 1, 1)
    assert LabelSpace(3, regions=True).harden(regions).flatten().tolist() == [0, 1, 1]
    onehot, _ = LabelSpace(4).encode(labels_target(LabelSpace(4), (3, 4, 5)))
    assert torch.equal(LabelSpace(4).harden(onehot), onehot)


@pytest.mark.parametrize("regions", [False, True])
def test_normalized_entropy(regions):
    space = LabelSpace(3, regions=regions)
    voxels = torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.5], [0.7, 0.2, 0.1]])
    entropy = space.normalized_entropy(voxels.T.reshape(1, 3, 2, 2)).flatten().tolist()

    def h(*p):
        return -sum(q * math.log(q) for q in p if q > 0)

    def mean_binary(*p):
        return sum(h(q, 1 - q) for q in p) / len(p) / math.log(2)

    assert entropy[0] == pytest.approx(0, abs=1e-7)
    if regions:
        assert entropy[1:] == pytest.approx([mean_binary(1 / 3), 1, mean_binary(0.7, 0.2, 0.1)], rel=1e-6)
    else:
        assert [entropy[1], entropy[3]] == pytest.approx([1, h(0.7, 0.2, 0.1) / math.log(3)], rel=1e-6)
    assert max(entropy) <= 1


@pytest.mark.parametrize("regions", [False, True])
def test_entropy_of_certain_logits_has_finite_gradient(regions):
    space = LabelSpace(2, regions=regions)
    logits = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).requires_grad_()
    space.normalized_entropy(space.probabilities(logits)).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_pickle_and_equality():
    space = LabelSpace(3, ignore_label=3)
    assert pickle.loads(pickle.dumps(space)) == space
