"""The reverse chain: its table against Gaussian conditioning, its limits, and what its randomness depends on."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.chain import Frames, Update, initial_noise, recorded_chain, reverse_chain
from ddpm_jax.diffusion.inpainting import Repaint, inpaint_chain
from ddpm_jax.diffusion.process import PREDICTIONS, GaussianDiffusion, p_mean_variance, q_sample
from ddpm_jax.diffusion.randomness import Stream, example_keys, stream_key
from ddpm_jax.diffusion.samplers import (
    SamplerTable,
    ancestral_table,
    deis_table,
    dpmpp_2m_sde_table,
    dpmpp_2m_table,
    unipc_table,
)
from ddpm_jax.diffusion.schedule import NoiseSchedule, beta_schedule
from ddpm_jax.diffusion.spacing import spaced_timesteps
from tests.support.gaussian_chain import GaussianChain
from tests.support.programs import equations

T = 12
SHAPE = (4, 4, 3)
LINEAR = NoiseSchedule.from_betas(beta_schedule("linear", T, rescale=True, beta_end=0.008))
CHAIN = GaussianChain(LINEAR.betas)
NOISE = np.sqrt(np.diag(CHAIN.covariance))
QUICK = {"xla_backend_optimization_level": 0}  # these chains cost nothing but their compilation


def keys(count: int, seed: int = 0) -> jax.Array:
    return example_keys(stream_key(seed, Stream.SAMPLES), jnp.arange(count))


def at(values: np.ndarray, t: jax.Array) -> jax.Array:
    return jnp.asarray(values, jnp.float32)[t][:, None, None, None]


def point_denoiser(point: jax.Array, prediction: str = "eps") -> Callable:
    """The exact denoiser of data that are one image: what a perfect network learns from it."""
    coefficients = np.array([CHAIN.posterior(t - 1, t)[:2] for t in range(T)])

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        eps = (x - at(CHAIN.signal, t) * point) / at(NOISE, t)
        v = at(CHAIN.signal, t) * eps - at(NOISE, t) * point
        mu = at(coefficients[:, 0], t) * point + at(coefficients[:, 1], t) * x
        return {"eps": eps, "x0": jnp.broadcast_to(point, x.shape), "v": v, "mu": mu}[prediction]

    return denoise


def cubic(x: jax.Array, t: jax.Array) -> jax.Array:
    """Some denoiser that depends on x and t and treats each sample alone."""
    return x - 0.05 * x**3 + 0.1 * jnp.sin(t.astype(jnp.float32))[:, None, None, None]


def cubic_with_variance(raw: float) -> Callable:
    return lambda x, t: jnp.concatenate([cubic(x, t), jnp.full(x.shape, raw)], axis=-1)


def sample(
    process: GaussianDiffusion, table: SamplerTable, denoise: Callable, keys: jax.Array, **options
) -> np.ndarray:
    """A whole chain from x_T on."""

    def run(keys: jax.Array) -> jax.Array:
        return reverse_chain(
            process, table, denoise, initial_noise(keys, SHAPE, T), keys, **options
        )

    return np.asarray(jax.jit(run, compiler_options=QUICK)(keys))


# ---------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("steps", [1, 2, 5, T - 1, T])
def test_rows_are_the_conditioned_joint_gaussian_of_the_visited_steps(steps: int) -> None:
    """Posterior of one visited state given the next, from the covariance of the full chain: effective betas follow."""
    kept = spaced_timesteps(LINEAR, steps)
    variances = ("fixed_small", "fixed_large", "learned_range")
    small, large, ranged = (
        ancestral_table(GaussianDiffusion(LINEAR, "eps", v), steps) for v in variances
    )
    for table in (small, large, ranged):
        np.testing.assert_array_equal(table.timesteps, kept[::-1])
        assert (
            table.steps == steps
            and table.z[-1] == 0
            and not table.eps.any()
            and not table.multistep
        )
        for row in range(steps):
            later, earlier = (
                table.timesteps[row],
                table.timesteps[row + 1] if row + 1 < steps else -1,
            )
            on_x0, on_xt, variance = CHAIN.posterior(earlier, later)
            np.testing.assert_allclose(
                [table.x0[row], table.x[row]], [on_x0, on_xt], rtol=1e-9, atol=1e-13
            )
            # x_later is sqrt(1 - beta) x_earlier + sqrt(beta) z for the beta of this stride
            before = CHAIN.covariance[earlier, earlier] if earlier >= 0 else 0.0
            signal_ratio = CHAIN.signal[later] / (CHAIN.signal[earlier] if earlier >= 0 else 1.0)
            beta = CHAIN.covariance[later, later] - signal_ratio**2 * before
            np.testing.assert_allclose(ranged.log_variance_high[row], math.log(beta), rtol=1e-9)
            if earlier >= 0:
                np.testing.assert_allclose(small.z[row], math.sqrt(variance), rtol=1e-9)
                np.testing.assert_allclose(large.z[row], math.sqrt(beta), rtol=1e-9)
                np.testing.assert_allclose(
                    ranged.log_variance_low[row], math.log(variance), rtol=1e-9
                )
                assert ranged.z[row] == 1


@pytest.mark.parametrize("timesteps", [1, 2, 3, 10, 37, 1000])
def test_spaced_timesteps_never_repeat_and_include_both_ends(timesteps: int) -> None:
    """Non-divisors of T, where other spacings lose T-1 or repeat a step."""
    schedule = NoiseSchedule.from_betas(beta_schedule("linear", timesteps))
    for steps in range(1, timesteps + 1, max(1, timesteps // 40)):
        kept = spaced_timesteps(schedule, steps)
        assert (
            len(kept) == steps
            and (np.diff(kept) > 0).all()
            and kept[-1] == timesteps - 1
            and kept[0] >= 0
        )
        if steps > 1:
            assert kept[0] == 0 and np.ptp(np.diff(kept)) <= 1
    np.testing.assert_array_equal(spaced_timesteps(schedule, timesteps), np.arange(timesteps))


@pytest.mark.parametrize("steps", [-1, 13])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps}: must be in 1\.\.12"):
        ancestral_table(GaussianDiffusion(LINEAR), steps)


def test_strided_with_all_steps_is_the_full_chain_bit_for_bit() -> None:
    process = GaussianDiffusion(LINEAR)
    full, strided = (ancestral_table(process, steps) for steps in (0, T))
    np.testing.assert_array_equal(full.timesteps, strided.timesteps)
    np.testing.assert_array_equal(
        *(sample(process, table, cubic, keys(3)) for table in (full, strided))
    )


def test_network_is_told_the_original_timesteps() -> None:
    """A respaced chain has S betas but the network was trained on 0..T-1."""
    seen = []

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda t: seen.append(int(t)), t[0], ordered=True)
        return cubic(x, t)

    sample(
        GaussianDiffusion(LINEAR), ancestral_table(GaussianDiffusion(LINEAR), 4), denoise, keys(1)
    )
    jax.effects_barrier()
    assert seen == [11, 7, 4, 0]


# ---------------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_row_draws_from_p_mean_variance(prediction: str, variance: str) -> None:
    """Algorithm 2 two ways: the table's update with z = 0 and z = 1, and the Gaussian of eq. 1."""
    process = GaussianDiffusion(LINEAR, prediction, variance)
    raw = 0.3 if process.learns_variance else None
    denoise = cubic if raw is None else cubic_with_variance(raw)
    x_t = initial_noise(keys(3), SHAPE, T)
    update = Update(process, ancestral_table(process), denoise)
    rows = update.rows()
    for number in range(T):
        row = jax.tree.map(lambda column, number=number: column[number], rows)
        mean, x0, _ = update(row, x_t, lambda: jnp.zeros_like(x_t))
        above, *_ = update(row, x_t, lambda: jnp.ones_like(x_t))
        t = jnp.full(3, T - 1 - number)
        step = p_mean_variance(process, denoise(x_t, t), x_t, t, clip=True)
        np.testing.assert_allclose(mean, step.mean, atol=1e-5)
        np.testing.assert_allclose(x0, step.x0, atol=1e-5)
        if number < T - 1:  # the last step draws nothing
            deviation = jnp.broadcast_to(jnp.exp(0.5 * step.log_variance), x_t.shape)
            np.testing.assert_allclose(above - mean, deviation, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "span", "frames", "inpainting", "multistep"])
