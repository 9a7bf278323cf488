"""Solvers of order 2 and 3 against their papers' own algorithms, the exact ODE, DDIM, and loops by hand in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from ddpm_jax.config import Config, from_dict, to_dict, validate
from ddpm_jax.diffusion.chain import Frames, initial_noise, noise_at, recorded_chain, reverse_chain
from ddpm_jax.diffusion.process import GaussianDiffusion
from ddpm_jax.diffusion.samplers import (
    SamplerTable,
    ancestral_table,
    ddim_table,
    deis_table,
    dpmpp_2m_sde_table,
    dpmpp_2m_table,
    sampler_table,
    unipc_table,
)
from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule
from ddpm_jax.errors import ConfigError
from ddpm_jax.sampling.sampler import build_sampler, with_sampling
from tests.support.even_ode import BEST, EVEN, EVEN_CHAIN, MEAN, exact, order_of, spread, walk

T = 1000
LINEAR = NoiseSchedule.from_betas(beta_schedule("linear", T))
JSD = NoiseSchedule.from_betas(beta_schedule("jsd", T))
SIGNAL, NOISE = LINEAR.sqrt_alphas_cumprod, LINEAR.sqrt_one_minus_alphas_cumprod
PROCESS = GaussianDiffusion(LINEAR, "x0")
SHAPE = (3, 3, 2)
QUICK = {"xla_backend_optimization_level": 0}
SOLVERS = {
    "deis 2": partial(deis_table, order=2),
    "deis 3": partial(deis_table, order=3),
    "unipc 2": partial(unipc_table, order=2),
    "unipc 3": partial(unipc_table, order=3),
}
STEPS = [(1, "linspace"), (2, "linspace"), (3, "linspace"), (4, "linspace"), (9, "sections:2,4,3")]


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(3), count)


def levels(table: SamplerTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signal, noise and the log of their ratio, along the rows and at x_0."""
    signal, noise = np.append(SIGNAL[table.timesteps], 1.0), np.append(NOISE[table.timesteps], 0.0)
    with np.errstate(divide="ignore"):
        return signal, noise, np.log(signal / noise)


def curved(x: float, t: int) -> float:
    """Some x0_hat that is a straight line in nothing."""
    return math.tanh(SIGNAL[t] * x + 0.3) + 0.1 * math.sin(3 * x + 0.01 * t)


def down(table: SamplerTable, x: float, denoise: Callable = curved) -> list[float]:
    """x after each row, by hand in float64."""
    before, states = [], []
    for row, t in enumerate(table.timesteps):
        x0 = denoise(x, t)
        eps = (x - SIGNAL[t] * x0) / NOISE[t]
        x = table.x0[row] * x0 + table.x[row] * x + table.eps[row] * eps
        for kind, columns in enumerate((table.x0_before, table.eps_before)):
            if columns is not None:
                x += sum(c * former[kind] for c, former in zip(columns[row], before))
        before.insert(0, (x0, eps))
        states.append(x)
    return states


# ---------------------------------------------------------------------------------------------- the papers' algorithms


