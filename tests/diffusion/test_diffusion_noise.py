"""Seeded and mirrored noise."""

import itertools

import pytest
import torch

from nnunet_diffext.diffusion import gaussian_noise, seeded_noise


def test_same_seed_same_noise_and_global_state_untouched():
    before = torch.get_rng_state()
    first = seeded_noise((2, 3, 4, 5), 11)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(7)
    assert torch.equal(seeded_noise((2, 3, 4, 5), 11), first)
    assert not torch.equal(seeded_noise((2, 3, 4, 5), 12), first)
    assert first.dtype == torch.float32


def test_same_noise_with_any_number_of_threads():
    threads = torch.get_num_threads()
    reference = seeded_noise((1, 2, 40, 40, 40), 0)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(seeded_noise((1, 2, 40, 40, 40), 0), reference)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_same_numbers(dtype):
    assert torch.equal(seeded_noise((5, 5), 3, dtype=dtype), seeded_noise((5, 5), 3).to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_same_noise_on_cuda():
    noise = seeded_noise((2, 3, 8, 8), 1, device="cuda", mirror_axes=(2, 3))
    assert noise.device.type == "cuda"
    assert torch.equal(noise.cpu(), seeded_noise((2, 3, 8, 8), 1, mirror_axes=(2, 3)))


@pytest.mark.parametrize("shape", [(1, 2, 6, 5), (2, 1, 4, 7, 3), (1, 1, 1, 2)])
def test_mirror_symmetry_and_nothing_else(shape):
    axes = tuple(range(2, len(shape)))
    noise = seeded_noise(shape, 5, mirror_axes=axes)
    assert noise.shape == shape
    for count in range(1, len(axes) + 1):
        for flipped in itertools.combinations(axes, count):
            assert torch.equal(noise.flip(flipped), noise)
    # Every independent voxel differs from every other one.
    independent = shape[0] * shape[1]
    for axis in axes:
        independent *= (shape[axis] + 1) // 2
    assert noise.unique().numel() == independent


def test_unmirrored_axes_are_not_symmetric():
    noise = seeded_noise((1, 1, 6, 6), 5, mirror_axes=(2,))
    assert torch.equal(noise.flip(2), noise) and not torch.equal(noise.flip(3), noise)
    assert torch.equal(seeded_noise((1, 1, 6, 6), 5, mirror_axes=(-2,)), noise)


@pytest.mark.parametrize("axes", [(), (2, 3), (2, 3, 4)])
def test_standard_normal(axes):
    noise = seeded_noise((2, 2, 64, 63, 62), 0, mirror_axes=axes).double()
    independent = noise.unique().numel()
    assert abs(noise.mean()) < 4 / independent**0.5
    assert noise.var().item() == pytest.approx(1, abs=4 * (2 / independent) ** 0.5)
    # Away from the mirror planes neighbours are independent.
    assert (noise[:, :, 1:20] * noise[:, :, :19]).mean().abs() < 0.02


def test_gaussian_noise_uses_the_given_generator():
    generator = torch.Generator().manual_seed(4)
    first, second = (gaussian_noise((3, 3), generator=generator) for _ in range(2))
    assert torch.equal(first, seeded_noise((3, 3), 4)) and not torch.equal(first, second)


@pytest.mark.parametrize("axes", [(2, 2), (2, -2), (4,), (-5,)])
def test_impossible_axes(axes):
    with pytest.raises(ValueError, match="distinct dimensions"):
        seeded_noise((1, 1, 4, 4), 0, mirror_axes=axes)