def test_the_chain_is_a_scan(kind: str) -> None:
    """A loop of known length, whatever is asked of it: no while loop, which has no such length."""
    process = GaussianDiffusion(LINEAR)
    table = (dpmpp_2m_table if kind == "multistep" else ancestral_table)(process)
    x, rows = initial_noise(keys(2), SHAPE, T), jnp.array([0, 3])

    def run(x: jax.Array, keys: jax.Array) -> jax.Array:
        if kind == "inpainting":
            update = Update(process, table, cubic)
            return inpaint_chain(update, x, keys, x, x[..., :1], Repaint(2, 3))
        if kind == "frames":
            return recorded_chain(
                process, table, cubic, x, keys, Frames("x0", np.array([2, T - 1]))
            )[1]
        span = (rows, rows + 4) if kind == "span" else None
        return reverse_chain(process, table, cubic, x, keys, span=span)

    program = jax.make_jaxpr(run)(x, keys(2)).jaxpr
    names = {equation.primitive.name for equation in equations(program)}
    assert "scan" in names and "while" not in names
    assert ("cond" in names) == (kind == "span")


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_point_mass_data_are_sampled_exactly(prediction: str, steps: int) -> None:
    """No noise is left by the last step: with an exact denoiser every sample is the one image."""
    point = jnp.asarray(np.random.default_rng(0).uniform(-0.9, 0.9, SHAPE), jnp.float32)[None]
    process = GaussianDiffusion(LINEAR, prediction)
    for clip in (True, False):
        x = sample(
            process,
            ancestral_table(process, steps),
            point_denoiser(point, prediction),
            keys(3),
            clip=clip,
        )
        np.testing.assert_allclose(x, np.broadcast_to(point, x.shape), atol=2e-5)