def unipc_in_two_states(timesteps: np.ndarray, x: float, order: int) -> list[float]:
    """Predictor and corrector as the authors' `multistep_uni_pc_bh_update` writes them, B2, predicting x0."""
    signal, noise = np.append(SIGNAL[timesteps], 1.0), np.append(NOISE[timesteps], 0.0)
    with np.errstate(divide="ignore"):
        log_ratio = np.log(signal / noise)
    said, states, steps = [curved(x, timesteps[0])], [], len(timesteps)
    for i in range(steps - 1):  # from timesteps[i] to timesteps[i + 1]; newest x0_hat first
        p = min(order, i + 1, steps - i)
        h = log_ratio[i + 1] - log_ratio[i]
        r = [(log_ratio[i - k] - log_ratio[i]) / h for k in range(1, p)] + [1.0]
        differences = [(said[k] - said[0]) / r[k - 1] for k in range(1, p)]
        b2, phi, factorial, matrix, right = np.expm1(-h), np.expm1(-h) / -h - 1, 1, [], []
        for n in range(1, p + 1):
            matrix.append(np.power(r, n - 1))
            right.append(phi * factorial / b2)
            factorial *= n + 1
            phi = phi / -h - 1 / factorial
        matrix, right = np.array(matrix), np.array(right)
        base = noise[i + 1] / noise[i] * x - signal[i + 1] * b2 * said[0]
        rho = [0.5] if p == 2 else np.linalg.solve(matrix[:-1, :-1], right[:-1])
        predicted = base - signal[i + 1] * b2 * np.dot(rho, differences)
        states.append(predicted)
        new = curved(predicted, timesteps[i + 1])
        rho = [0.5] if p == 1 else np.linalg.solve(matrix, right)
        x = base - signal[i + 1] * b2 * np.dot(rho, [*differences, new - said[0]])
        said.insert(0, new)
    return [*states, said[0]]


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("steps", "spacing"), [*STEPS, (0, "sections:9,9,20"), (50, "logsnr")])
def test_unipc_is_the_authors_predictor_and_corrector(steps: int, spacing: str, order: int) -> None:
    """In the table the corrected state is never written down."""
    if spacing.startswith("sections"):
        steps = 0
    table = unipc_table(PROCESS, steps, spacing, order=order)
    for x in (-1.3, 0.4, 2.0):
        expected = unipc_in_two_states(table.timesteps, x, order)
        np.testing.assert_allclose(down(table, x), expected, rtol=1e-8, atol=1e-9)


def test_unipc_of_order_2_predicts_as_dpmpp_2m_does() -> None:
    """Its second row, less the correction of the first: half of what x0_hat changed by, times the row's own weight of it."""
    unipc, dpmpp = unipc_table(PROCESS, 8), dpmpp_2m_table(PROCESS, 8)
    np.testing.assert_array_equal(unipc.x, dpmpp.x)
    correction = unipc.x[1] * dpmpp.x0[0] / 2
    np.testing.assert_allclose(unipc.x0[1] - correction, dpmpp.x0[1], rtol=1e-9)
    np.testing.assert_allclose(
        unipc.x0_before[1], [dpmpp.x0_before[1, 0] - correction, 0], rtol=1e-9
    )


def tab_deis(timesteps: np.ndarray, x: float, order: int) -> list[float]:
    """The integrals of the paper by adaptive quadrature, on x_t and eps_hat alone."""
    log_rho = np.log(NOISE / SIGNAL)
    said, states, steps = [], [], len(timesteps)
    for i, t in enumerate(timesteps):
        said.insert(0, (x - SIGNAL[t] * curved(x, t)) / NOISE[t])
        if i == steps - 1:
            return [*states, (x - NOISE[t] * said[0]) / SIGNAL[t]]
        p, end = min(order, i + 1, steps - i), timesteps[i + 1]
        new = SIGNAL[end] / SIGNAL[t] * x
        for j in range(p):

            def integrand(s: float, i: int = i, j: int = j, p: int = p) -> float:
                rho = math.exp(np.interp(s, np.arange(T), log_rho))
                cell = min(int(s), T - 2)
                others = (timesteps[i - k] for k in range(p) if k != j)
                lagrange = math.prod((s - o) / (timesteps[i - j] - o) for o in others)
                return lagrange * rho * (log_rho[cell + 1] - log_rho[cell])

            cells = itertools.pairwise(range(end, t + 1))
            total = sum(scipy.integrate.quad(integrand, a, b, epsabs=1e-13)[0] for a, b in cells)
            new -= SIGNAL[end] * total * said[j]
        x = new
        states.append(x)
    raise AssertionError


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("steps", "spacing"), [(1, "linspace"), (4, "linspace"), (6, "quadratic")])
def test_deis_is_the_papers_integral(steps: int, spacing: str, order: int) -> None:
    """The table's form takes the signal from x0_hat; without a clip it is the same."""
    table = deis_table(PROCESS, steps, spacing, order=order)
    np.testing.assert_allclose(
        down(table, 0.9), tab_deis(table.timesteps.astype(int), 0.9, order), rtol=1e-7
    )
    total = table.eps + table.eps_before.sum(axis=1)
    np.testing.assert_allclose(total, levels(table)[1][1:], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("steps", "spacing"), STEPS[:-1])
