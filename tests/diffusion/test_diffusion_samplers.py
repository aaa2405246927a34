"""Samplers: their timesteps, diffusers as an oracle, autocast, seeds, gradients, errors."""

import pytest
import torch
from denoisers import SAMPLERS, BernoulliDenoiser, T, one_step_sampler, smooth_model

from nnunet_diffext.diffusion import (
    NoiseSchedule,
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    one_step,
    to_x0,
    trailing_timesteps,
)

# ---------------------------------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize(
    "timesteps, steps", [(1000, 1), (1000, 1000), (1000, 7), (1000, 300), (1000, 999), (10, 4), (1, 1)]
)
def test_trailing_timesteps(timesteps, steps):
    times = trailing_timesteps(timesteps, steps)
    assert len(times) == steps and times[0] == timesteps - 1 and times[-1] >= 0
    assert all(earlier > later for earlier, later in zip(times, times[1:], strict=False))
    gaps = [earlier - later for earlier, later in zip(times, [*times[1:], -1], strict=True)]
    assert max(gaps) - min(gaps) <= 1, "evenly spaced"


@pytest.mark.parametrize("power", [1.5, 3, 10])
@pytest.mark.parametrize("timesteps, steps", [(1000, 1), (1000, 10), (1000, 300), (1000, 1000), (7, 5), (2, 2)])
def test_a_power_spaces_the_steps(timesteps, steps, power):
    """Dense near T as far as the indices allow, strictly decreasing, none below 0."""
    times = trailing_timesteps(timesteps, steps, power)
    assert len(times) == steps and times[0] == timesteps - 1 and times[-1] >= 0
    assert all(a > b for a, b in zip(times, times[1:], strict=False))
    for k, (t, even) in enumerate(zip(times, trailing_timesteps(timesteps, steps), strict=True)):
        assert t >= even - 1  # rounding
        if times[k - 1] - t > 1 and k:
            assert t == round(timesteps * (1 - (k / steps) ** power)) - 1


def test_a_power_below_one_is_refused():
    with pytest.raises(ValueError, match="power"):
        trailing_timesteps(1000, 10, 0.5)


def test_trailing_timesteps_are_rounded_to_nearest():
    assert trailing_timesteps(1000, 10) == list(range(999, 0, -100))
    assert trailing_timesteps(1000, 7) == [999, 856, 713, 570, 428, 285, 142]  # round(1000 k / 7) - 1


def test_every_number_of_steps_is_strictly_decreasing():
    for timesteps in (1, 2, 17, 50):
        for steps in range(1, timesteps + 1):
            times = trailing_timesteps(timesteps, steps)
            assert times == sorted(set(times), reverse=True) and len(times) == steps


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_number_of_steps(steps):
    with pytest.raises(ValueError, match=rf"1 \.\. 1000.*{steps}"):
        trailing_timesteps(1000, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("name", [*SAMPLERS, "one_step"])
def test_model_calls_and_their_arguments(name, steps):
    if name == "one_step" and steps != 1:
        pytest.skip("one_step has one step")
    calls, seen = [], []

    def model(x, t):
        assert x.dtype == torch.float32 and x.shape == (3, 2, 4, 4) and t.dtype == torch.int64 and t.shape == (3,)
        calls.append(t.unique().tolist())
        return smooth_model(x, t)

    def callback(step, t, x_t, x0):
        seen.append((step, t))
        assert torch.equal(x0, smooth_model(x_t, torch.full((3,), t)))

    sampler = {**SAMPLERS, "one_step": one_step_sampler}[name]
    sampler(model, torch.randn(3, 2, 4, 4).double(), NoiseSchedule(), steps, callback=callback)
    assert calls == [[t] for t in trailing_timesteps(T, steps)]
    assert seen == list(enumerate(trailing_timesteps(T, steps)))


# ------------------------------------------------------------------------------------------------------ diffusers


def run_diffusers(scheduler, model, x, steps, **kwargs):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(x.shape[0])), t, x, **kwargs).prev_sample
    return x


DIFFUSERS_KIND = {"x0": "sample", "v": "v_prediction", "eps": "epsilon"}


# Ours keeps coefficients in double, theirs in float32; steps divide T, as their DDIM's previous index needs.
@pytest.mark.parametrize("steps", [1, 4, 10, 50])
@pytest.mark.parametrize("kind, zero_snr", [("x0", False), ("x0", True), ("v", False), ("v", True), ("eps", False)])
@pytest.mark.parametrize("name", ["ddim", "ddim_eta", "ddpm", "dpm"])
def test_samplers_match_diffusers(name, kind, zero_snr, steps):
    diffusers = pytest.importorskip("diffusers")
    common = dict(
        num_train_timesteps=T,
        beta_schedule="linear",
        prediction_type=DIFFUSERS_KIND[kind],
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_snr,
    )
    schedule = NoiseSchedule("linear", T, zero_snr)
    x_T = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    if name == "dpm":
        if zero_snr:
            pytest.skip("diffusers replaces the terminal 0 by 2**-24")
        scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **common)
        expected = run_diffusers(scheduler, smooth_model, x_T, steps)
        actual = dpm_solver_pp_2m(smooth_model, x_T, schedule, steps, kind=kind)
    elif name == "ddpm":
        scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_small", **common)
        expected = run_diffusers(scheduler, smooth_model, x_T, steps, generator=theirs)
        actual = ddpm(smooth_model, x_T, schedule, steps, kind=kind, generator=ours)
    else:
        eta = 0.5 if name == "ddim_eta" else 0.0
        scheduler = diffusers.DDIMScheduler(clip_sample=False, **common)
        expected = run_diffusers(scheduler, smooth_model, x_T, steps, eta=eta, generator=theirs)
        actual = ddim(smooth_model, x_T, schedule, steps, kind=kind, eta=eta, generator=ours)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