def test_jsd_chain_samples_a_point_without_eps() -> None:
    """alphas_cumprod ends at exactly 0: no infinity may enter."""
    process = GaussianDiffusion(
        NoiseSchedule.from_betas(beta_schedule("jsd", T)), "x0", "fixed_small"
    )
    for steps in (0, 1, 5):
        x = sample(
            process, ancestral_table(process, steps), lambda x, t: jnp.full(x.shape, 0.25), keys(2)
        )
        np.testing.assert_allclose(x, 0.25, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_is_clipped_before_the_update(prediction: str) -> None:
    """An adversarial network: every x0_hat is far outside, so the chain is that of a network that says the sign."""
    process, table = (
        GaussianDiffusion(LINEAR, prediction),
        ancestral_table(GaussianDiffusion(LINEAR), 0),
    )
    sign = jnp.asarray(np.random.default_rng(1).choice([-1.0, 1.0], SHAPE), jnp.float32)[None]
    wild = sample(process, table, point_denoiser(1000 * sign, prediction), keys(3))
    np.testing.assert_array_equal(wild, np.broadcast_to(sign, wild.shape))
    # All but the last step, whose x_t still shows how the mean was formed.
    head = table.rows(slice(None, -1))
    clipped = sample(process, head, point_denoiser(1000 * sign, prediction), keys(3))
    honest = sample(process, head, point_denoiser(sign, prediction), keys(3))
    np.testing.assert_allclose(clipped, honest, atol=1e-4)
    free = sample(process, head, point_denoiser(1000 * sign, prediction), keys(3), clip=False)
    assert np.abs(free).min() > 100


def test_eps_hat_is_derived_again_from_the_clipped_x0() -> None:
    """x0_hat and eps_hat lead to x_{t-1} along eq. 4 of the clipped x0, not of the prediction."""
    process = GaussianDiffusion(LINEAR)
    t, earlier = T - 1, 3
    row = (t, CHAIN.signal[earlier], 0.0, NOISE[earlier], 0.0)  # timestep, x0, x, eps, z
    table = SamplerTable(*(np.array([value]) for value in row))
    x = sample(process, table, point_denoiser(jnp.full((1, *SHAPE), 5.0)), keys(2))
    x_t = initial_noise(keys(2), SHAPE, T)
    eps = (x_t - CHAIN.signal[t]) / NOISE[t]
    np.testing.assert_allclose(x, CHAIN.signal[earlier] + NOISE[earlier] * eps, atol=1e-5)
    kept = sample(
        process, table, point_denoiser(jnp.full((1, *SHAPE), 5.0)), keys(2), rederive_eps=False
    )
    said = (x_t - 5 * CHAIN.signal[t]) / NOISE[t]
    np.testing.assert_allclose(kept, CHAIN.signal[earlier] + NOISE[earlier] * said, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize(("raw", "fixed"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_learned_range_at_its_ends_is_the_fixed_chain(raw: float, fixed: str, steps: int) -> None:
    """Strided too: the ends are those of the effective betas."""
    process, ranged = (
        GaussianDiffusion(LINEAR, "eps", fixed),
        GaussianDiffusion(LINEAR, "eps", "learned_range"),
    )
    expected = sample(process, ancestral_table(process, steps), cubic, keys(3))
    x = sample(ranged, ancestral_table(ranged, steps), cubic_with_variance(raw), keys(3))
    np.testing.assert_allclose(x, expected, atol=2e-5)


def test_learned_variance_is_the_log_variance_of_each_step() -> None:
    """One step from x_t with x0_hat = x_t: what is added has the standard deviation exp(raw / 2)."""
    process = GaussianDiffusion(LINEAR, "x0", "learned")
    table = ancestral_table(process)
    first = table.rows(slice(None, 1))

    def step(raw: float) -> np.ndarray:
        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            return jnp.concatenate([x, jnp.full(x.shape, raw)], axis=-1)

        return sample(process, first, denoise, keys(3), clip=False)

    mean = (table.x0[0] + table.x[0]) * initial_noise(keys(3), SHAPE, T)
    np.testing.assert_allclose(step(-1.0) - mean, math.exp(0.75) * (step(-2.5) - mean), atol=1e-5)
    np.testing.assert_allclose((step(0.0) - mean).std(), 1, atol=4 / math.sqrt(2 * 3 * 48))


def test_last_step_adds_no_noise() -> None:
    for variance in ("fixed_small", "fixed_large", "learned", "learned_range"):
        process = GaussianDiffusion(LINEAR, "x0", variance)
        table = ancestral_table(process)
        last = table.rows(slice(-1, None))

        def denoise(
            x: jax.Array, t: jax.Array, learns: bool = process.learns_variance
        ) -> jax.Array:
            return jnp.full((*SHAPE[:2], 6 if learns else 3), 0.5)[None].repeat(len(x), 0)

        np.testing.assert_array_equal(sample(process, last, denoise, keys(2)), 0.5)


# ---------------------------------------------------------------------------------------------- randomness


def test_noise_is_standard_normal_and_fresh_at_every_step_and_sample() -> None:
    """One key for every step, or for every device, is a classic."""
    states, ones, zeros = [], np.ones(T), np.zeros(T)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x: states.append(np.asarray(x, np.float64)), x, ordered=True)
        return jnp.zeros_like(x)

    only_noise = SamplerTable(np.arange(T)[::-1], zeros, ones, zeros, ones)  # x_prev = x + z
    end = sample(GaussianDiffusion(LINEAR, "x0"), only_noise, denoise, keys(40))
    jax.effects_barrier()
    noises = np.stack(
        [states[0], *np.diff([*states, end], axis=0)]
    )  # x_T, then what each step added
    assert len(noises) == T + 1
    flat = noises.reshape(T + 1, -1)
    limit = 4.5 / math.sqrt(flat.shape[1])
    assert np.abs(np.corrcoef(flat) - np.eye(T + 1)).max() < limit
    np.testing.assert_allclose(flat.mean(axis=1), 0, atol=limit)
    np.testing.assert_allclose(flat.var(axis=1), 1, atol=math.sqrt(2) * limit)
    by_sample = noises.swapaxes(0, 1).reshape(40, -1)
    assert np.abs(np.corrcoef(by_sample) - np.eye(40)).max() < 5 / math.sqrt(by_sample.shape[1])


def test_a_sample_depends_on_its_key_alone_whatever_the_batch() -> None:
    process, table = GaussianDiffusion(LINEAR), ancestral_table(GaussianDiffusion(LINEAR))
    whole = sample(process, table, cubic, keys(6))
    order = np.array([4, 1, 5])
    np.testing.assert_allclose(
        sample(process, table, cubic, keys(6)[order]), whole[order], atol=1e-6
    )
    np.testing.assert_allclose(sample(process, table, cubic, keys(6)[2:3]), whole[2:3], atol=1e-6)
    np.testing.assert_array_equal(sample(process, table, cubic, keys(6)), whole)
    assert np.abs(sample(process, table, cubic, keys(6, seed=1)) - whole).mean() > 0.1


def test_eight_devices_sample_what_one_does() -> None:
    process, table = GaussianDiffusion(LINEAR), ancestral_table(GaussianDiffusion(LINEAR))
    assert jax.local_device_count() == 8

    def run(keys: jax.Array) -> jax.Array:
        return reverse_chain(process, table, cubic, initial_noise(keys, SHAPE, T), keys)

    mapped = jax.pmap(run)(keys(16).reshape(8, 2))
    np.testing.assert_allclose(
        mapped.reshape(16, *SHAPE), sample(process, table, cubic, keys(16)), atol=1e-6
    )


def test_chain_may_start_in_the_middle() -> None:
    """An interpolation starts at q(x_t | x0) and runs the rows from t on, t included: one off would leave noise."""
    process, table = GaussianDiffusion(LINEAR), ancestral_table(GaussianDiffusion(LINEAR))
    point = jnp.full((2, *SHAPE), 0.3)
    x = q_sample(LINEAR, point, jnp.full(2, 5), initial_noise(keys(2), SHAPE, T))
    rest = table.rows(slice(T - 6, None))
    assert rest.timesteps[0] == 5
    np.testing.assert_allclose(
        reverse_chain(process, rest, point_denoiser(point[:1]), x, keys(2)), 0.3, atol=1e-5
    )


@pytest.mark.parametrize(
    "make",
    [
        ancestral_table,
        dpmpp_2m_table,
        dpmpp_2m_sde_table,
        partial(deis_table, order=3),
        partial(unipc_table, order=3),
    ],
)
def test_each_sample_goes_through_its_own_span(make: Callable) -> None:
    """One loop for samples that start and stop at different rows: each ends as if it had its own table."""
    process, table = GaussianDiffusion(LINEAR), make(GaussianDiffusion(LINEAR))
    spans = [(0, T), (3, T), (2, 7), (5, 5), (0, 1)]
    x = initial_noise(keys(5), SHAPE, T)
    first, end = jnp.array(spans).T
    run = jax.jit(
        lambda first, end: reverse_chain(process, table, cubic, x, keys(5), span=(first, end)),
        compiler_options=QUICK,
    )
    together = run(first, end)
    np.testing.assert_array_equal(together[3], x[3])
    for i, (start, stop) in enumerate(spans):
        if start < stop:
            part = table.rows(slice(start, stop))
            alone = jax.jit(
                lambda x, part=part: reverse_chain(process, part, cubic, x, keys(5)),
                compiler_options=QUICK,
            )(x)
            np.testing.assert_allclose(together[i], alone[i], atol=2e-6)


def test_only_the_rows_that_some_sample_needs_are_run() -> None:
    told = []

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda t: told.append(int(t)), t[0], ordered=True)
        return cubic(x, t)

    process, x = GaussianDiffusion(LINEAR), initial_noise(keys(2), SHAPE, T)
    span = jnp.array([4, 6]), jnp.array([7, 9])
    jax.jit(
        lambda span: reverse_chain(
            process, ancestral_table(process), denoise, x, keys(2), span=span
        )
    )(span)
    jax.effects_barrier()
    assert told == [T - 1 - row for row in range(4, 9)]


def test_multistep_history_is_the_x0_of_the_row_before() -> None:
    """The same table walked in float64 by hand, which would not notice a float32 loop that forgot d."""
    table = dpmpp_2m_table(GaussianDiffusion(LINEAR, "x0"), 6)
    chain = GaussianChain(LINEAR.betas)
    best = np.array([chain.best_x0(t, 0.2, 0.5) for t in range(T)])
    x, before = np.asarray(initial_noise(keys(2), SHAPE, T), np.float64), 0.0
    for t, a, b, d in zip(table.timesteps, table.x0, table.x, table.x0_before[:, 0]):
        x0 = best[t, 0] * x + best[t, 1]
        x, before = a * x0 + b * x + d * before, x0
    assert np.abs(table.x0_before[1:-1]).min() > 0.02

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        return at(best[:, 0], t) * x + at(best[:, 1], t)

    np.testing.assert_allclose(
        sample(GaussianDiffusion(LINEAR, "x0"), table, denoise, keys(2), clip=False), x, atol=1e-5
    )


# ---------------------------------------------------------------------------------------------- frames


def test_frames_are_the_states_after_their_rows() -> None:
    process, table = GaussianDiffusion(LINEAR), ancestral_table(GaussianDiffusion(LINEAR))
    x, after = initial_noise(keys(3), SHAPE, T), np.array([0, 4, 5, T - 1])
    start = jnp.zeros(3, jnp.int32)
    until = jax.jit(
        lambda end: reverse_chain(process, table, cubic, x, keys(3), span=(start, end)),
        compiler_options=QUICK,
    )
    for what in ("x_t", "x0"):
        record = jax.jit(
            lambda x, what=what: recorded_chain(
                process, table, cubic, x, keys(3), Frames(what, after)
            ),
            compiler_options=QUICK,
        )
        end, frames = record(x)
        np.testing.assert_allclose(end, sample(process, table, cubic, keys(3)), atol=1e-6)
        assert frames.shape == (4, 3, *SHAPE)
        np.testing.assert_allclose(frames[-1], end, atol=1e-6)  # the last x0_hat is the sample
        for slot, row in enumerate(after[:-1]):
            state = until(jnp.full(3, row if what == "x0" else row + 1))
            if what == "x0":  # what the network says of the state before the row
                t = T - 1 - row
                state = jnp.clip(
                    (state - NOISE[t] * cubic(state, jnp.full(3, t))) / CHAIN.signal[t], -1, 1
                )
            np.testing.assert_allclose(frames[slot], state, atol=1e-5)


def test_frames_without_the_last_row_are_refused() -> None:
    process, x = GaussianDiffusion(LINEAR), initial_noise(keys(1), SHAPE, T)
    with pytest.raises(ValueError, match="frames end after row 7: must end after the last, 11"):
        recorded_chain(
            process, ancestral_table(process), cubic, x, keys(1), Frames("x_t", np.array([3, 7]))
        )


def test_memory_is_that_of_the_frames_whatever_the_number_of_steps() -> None:
    def needed(steps: int, frames: int) -> int:
        process = GaussianDiffusion(NoiseSchedule.from_betas(beta_schedule("linear", 2000)))
        table = ancestral_table(process, steps)
        after = np.rint(np.linspace(0, steps - 1, frames)).astype(int)

        def run(x: jax.Array, keys: jax.Array) -> jax.Array:
            return recorded_chain(process, table, cubic, x, keys, Frames("x_t", after))[1]

        x = jnp.zeros((4, 16, 16, 3))
        memory = jax.jit(run, compiler_options=QUICK).lower(x, keys(4)).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    image = 4 * 16 * 16 * 3 * 4
    few, many = needed(20, 5), needed(2000, 5)
    assert abs(many - few) < 0.5 * image  # the table itself grows, by a few bytes a step
    assert 9 * image < needed(20, 15) - few < 40 * image


@pytest.mark.parametrize("steps", [12, 450])
def test_progress_is_reported_about_a_hundred_times_and_at_the_end(steps: int) -> None:
    process = GaussianDiffusion(NoiseSchedule.from_betas(beta_schedule("linear", steps)))
    finished = []
    sample(
        process,
        ancestral_table(process),
        cubic,
        keys(1),
        on_row=lambda row: finished.append(int(row)),
    )
    jax.effects_barrier()
    assert (
        max(finished) == steps
        and len(set(finished)) == len(finished)
        and 12 <= len(finished) <= 120
    )
