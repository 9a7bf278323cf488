"""The target of a student: two DDIM steps as one, on a denoiser that is known in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.chain import reverse_chain
from ddpm_jax.diffusion.process import GaussianDiffusion
from ddpm_jax.diffusion.samplers import ddim_table
from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule
from ddpm_jax.diffusion.spacing import spaced_timesteps
from ddpm_jax.distillation.target import Halving, student_loss, two_step_target

T, MEAN, SPREAD = 40, 0.3, 0.5


def schedule() -> NoiseSchedule:
    return NoiseSchedule.from_betas(beta_schedule("cosine", T))


def gaussian(process: GaussianDiffusion):
    """The exact denoiser of x0 ~ N(MEAN, SPREAD^2), in what `process` predicts."""
    ab = jnp.asarray(process.schedule.alphas_cumprod)

    def denoise(x, t):
        a = jnp.sqrt(ab[t]).reshape(-1, *(1,) * (x.ndim - 1))
        s2 = 1 - a**2
        x0 = MEAN + a * SPREAD**2 / (a**2 * SPREAD**2 + s2) * (x - a * MEAN)
        eps = (x - a * x0) / jnp.sqrt(s2)
        return {"x0": x0, "eps": eps, "v": a * eps - jnp.sqrt(s2) * x0}[process.prediction]

    return denoise


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
@pytest.mark.parametrize("steps", [1, 4, 5, 20])
def test_the_target_is_the_closed_form_of_gaussian_data(prediction, steps):
    """Each DDIM step is linear there. Written out alone, by eps, and the target inverted."""
    process = GaussianDiffusion(schedule(), prediction)
    halving = Halving.of(process.schedule, steps)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(steps, 2, 3, 1)))
    got = two_step_target(process, halving, gaussian(process), z, jnp.arange(steps))
    ab = np.append(process.schedule.alphas_cumprod, 1.0)

    def ddim(z, t, to):  # one step of the exact denoiser, by eps rather than by x0
        a, b = np.sqrt(ab[t]), np.sqrt(ab[to])
        s, r = np.sqrt(1 - ab[t]), np.sqrt(1 - ab[to])
        eps = s * (z - a * MEAN) / (a**2 * SPREAD**2 + s**2)
        return b * (z - s * eps) / a + r * eps

    visited = spaced_timesteps(process.schedule, 2 * steps, "trailing")
    tolerance = 1e-9 if prediction == "x0" else 1e-5  # the others' coefficients are float32
    for i in range(steps):
        start, middle = visited[2 * i + 1], visited[2 * i]
        end = visited[2 * i - 1] if i else -1
        landed = ddim(ddim(np.asarray(z[i]), start, middle), middle, end)
        a, b = np.sqrt(ab[start]), np.sqrt(ab[end])
        s, r = np.sqrt(1 - ab[start]), np.sqrt(1 - ab[end])
        # One DDIM step from z with the target lands there: the target inverts it.
        x0 = np.asarray(got[i])
        np.testing.assert_allclose(
            b * x0 + r * (np.asarray(z[i]) - a * x0) / s, landed, atol=tolerance
        )


@pytest.mark.parametrize("clip, x0", [(True, 1.0), (False, 3.0)])
def test_the_teachers_x0_is_clipped_as_its_sampler_does(clip, x0):
    """A teacher that sees 3 everywhere walks the straight line to what is left of it."""
    process = GaussianDiffusion(schedule(), "x0")
    halving = Halving.of(process.schedule, 4)
    z = jnp.asarray(np.random.default_rng(3).normal(size=(4, 2, 2, 1)))
    target = two_step_target(
        process, halving, lambda x, t: jnp.full_like(x, 3.0), z, jnp.arange(4), clip=clip
    )
    np.testing.assert_allclose(target, x0, rtol=1e-9)


def test_a_perfect_student_samples_what_its_teacher_samples():
    """The chain of S steps with the targets as its x0 is the teacher's chain of 2S steps."""
    steps, process = 5, GaussianDiffusion(schedule(), "x0")
    halving, teacher = Halving.of(process.schedule, steps), gaussian(process)
    number = np.full(T, -1)
    number[halving.start] = np.arange(steps)

    def student(x, t):
        return two_step_target(process, halving, teacher, x, jnp.asarray(number)[t])

    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 2, 1)))
    keys = jax.random.split(jax.random.key(0), 2)
    chain = {
        count: reverse_chain(
            process, ddim_table(process, count, spacing="trailing"), denoise, x, keys, clip=False
        )
        for count, denoise in ((steps, student), (2 * steps, teacher))
    }
    np.testing.assert_allclose(chain[steps], chain[2 * steps], atol=1e-6)


def test_the_students_steps_are_every_second_of_the_teachers():
    for timesteps in (1000, 40, 37):
        betas = beta_schedule("linear", timesteps, rescale=True)
        levels = NoiseSchedule.from_betas(betas)
        for steps in (1, 2, 4, 8, 16):
            halving = Halving.of(levels, steps)
            own = spaced_timesteps(levels, steps, "trailing")
            np.testing.assert_array_equal(halving.start, own)
            assert halving.start[-1] == timesteps - 1
            assert (halving.middle < halving.start).all()
    with pytest.raises(ValueError):
        Halving.of(levels, 19)


@pytest.mark.parametrize(
    "prediction, weighting",
    [
        ("x0", "truncated_snr"),
        ("v", "truncated_snr"),
        ("v", "snr_plus_one"),
        ("eps", "truncated_snr"),
    ],
)
def test_the_loss_is_the_weighted_error_of_x0(prediction, weighting):
    process = GaussianDiffusion(schedule(), prediction)
    steps, rng = 4, np.random.default_rng(2)
    halving, index = Halving.of(process.schedule, steps), np.arange(steps)
    output, target, z = (rng.normal(size=(steps, 2, 2, 1)) for _ in range(3))
    got = student_loss(
        process, halving, *map(jnp.asarray, (output, target, z)), jnp.asarray(index), weighting
    )
    for i, t in enumerate(spaced_timesteps(process.schedule, steps, "trailing")):
        ab = process.schedule.alphas_cumprod[t]
        x0 = {
            "x0": output[i],
            "v": np.sqrt(ab) * z[i] - np.sqrt(1 - ab) * output[i],
            "eps": (z[i] - np.sqrt(1 - ab) * output[i]) / np.sqrt(ab),
        }[prediction]
        ratio = ab / (1 - ab)
        weight = {"snr_plus_one": ratio + 1, "truncated_snr": max(ratio, 1)}[weighting]
        weight = ratio if prediction == "eps" else weight
        np.testing.assert_allclose(got[i], weight * np.mean((target[i] - x0) ** 2), rtol=1e-5)