def test_dpmpp_2m_sde_is_the_papers_update(steps: int, spacing: str) -> None:
    table = dpmpp_2m_sde_table(PROCESS, steps, spacing)
    signal, noise, log_ratio = levels(table)
    for row in range(steps):
        h = log_ratio[row + 1] - log_ratio[row]
        k = h / (log_ratio[row] - log_ratio[row - 1]) / 2 if 0 < row < steps - 1 else 0.0
        rise = signal[row + 1] * -np.expm1(-2 * h)
        expected = [
            rise * (1 + k),
            noise[row + 1] / noise[row] * math.exp(-h),
            -rise * k,
            noise[row + 1] * math.sqrt(-np.expm1(-2 * h)),
        ]
        ours = [table.x0[row], table.x[row], table.x0_before[row, 0], table.z[row]]
        np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-12)


# ---------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(("steps", "spacing"), STEPS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_of_first_order_are_ddim(solver: str, steps: int, spacing: str) -> None:
    """The first and the last; with two steps or fewer, the chain."""
    steps = 0 if spacing.startswith("sections") else steps
    table, ddim = SOLVERS[solver](PROCESS, steps, spacing), ddim_table(PROCESS, steps, spacing)
    for x in (-0.7, 1.1):
        ours, expected = down(table, x), down(ddim, x)
        np.testing.assert_allclose(ours[0], expected[0], rtol=1e-9)
        if table.steps <= 2:
            np.testing.assert_allclose(ours, expected, rtol=1e-9)
            assert not table.multistep
    assert (table.x0[-1], table.x[-1], table.eps[-1]) == (1, 0, 0)
    for columns in (table.x0_before, table.eps_before):
        assert columns is None or not columns[[0, -1]].any()


def test_the_first_row_of_dpmpp_2m_sde_is_ancestral() -> None:
    """And so are all, but for how far x0_hat is extrapolated."""
    sde, ancestral = dpmpp_2m_sde_table(PROCESS, 7), sampler_table(PROCESS, "ancestral_small", 7)
    np.testing.assert_array_equal(sde.z, ancestral.z)
    np.testing.assert_array_equal(sde.x, ancestral.x)
    np.testing.assert_allclose(sde.x0 + sde.x0_before[:, 0], ancestral.x0, rtol=1e-12)
    assert sde.x0[0] == ancestral.x0[0] and sde.x0[-1] == 1 and (sde.x0_before[1:-1] < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 50, T])