# --------------------------------------------------------------------------------- autocast, seeds, gradients, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["x0", "v", "eps"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_model_runs_under_autocast_and_the_algebra_does_not(name, kind, dtype):
    schedule = NoiseSchedule("cosine", T, zero_terminal_snr=kind != "eps")
    layer = torch.nn.Conv2d(2, 2, 3, padding=1)

    def model(x, t):
        assert torch.is_autocast_enabled("cpu")
        # From wrong eps, x grows to 1e5 (1 / alpha = 2e4): the sampler must cope, an fp16 convolution cannot.
        out = layer(x.clamp(-10, 10))
        assert out.dtype == dtype
        return out

    states = []
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        out = SAMPLERS[name](
            model, torch.randn(1, 2, 8, 8), schedule, 4, kind=kind, callback=lambda s, t, x, x0: states.extend([x, x0])
        )
    assert all(state.dtype == torch.float32 and torch.isfinite(state).all() for state in [*states, out])
    assert schedule.sqrt_alpha_bar.dtype == torch.float32


def test_seeding():
    schedule, x_T = NoiseSchedule("cosine", T, True), torch.randn(1, 2, 4, 4)

    def run(seed):
        return ddpm(smooth_model, x_T, schedule, 5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(7), run(7))
    assert not torch.equal(run(7), run(8))
    before = torch.get_rng_state()
    original = x_T.clone()
    run(7)
    ddim(smooth_model, x_T, schedule, 5)
    dpm_solver_pp_2m(smooth_model, x_T, schedule, 5)
    assert torch.equal(torch.get_rng_state(), before), "the global random state is not used"
    assert torch.equal(x_T, original), "x_T is not changed in place"


def test_one_step_hardly_depends_on_the_noise_multi_step_does():
    schedule = NoiseSchedule("cosine", T)  # alpha = 5e-5 at T-1
    denoiser = BernoulliDenoiser(schedule, 0.3)
    first, second = (torch.randn(200, 1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    difference = one_step(denoiser, first, schedule) - one_step(denoiser, second, schedule)
    assert difference.abs().max() < 1e-3
    assert (ddim(denoiser, first, schedule, 20) - ddim(denoiser, second, schedule, 20)).abs().max() > 1


def test_mirrored_noise_gives_mirrored_samples():
    schedule, axes = NoiseSchedule("cosine", T, True), (2, 3)
    x_T = torch.randn(1, 2, 5, 4)

    def run(x):
        return ddpm(smooth_model, x, schedule, 6, generator=torch.Generator().manual_seed(2), mirror_axes=axes)

    assert torch.equal(run(x_T.flip(axes)), run(x_T).flip(axes))


def test_gradients_pass_through():
    weight = torch.ones((), requires_grad=True)
    one_step(lambda x, t: weight * x, torch.ones(1, 1, 2, 2), NoiseSchedule()).sum().backward()
    assert weight.grad == 4


def test_eta_one_is_ddpm_and_bad_arguments_raise():
    schedule, x_T = NoiseSchedule("linear", T, True), torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="eta.*1.5"):
        ddim(smooth_model, x_T, schedule, 5, eta=1.5)
    for sampler in SAMPLERS.values():
        with pytest.raises(ValueError, match="zero terminal SNR"):
            sampler(smooth_model, x_T, schedule, 5, kind="eps")
        with pytest.raises(ValueError, match="differ in shape"):
            sampler(lambda x, t: torch.cat([x, x], 1), x_T, schedule, 5)
        with pytest.raises(ValueError, match="sampling steps"):
            sampler(smooth_model, x_T, schedule, T + 1)


def test_compiles_in_one_graph():
    schedule = NoiseSchedule("cosine", T, True)

    def forward(x_T, x0, noise, t):
        noisy = schedule.add_noise(x0, noise, t)
        sample = ddim(smooth_model, x_T, schedule, 3, kind="v")
        return to_x0(noisy, noise, t, schedule, "v"), sample, dpm_solver_pp_2m(smooth_model, x_T, schedule, 3)

    arguments = (*torch.randn(3, 2, 2, 4, 4).unbind(), torch.tensor([5, 999]))
    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    for actual, expected in zip(compiled(*arguments), forward(*arguments), strict=True):
        torch.testing.assert_close(actual, expected)


def test_meta_device():
    schedule = NoiseSchedule("cosine", T).to("meta")
    assert ddim(smooth_model, torch.randn(1, 2, 4, 4, device="meta"), schedule, 3, kind="v").shape == (1, 2, 4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", SAMPLERS)
def test_cuda_under_fp16_autocast_matches_cpu(name):
    schedule, x_T = NoiseSchedule("cosine", T, True), torch.randn(2, 2, 8, 8)

    def run(device):
        kwargs = {"generator": torch.Generator().manual_seed(0)} if name == "ddpm" else {}
        with torch.autocast("cuda", dtype=torch.float16):
            return SAMPLERS[name](smooth_model, x_T.to(device), schedule.to(device), 10, kind="v", **kwargs).cpu()

    torch.testing.assert_close(run("cuda"), run("cpu"), rtol=1e-4, atol=1e-4)
