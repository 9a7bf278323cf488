"""Tables of coefficients against definitions: limits, the exact ODE of Gaussian data, measured orders of convergence."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.chain import reverse_chain
from ddpm_jax.diffusion.process import GaussianDiffusion
from ddpm_jax.diffusion.samplers import (
    SAMPLERS,
    SamplerTable,
    ancestral_table,
    ddim_inversion_table,
    ddim_table,
    dpmpp_2m_table,
    sampler_table,
)
from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule
from ddpm_jax.diffusion.spacing import SPACINGS, spaced_timesteps
from tests.support.even_ode import (
    BEST,
    EVEN,
    EVEN_CHAIN,
    MEAN,
    STD,
    order_of,
    spread,
    walk,
)
from tests.support.gaussian_chain import GaussianChain

T = 1000
LINEAR = NoiseSchedule.from_betas(beta_schedule("linear", T))
PROCESS = GaussianDiffusion(LINEAR)


def columns(table: SamplerTable) -> np.ndarray:
    former = [column for column in (table.x0_before, table.eps_before) if column is not None]
    return np.column_stack([table.x0, table.x, table.eps, table.z, *former]).T


def as_a_b_s(table: SamplerTable, schedule: NoiseSchedule) -> np.ndarray:
    """The update with eps_hat written as (x_t - signal x0) / noise: what tables of different form have in common."""
    signal, noise = (
        v[table.timesteps]
        for v in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
    )
    return np.stack([table.x0 - table.eps * signal / noise, table.x + table.eps / noise, table.z])


# ---------------------------------------------------------------------------------------------- spacings


@pytest.mark.parametrize(
    ("spacing", "first", "last"),
    [
        ("linspace", 999, 0),
        ("uniform", 857, 0),
        ("leading", 852, 0),
        ("trailing", 999, 142),
        ("quadratic", 800, 0),
        ("logsnr", 999, 0),
        ("karras", 999, 0),
        ("sections:4,2,1", 667, 0),
        ("sections:1,2,4", 999, 0),
    ],
)
def test_where_each_spacing_starts_and_ends(spacing: str, first: int, last: int) -> None:
    """Seven of a thousand, a number that does not divide it; the chain's own end is x_0, whatever the last timestep."""
    for sampler in SAMPLERS:
        table = sampler_table(PROCESS, sampler, 7, spacing)
        assert (table.timesteps[0], table.timesteps[-1]) == (first, last)
        assert table.steps == 7 and (np.diff(table.timesteps) < 0).all()
        np.testing.assert_allclose(as_a_b_s(table, LINEAR)[:, -1], [1, 0, 0], atol=1e-12)
        assert not columns(table)[4:, -1].any()


def test_spacings_of_the_papers_and_their_code() -> None:
    """As their code prints them: `range(0, 1000, 100)` and int(linspace(0, sqrt(800), 10)^2) of DDIM, and so on."""
    expected = {
        "uniform": [0, 100, 200, 300, 400, 500, 600, 700, 800, 900],
        "leading": [0, 100, 200, 300, 400, 500, 600, 700, 800, 900],
        "trailing": [99, 199, 299, 399, 499, 599, 699, 799, 899, 999],
        "quadratic": [0, 9, 39, 88, 158, 246, 355, 483, 632, 800],
        "linspace": [0, 111, 222, 333, 444, 555, 666, 777, 888, 999],
        "sections:2,3,5": [0, 333, 334, 500, 666, 667, 750, 833, 916, 999],
    }
    for spacing, kept in expected.items():
        np.testing.assert_array_equal(spaced_timesteps(LINEAR, 10, spacing), kept, err_msg=spacing)
    flat = NoiseSchedule.from_betas(beta_schedule("const", 10))
    np.testing.assert_array_equal(spaced_timesteps(flat, 0, "sections:3,2,1"), [0, 2, 3, 4, 6, 7])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", ["linear", "cosine", "jsd"])