@pytest.mark.parametrize("schedule", [LINEAR, JSD], ids=["linear", "jsd"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_tables_are_finite_and_move_no_point(
    solver: str, schedule: NoiseSchedule, steps: int
) -> None:
    """Data that are one point: x0_hat and eps_hat never change, whatever is made of former ones."""
    table = SOLVERS[solver](GaussianDiffusion(schedule, "x0"), steps)
    signal = np.append(schedule.sqrt_alphas_cumprod[table.timesteps], 1.0)
    noise = np.append(schedule.sqrt_one_minus_alphas_cumprod[table.timesteps], 0.0)
    on_x0 = table.x0 + (0 if table.x0_before is None else table.x0_before.sum(axis=1))
    on_eps = table.eps + (0 if table.eps_before is None else table.eps_before.sum(axis=1))
    np.testing.assert_allclose(on_x0 + table.x * signal[:-1], signal[1:], rtol=1e-9)
    np.testing.assert_allclose(on_eps + table.x * noise[:-1], noise[1:], rtol=1e-9, atol=1e-13)


# ---------------------------------------------------------------------------------------------- order of convergence


@pytest.mark.parametrize(
    ("solver", "low", "high", "error"),
    [("deis 2", 1.9, 2.1, 2e-5), ("unipc 2", 2.9, 3.1, 2e-7), ("unipc 3", 2.9, 3.5, 2e-8)],
)
def test_solvers_converge_to_the_ode(solver: str, low: float, high: float, error: float) -> None:
    """Whole chains, to t = 0. The correction gains UniPC an order; its last but one row is of order 2."""
    order, errors = order_of(SOLVERS[solver], 10)
    assert low < order < high, (order, errors)
    assert errors[-1] < error


def test_deis_3_has_order_3_where_the_start_is_exact() -> None:
    """With its own start, a row of order 1 and one of order 2, the error changes its sign on the way; it stays far below order 2's."""
    order, errors = order_of(SOLVERS["deis 3"], 10, least=6, skip=2)
    assert 2.8 < order < 3.1, (order, errors)
    whole, second = (order_of(SOLVERS[name], 10)[1] for name in ("deis 3", "deis 2"))
    assert all(50 < ratio for ratio in np.divide(second, whole))


def test_unipc_3_has_order_4_before_its_last_rows() -> None:
    errors, counts = [], [16, 32, 64, 128, 256]
    for count in counts:
        table = unipc_table(GaussianDiffusion(EVEN), count + 1, order=3)
        former = tuple(int(t) for t in table.timesteps[:2][::-1])
        end = walk(table.rows(slice(2, -3)), exact(table.timesteps[2]), former)
        errors.append(abs(end - exact(table.timesteps[-3])))
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert 3.7 < order < 4.3, (order, errors)


def test_dpmpp_2m_sde_converges_to_the_distribution() -> None:
    """Mean and variance at t = 0 of pixels that start as q has them: the covariance of x and the former x0_hat, row by row."""
    errors, counts = [], [64, 128, 256, 512]
    for count in counts:
        table = dpmpp_2m_sde_table(GaussianDiffusion(EVEN), count + 1).rows(slice(-1))
        start = table.timesteps[0]
        mean = np.array([EVEN_CHAIN.signal[start] * MEAN, 0.0])
        covariance = np.diag([spread(start) ** 2, 0.0])
        for t, x0, x, former, z in zip(
            table.timesteps, table.x0, table.x, table.x0_before[:, 0], table.z
        ):
            slope, offset = BEST[t]
            step = np.array([[x0 * slope + x, former], [slope, 0.0]])
            mean = step @ mean + np.array([x0, 1.0]) * offset
            covariance = step @ covariance @ step.T + np.diag([z**2, 0.0])
        errors.append(abs(covariance[0, 0] - spread(0) ** 2))
        np.testing.assert_allclose(mean[0], EVEN_CHAIN.signal[0] * MEAN, rtol=1e-9)
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert 1.9 < order < 2.1 and errors[-1] < 1e-4 * spread(0) ** 2, (order, errors)


# ---------------------------------------------------------------------------------------------- in the compiled chain


def sample(
    table: SamplerTable,
    denoise: Callable,
    count: int = 2,
    process: GaussianDiffusion = PROCESS,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """x_T, and x_0 at the end of the compiled chain."""
    x_T = 1.5 * initial_noise(keys(count), SHAPE, T)

    def run(x_T: jax.Array) -> jax.Array:
        return reverse_chain(process, table, denoise, x_T, keys(count), **options)

    return np.asarray(x_T, np.float64), np.asarray(jax.jit(run, compiler_options=QUICK)(x_T))


def at(values: np.ndarray, t: jax.Array) -> jax.Array:
    return jnp.asarray(values, jnp.float32)[t][:, None, None, None]


def curved_images(x: jax.Array, t: jax.Array) -> jax.Array:
    """`curved` of each pixel."""
    slow = 0.01 * t.astype(jnp.float32)[:, None, None, None]
    return jnp.tanh(at(SIGNAL, t) * x + 0.3) + 0.1 * jnp.sin(3 * x + slow)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scan_keeps_as_many_former_ones_as_the_order_needs(solver: str) -> None:
    """The hand loop keeps all of them."""
    table = SOLVERS[solver](PROCESS, 12, "logsnr")
    x_T, x_0 = sample(table, curved_images, clip=False)
    expected = [down(table, x)[-1] for x in x_T.ravel()]
    np.testing.assert_allclose(x_0.ravel(), expected, atol=3e-4)
    dropped = SamplerTable(
        table.timesteps, table.x0, table.x, table.eps, table.z
    )  # what forgetting them would give
    assert np.abs(sample(dropped, curved_images, clip=False)[1].ravel() - expected).max() > 0.01


def test_the_scan_of_dpmpp_2m_sde_draws_its_noise() -> None:
    table = dpmpp_2m_sde_table(PROCESS, 6, "logsnr")
    x, x_0 = sample(table, curved_images, clip=False)
    before = np.zeros_like(x)
    for row, t in enumerate(table.timesteps):
        x0 = np.tanh(SIGNAL[t] * x + 0.3) + 0.1 * np.sin(3 * x + 0.01 * t)
        z = np.asarray(noise_at(keys(2), int(t), SHAPE), np.float64)
        x = (
            table.x0[row] * x0
            + table.x[row] * x
            + table.x0_before[row, 0] * before
            + table.z[row] * z
        )
        before = x0
    np.testing.assert_allclose(x_0, x, atol=3e-4)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "deis", "unipc"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_point_is_sampled_exactly(sampler: str, prediction: str) -> None:
    point = jnp.asarray(np.random.default_rng(0).uniform(-0.9, 0.9, SHAPE), jnp.float32)[None]
    process = GaussianDiffusion(LINEAR, prediction)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        eps = (x - at(SIGNAL, t) * point) / at(NOISE, t)
        return eps if prediction == "eps" else at(SIGNAL, t) * eps - at(NOISE, t) * point

    for steps, order in ((1, 0), (5, 0), (6, 0 if sampler == "dpmpp_2m_sde" else 3)):
        table = sampler_table(process, sampler, steps, order=order)
        for clip in (True, False):
            _, x_0 = sample(table, denoise, process=process, clip=clip)
            np.testing.assert_allclose(x_0, np.broadcast_to(point, x_0.shape), atol=5e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_clipped_x0_are_what_is_kept(solver: str) -> None:
    """A network far outside is one that says the sign: in history, in eps_hat, in corrections."""
    table = SOLVERS[solver](PROCESS, 8, "logsnr").rows(slice(-1))
    sign = jnp.asarray(np.random.default_rng(1).choice([-1.0, 1.0], SHAPE), jnp.float32)

    def says(loud: float) -> Callable:
        return lambda x, t: jnp.broadcast_to(loud * sign, x.shape)

    _, wild = sample(table, says(1000.0))
    _, honest = sample(table, says(1.0))
    np.testing.assert_allclose(wild, honest, atol=1e-4)
    assert np.abs(wild).max() < 3


def scan_of(run: Callable, *arguments: jax.Array) -> jax.extend.core.JaxprEqn:
    program = jax.make_jaxpr(run)(*arguments).jaxpr
    (scan,) = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    return scan


@pytest.mark.parametrize(
    ("make", "former"),
    [
        (ancestral_table, 0),
        (ddim_table, 0),
        (dpmpp_2m_table, 1),
        (dpmpp_2m_sde_table, 1),
        (partial(deis_table, order=2), 1),
        (partial(deis_table, order=3), 2),
        (partial(unipc_table, order=2), 2),
        (partial(unipc_table, order=3), 3),
    ],
)
def test_one_evaluation_a_row_and_a_carry_no_larger_than_needed(
    make: Callable, former: int
) -> None:
    calls = []

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        calls.append(t)
        return curved_images(x, t)

    def run(x: jax.Array, keys: jax.Array) -> jax.Array:
        return reverse_chain(PROCESS, make(PROCESS, 10), denoise, x, keys)

    scan = scan_of(run, jnp.zeros((1, *SHAPE)), keys(1))
    assert scan.params["num_carry"] == 1 + former and scan.params["length"] == 10
    assert len(calls) == 1  # in the body of the scan, which runs once a row


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m"])
def test_options_that_are_off_leave_the_program_as_it_was(sampler: str) -> None:
    """Three ways to say nothing: leave the fields out, an old config.json, and their defaults."""
    old = to_dict(Config())
    for name in ("order", "dynamic_threshold"):
        del old["sampling"][name]
    configs = (
        with_sampling(Config(), sampler=sampler, steps=9),
        with_sampling(from_dict(old), sampler=sampler, steps=9),
        with_sampling(Config(), sampler=sampler, steps=9, order=0, dynamic_threshold=0.0),
    )
    texts = set()
    for config in configs:
        ready = build_sampler(config)

        def run(x: jax.Array, ready=ready) -> jax.Array:
            return ready(curved_images, x, keys(2), {})

        texts.add(jax.jit(run).lower(jnp.zeros((2, *SHAPE))).as_text())

    def bare(x: jax.Array) -> jax.Array:
        ready = build_sampler(configs[0])
        return reverse_chain(ready.process, ready.table, curved_images, x, keys(2))

    texts.add(jax.jit(bare).lower(jnp.zeros((2, *SHAPE))).as_text().replace("jit_bare", "jit_run"))
    assert len(texts) == 1
    (text,) = texts
    limited = build_sampler(with_sampling(configs[0], dynamic_threshold=0.9))
    assert "stablehlo.sort" not in text
    assert (
        "stablehlo.sort"
        in jax.jit(lambda x: limited(curved_images, x, keys(2), {}))
        .lower(jnp.zeros((2, *SHAPE)))
        .as_text()
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_frames_of_multistep_chains(solver: str) -> None:
    table, x_T = SOLVERS[solver](PROCESS, 8, "logsnr"), initial_noise(keys(2), SHAPE, T)
    end, frames = jax.jit(
        lambda x: recorded_chain(
            PROCESS, table, curved_images, x, keys(2), Frames("x_t", np.arange(8)), clip=False
        ),
        compiler_options=QUICK,
    )(x_T)
    expected = np.array([down(table, float(x)) for x in x_T.ravel()]).T.reshape(8, *x_T.shape)
    np.testing.assert_allclose(frames, expected, atol=3e-4)
    np.testing.assert_array_equal(frames[-1], end)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sampler", "options", "said"),
    [
        ("unipc", {"order": 4}, "order=4: must be 2 or 3"),
        ("deis", {"order": 1}, "order=1: must be 2 or 3"),
        ("ddim", {"order": 2}, "order=2: sampler=ddim has none, only deis and unipc do"),
        ("dpmpp_2m", {"order": 3}, "order=3: sampler=dpmpp_2m has none, only deis and unipc do"),
        ("dpmpp_2m_sde", {"order": 2}, "order=2: sampler=dpmpp_2m_sde has none"),
        ("ancestral", {"order": 3}, "order=3: sampler=ancestral has none"),
        ("unipc", {"eta": 0.5}, "eta=0.5: sampler=unipc has none, only ddim does"),
        ("dpmpp_2m_sde", {"eta": 1.0}, "eta=1.0: sampler=dpmpp_2m_sde has none, only ddim does"),
        ("unipc", {"steps": 1001}, r"steps=1001: must be in 1\.\.1000"),
    ],
)
def test_impossible_solvers_are_refused_in_one_line(sampler: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refusal:
        sampler_table(PROCESS, sampler, **{"steps": 10} | options)
    assert "\n" not in str(refusal.value)


def test_orders_of_configs_are_checked_with_them() -> None:
    with pytest.raises(
        ConfigError, match=r"config.sampling.order=4: must be 2 or 3 \(0: the default, 2\)"
    ):
        with_sampling(Config(), sampler="unipc", order=4)
    with pytest.raises(ConfigError, match="order=3: sampler=ddim has none"):
        build_sampler(with_sampling(Config(), sampler="ddim", order=3))
    for order, expected in ((0, 2), (2, 2), (3, 3)):
        config = validate(with_sampling(Config(), sampler="unipc", steps=9, order=order))
        assert build_sampler(config).table.history == {"x0_before": expected, "eps_before": 0}
