"""How much noise the chains between deterministic and ancestral draw, and that each draw is new."""

from __future__ import annotations

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.chain import Update, initial_noise, reverse_chain
from ddpm_jax.diffusion.inpainting import Repaint, inpaint_chain
from ddpm_jax.diffusion.process import GaussianDiffusion
from ddpm_jax.diffusion.samplers import ancestral_table, ddim_table
from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule

LINEAR = NoiseSchedule.from_betas(beta_schedule("linear", 1000))
SIGNAL2 = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_ddim_draws_the_variance_of_its_eta(eta: float, steps: int) -> None:
    """Eqs. 12 and 16 of Song et al. 2021; whatever eta is, q(x_prev | x0) keeps its variance."""
    table = ddim_table(GaussianDiffusion(LINEAR), steps, eta=eta)
    at = SIGNAL2[table.timesteps]
    to = np.append(at[1:], 1.0)
    sigma = eta * np.sqrt((1 - to) / (1 - at) * (1 - at / to))
    np.testing.assert_allclose(table.z, sigma, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(table.eps, np.sqrt(1 - to - sigma**2), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(table.x0, np.sqrt(to), rtol=1e-9)
    assert not table.x.any()


def test_samples_by_ddim_scatter_by_eta() -> None:
    """One row down from a fixed x_t and a network that says 0: mean and deviation are known."""
    process, eta = GaussianDiffusion(LINEAR), 0.5
    table = ddim_table(process, 4, eta=eta).rows(slice(1, 2))
    x_t, keys = jnp.full((64, 8, 8, 1), 0.3), jax.random.split(jax.random.key(1), 64)
    zero = lambda x, t: jnp.zeros_like(x)  # noqa: E731
    drawn = np.asarray(reverse_chain(process, table, zero, x_t, keys, clip=False), np.float64)
    at, to = SIGNAL2[666], SIGNAL2[333]
    sigma = eta * np.sqrt((1 - to) / (1 - at) * (1 - at / to))
    count = drawn.size
    assert abs(drawn.mean() - np.sqrt(to / at) * 0.3) < 5 * sigma / np.sqrt(count)
    assert abs(drawn.std() / sigma - 1) < 5 / np.sqrt(2 * count)


@pytest.mark.parametrize("known_part", [0.0, 1.0], ids=["all missing", "all known"])
def test_repaint_draws_anew_at_every_visit(known_part: float) -> None:
    """What each visit adds to the mean of its x_t is N(0, 1), and no two of them are related.

    The network says x0_hat = 0 and the known image is 0, so that x_t is noise alone. Between two
    visits it is multiplied by what the rows say, and gets new noise of a variance that follows.
    """
    steps, repaint = 7, Repaint(resample=3, jump=2)
    schedule = NoiseSchedule.from_betas(
        beta_schedule("linear", steps, beta_start=0.1, beta_end=0.4)
    )
    process = GaussianDiffusion(schedule, "x0", "fixed_small")
    table, seen = ancestral_table(process), []

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x, t: seen.append((int(t[0]), np.array(x))), x, t, ordered=True)
        return jnp.zeros_like(x)

    shape, keys = (16, 8, 8, 1), jax.random.split(jax.random.key(7), 16)
    mask = jnp.full((16, 8, 8, 1), known_part)
    x_T = initial_noise(keys, shape[1:], steps)
    inpaint_chain(Update(process, table, denoise), x_T, keys, jnp.zeros(shape), mask, repaint)
    jax.effects_barrier()
    order, _ = repaint.visits(steps)
    assert [steps - 1 - t for t, _ in seen] == order.tolist()
    signal2 = np.cumprod(1 - np.linspace(0.1, 0.4, steps))[::-1]  # by rows
    below = np.append(signal2[1:], 1.0)  # where a row leads
    noises = [np.asarray(x_T, np.float64)]
    for (row, x), (following, x_next) in zip(
        zip(order, (x for _, x in seen)), zip(order[1:], (x for _, x in seen[1:]))
    ):
        if known_part:
            mean, variance = 0.0, 1 - below[row]
        else:
            beta = 1 - signal2[row] / below[row]
            mean = np.sqrt(1 - beta) * (1 - below[row]) / (1 - signal2[row]) * x
            variance = beta * (1 - below[row]) / (1 - signal2[row])
        # Up again to the row that follows, if that is not the next one.
        keep2 = signal2[following] / below[row]
        mean, variance = np.sqrt(keep2) * mean, keep2 * variance + 1 - keep2
        noises.append((x_next - mean) / np.sqrt(variance))
    count = noises[0].size
    for noise in noises:
        assert abs(noise.mean()) < 5 / np.sqrt(count) and abs(noise.std() - 1) < 5 / np.sqrt(count)
    for one, other in combinations(noises, 2):
        assert abs(np.mean(one * other)) < 6 / np.sqrt(count)