def test_spacings_never_repeat_a_step_nor_leave_the_chain(kind: str, spacing: str) -> None:
    for timesteps in (2, 3, 10, 37, 1000):
        schedule = NoiseSchedule.from_betas(beta_schedule(kind, timesteps))
        for steps in range(2, timesteps + 1, max(1, timesteps // 40)):
            kept = spaced_timesteps(schedule, steps, spacing)
            assert (
                len(kept) == steps
                and (np.diff(kept) > 0).all()
                and kept[0] >= 0
                and kept[-1] < timesteps
            )


@pytest.mark.parametrize("kind", ["linear", "cosine", "jsd"])
@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_spacings_by_noise_are_nearest_to_equal_distances(spacing: str, kind: str) -> None:
    """No other timestep lies nearer to the ideal level, in the spacing's own variable, than by rounding."""
    schedule = NoiseSchedule.from_betas(beta_schedule(kind, T))
    with np.errstate(divide="ignore"):
        sigma = 1 / np.sqrt(schedule.snr)
        level = np.log(sigma) if spacing == "logsnr" else sigma ** (1 / 7)
    finite = level[np.isfinite(level)]
    for steps in (2, 5, 10, 50):
        visited = spaced_timesteps(schedule, steps, spacing)
        assert (visited[0], visited[-1]) == (0, T - 1)
        ideal = np.linspace(finite[0], finite[-1], steps)
        # A target below the level of timestep `later` lies between `later - 1` and `later`.
        later = np.searchsorted(finite, ideal[1:-1])
        off = np.minimum(abs(visited[1:-1] - later), abs(visited[1:-1] - (later - 1)))
        single = np.diff(visited) == 1
        crowded = single[1:] | single[:-1]  # may have moved away from a timestep that was taken
        assert not off[~crowded].any()
        assert kind == "cosine" or crowded.sum() < 0.4 * steps  # whose last betas are 0.999
    assert (np.diff(spaced_timesteps(schedule, T - 1, spacing)) >= 1).all()
    assert spaced_timesteps(schedule, 1, spacing) == [T - 1]


def test_karras_sigmas_are_those_of_the_paper() -> None:
    """Eq. 5: (sigma_max^(1/7) + i/(N-1) (sigma_min^(1/7) - sigma_max^(1/7)))^7, up to the rounding."""
    sigma = 1 / np.sqrt(LINEAR.snr)
    visited = spaced_timesteps(LINEAR, 10, "karras")[::-1]
    i = np.arange(10)
    ideal = (sigma[-1] ** (1 / 7) + i / 9 * (sigma[0] ** (1 / 7) - sigma[-1] ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma[visited], ideal, rtol=0.05)


@pytest.mark.parametrize("spacing", [*SPACINGS, f"sections:{T}"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_all_steps_every_strided_table_is_the_full_one(sampler: str, spacing: str) -> None:
    full, strided = sampler_table(PROCESS, sampler), sampler_table(PROCESS, sampler, T, spacing)
    np.testing.assert_array_equal(strided.timesteps, np.arange(T)[::-1])
    np.testing.assert_array_equal(columns(strided), columns(full))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("euler", 10, "linspace", 0.0),
            "sampler=euler: one of ancestral, ancestral_small, ancestral_large, sigma_hat, ddim",
        ),
        (
            ("ddim", 10, "even", 0.0),
            "spacing=even: one of linspace, uniform, leading, trailing, quadratic, logsnr, karras, "
            "sections:N,N",
        ),
        (("ddim", 1001, "linspace", 0.0), r"steps=1001: must be in 1\.\.1000"),
        (("ddim", -1, "linspace", 0.0), r"steps=-1: must be in 1\.\.1000"),
        (("ddim", 10, "linspace", 1.5), r"eta=1.5: must be in 0\.\.1"),
        (("dpmpp_2m", 10, "linspace", 0.5), "eta=0.5: sampler=dpmpp_2m has none, only ddim does"),
        (
            ("ddim", 1, "uniform", 0.0),
            "spacing=uniform with 1 step visits t=0 only: take linspace or trailing",
        ),
        (
            ("ddim", 10, "sections:3,4", 0.0),
            "steps=10: spacing=sections:3,4 has 7; leave steps at 0",
        ),
        (("ddim", 0, "sections:3,501", 0.0), "section 2 has 500 timesteps, not 501"),
        (("ddim", 0, "sections:3,0", 0.0), "section 2 has 500 timesteps, not 0"),
        (
            ("ddim", 0, "sections:a", 0.0),
            "write the steps of each section, as in sections:10,15,20",
        ),
        (("ddim", 0, "sections", 0.0), "spacing=sections: one of linspace"),
    ],
)
def test_impossible_tables_are_refused_in_one_line(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sampler_table(PROCESS, *arguments)


def test_absolute_learned_variance_is_that_of_single_steps() -> None:
    process = GaussianDiffusion(LINEAR, "eps", "learned")
    assert ancestral_table(process).learned
    with pytest.raises(ValueError, match="variance=learned is that of single steps"):
        ancestral_table(process, 10)
    assert (
        not sampler_table(process, "ancestral_small", 10).learned
        and not ddim_table(process, 10).learned
    )


# ---------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [2, 7, 50, T])
def test_ddim_with_eta_1_is_ancestral_with_the_small_variance(steps: int, spacing: str) -> None:
    ddim = ddim_table(PROCESS, steps, spacing, eta=1.0)
    ancestral = sampler_table(PROCESS, "ancestral_small", steps, spacing)
    np.testing.assert_array_equal(ddim.timesteps, ancestral.timesteps)
    np.testing.assert_allclose(
        as_a_b_s(ddim, LINEAR), as_a_b_s(ancestral, LINEAR), rtol=1e-8, atol=1e-10
    )


def test_sigma_hat_is_the_noise_of_the_stride() -> None:
    """std sqrt(1 - ab / ab') at eta = 1's mean, written with the products of the original betas."""
    for steps in (7, 50):
        table, small = (
            sampler_table(PROCESS, name, steps) for name in ("sigma_hat", "ancestral_small")
        )
        for row in range(steps - 1):
            t, before = table.timesteps[row], table.timesteps[row + 1]
            kept = math.prod(1 - beta for beta in LINEAR.betas[before + 1 : t + 1])
            np.testing.assert_allclose(table.z[row], math.sqrt(1 - kept), rtol=1e-9)
        np.testing.assert_array_equal(columns(table)[:-1], columns(small)[:-1])
        assert (table.z[:-1] > small.z[:-1]).all() and table.z[-1] == 0


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", ["linspace", "quadratic", "trailing"])
def test_ddim_keeps_the_marginals_of_q(eta: float, spacing: str) -> None:
    """Given x0, a step takes N(signal x0, noise^2) of its timestep to that of the next one, for every eta."""
    table = ddim_table(PROCESS, 9, spacing, eta=eta)
    chain = GaussianChain(LINEAR.betas)
    a, b, s = as_a_b_s(table, LINEAR)
    for row in range(8):
        t, before = table.timesteps[row], table.timesteps[row + 1]
        np.testing.assert_allclose(
            a[row] + b[row] * chain.signal[t], chain.signal[before], rtol=1e-9
        )
        variance = b[row] ** 2 * chain.covariance[t, t] + s[row] ** 2
        np.testing.assert_allclose(variance, chain.covariance[before, before], rtol=1e-8)
    assert (s > 0).any() == (eta > 0)


@pytest.mark.parametrize("steps", [0, 7])
def test_names_and_defaults_are_the_tables_that_they_say(steps: int) -> None:
    """The process has the other variance, so that a name cannot have its own by chance."""
    for variance, other in (("small", "fixed_large"), ("large", "fixed_small")):
        process = GaussianDiffusion(LINEAR, variance=other)
        named = sampler_table(process, f"ancestral_{variance}", steps)
        own = ancestral_table(GaussianDiffusion(LINEAR, variance=f"fixed_{variance}"), steps)
        np.testing.assert_array_equal(columns(named), columns(own))
    for sampler in ("deis", "unipc"):
        one, two, three = (sampler_table(PROCESS, sampler, 7, order=order) for order in (0, 2, 3))
        np.testing.assert_array_equal(columns(one), columns(two))
        assert columns(three).shape[0] == columns(SAMPLERS[sampler](PROCESS, 7)).shape[0] + 1


def test_jsd_has_finite_tables() -> None:
    """alphas_cumprod ends at 0: the first half-log-SNR is -infinity."""
    process = GaussianDiffusion(NoiseSchedule.from_betas(beta_schedule("jsd", 20)), "x0")
    for sampler in SAMPLERS:
        for steps in (1, 2, 3, 20):
            assert np.isfinite(columns(sampler_table(process, sampler, steps))).all()


def test_first_and_last_multistep_rows_are_ddim() -> None:
    for steps in (1, 2, 3, 10):
        solver, ddim = dpmpp_2m_table(PROCESS, steps), ddim_table(PROCESS, steps)
        rows = [0, -1]
        np.testing.assert_allclose(
            as_a_b_s(solver, LINEAR)[:, rows],
            as_a_b_s(ddim, LINEAR)[:, rows],
            rtol=1e-8,
            atol=1e-12,
        )
        assert not solver.x0_before[rows].any() and solver.x0_before[1:-1].all()


def test_multistep_rows_extrapolate_x0_to_the_middle_of_their_step() -> None:
    """On steps of very unequal length in l = log(signal / noise): were x0_hat a straight line in l, its value at l + h/2."""
    table, half_log_snr = dpmpp_2m_table(PROCESS, 0, "sections:2,7,3"), 0.5 * np.log(LINEAR.snr)
    for row in range(1, table.steps - 1):
        before, here, after = half_log_snr[table.timesteps[row - 1 : row + 2]]
        line = np.polynomial.Polynomial([0.3, -0.7])
        x0, x0_before = table.x0[row], table.x0_before[row, 0]
        used = (x0 * line(here) + x0_before * line(before)) / (x0 + x0_before)
        np.testing.assert_allclose(used, line((here + after) / 2), rtol=1e-9)


# ---------------------------------------------------------------------------------------------- order of convergence


def test_ddim_converges_to_the_ode_with_order_1() -> None:
    order, errors = order_of(ddim_table, 10)
    assert 0.95 < order < 1.05, (order, errors)
    assert errors[-1] < 2e-3


def test_dpmpp_2m_converges_to_the_ode_with_order_2() -> None:
    order, errors = order_of(dpmpp_2m_table, 10)
    assert 1.9 < order < 2.1, (order, errors)
    assert errors[-1] < 2e-5


def test_ancestral_converges_to_the_same_distribution_with_order_1() -> None:
    """The other family: mean and variance at t = 0 from those of q at the start, where DDIM's and q's own agree."""
    errors, counts = [], [64, 128, 256, 512]
    for count in counts:
        table = sampler_table(GaussianDiffusion(EVEN), "ancestral_small", count + 1).rows(slice(-1))
        mean, variance = EVEN_CHAIN.signal[-1] * MEAN, spread(EVEN.timesteps - 1) ** 2
        for t, a, b, s in zip(table.timesteps, table.x0, table.x, table.z):
            mean, variance = (
                (a * BEST[t, 0] + b) * mean + a * BEST[t, 1],
                (a * BEST[t, 0] + b) ** 2 * variance + s**2,
            )
        errors.append(abs(variance - spread(0) ** 2))
        np.testing.assert_allclose(
            mean, EVEN_CHAIN.signal[0] * MEAN, rtol=1e-9
        )  # E[x0_hat] is exact on the way
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert 0.9 < order < 1.1 and errors[-1] < 0.02 * STD**2, (order, errors)


@pytest.mark.parametrize("make", [ddim_table, dpmpp_2m_table])
def test_the_compiled_chain_walks_its_table(make: Callable) -> None:
    table = make(GaussianDiffusion(EVEN, "x0"), 9)
    best = jnp.asarray(BEST, jnp.float32)
    x = jnp.linspace(-2, 2, 16).reshape(1, 4, 4, 1)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        slope, offset = (best[t, i][:, None, None, None] for i in range(2))
        return slope * x + offset

    y = reverse_chain(
        GaussianDiffusion(EVEN, "x0"),
        table,
        denoise,
        x,
        jax.random.split(jax.random.key(0), 1),
        clip=False,
    )
    np.testing.assert_allclose(
        y.ravel(), [walk(table, float(value)) for value in x.ravel()], atol=2e-5
    )


# ---------------------------------------------------------------------------------------------- inversion


def test_inversion_and_back_returns_the_image_with_an_error_of_order_1() -> None:
    errors, counts = [], [2**k for k in range(4, 10)]
    for count in counts:
        there, back = (
            make(GaussianDiffusion(EVEN), count + 1) for make in (ddim_inversion_table, ddim_table)
        )
        assert there.timesteps[0] == there.timesteps[1] == 0 and not there.z.any()
        errors.append(abs(walk(back, walk(there, 0.9)) - 0.9))
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert 0.9 < order < 1.2, (order, errors)


def test_inverted_images_are_spread_as_x_t_is() -> None:
    """In the limit, the code of an image as far from the mean as k standard deviations is k standard deviations away."""
    table, last = ddim_inversion_table(GaussianDiffusion(EVEN)), EVEN.timesteps - 1
    for k in (-2.0, 0.5, 3.0):
        code = walk(table, MEAN + k * STD)
        assert abs(code - (EVEN_CHAIN.signal[last] * MEAN + k * spread(last))) < 0.02 * max(
            1, abs(k)
        )


def test_a_point_is_encoded_and_decoded_exactly() -> None:
    """eps_hat is then the same all along the path: Euler steps are exact, be they few."""
    point, signal, noise = 0.25, LINEAR.sqrt_alphas_cumprod, LINEAR.sqrt_one_minus_alphas_cumprod

    def denoise(x: float, t: int, first: bool) -> float:
        return 0.7 if first else (x - signal[t] * point) / noise[t]

    for steps in (1, 3, 10):
        there, back = ddim_inversion_table(PROCESS, steps), ddim_table(PROCESS, steps)
        x = point
        for row, t in enumerate(there.timesteps):
            eps = denoise(x, t, row == 0)
            x = (
                there.x0[row] * (x - noise[t] * eps) / signal[t]
                + there.x[row] * x
                + there.eps[row] * eps
            )
        np.testing.assert_allclose(x, signal[-1] * point + noise[-1] * 0.7, rtol=1e-9)
        for row, t in enumerate(back.timesteps):
            eps = denoise(x, t, False)
            x = back.x0[row] * (x - noise[t] * eps) / signal[t] + back.eps[row] * eps
        np.testing.assert_allclose(x, point, rtol=1e-9)
