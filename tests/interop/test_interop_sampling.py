"""The reverse chain against diffusers' schedulers, and a model trained here in diffusers' pipeline. Noise comes from outside."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import diffusers.pipelines.ddpm.pipeline_ddpm as pipeline_module
import diffusers.schedulers.scheduling_ddpm as ddpm_module
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

from ddpm_jax.build import build_process
from ddpm_jax.cli import export_weights as export_script
from ddpm_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    OptimizerConfig,
    TrainConfig,
    UNetConfig,
)
from ddpm_jax.diffusion.chain import initial_noise, reverse_chain
from ddpm_jax.diffusion.randomness import Stream, stream_key
from ddpm_jax.diffusion.samplers import sampler_table
from ddpm_jax.errors import WeightsError
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.sampling.generate import build_generator
from ddpm_jax.trained import open_trained
from ddpm_jax.training.loop import train
from ddpm_jax.weights.layouts import diffusers_config as layout

pytestmark = pytest.mark.interop
TOLERANCE = 1e-4
SHAPE = (4, 4, 3)
KEYS = jax.random.split(jax.random.key(9), 3)


@functools.cache  # dozens of chains have the same
def noise(t: int) -> np.ndarray:
    """Ours at timestep t, x_T being that of t = T, channels last."""
    return np.asarray(initial_noise(KEYS, SHAPE, t))


def first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def last(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


def made_up_network(channels: int, level: float = 0.0) -> tuple[Callable, Callable]:
    """The same bounded function of (x, t) for both sides; a second half of channels is a raw variance near `level`."""

    def ours(x, t):
        phase = t.astype(jnp.float32)[:, None, None, None] / 90
        out = 0.7 * jnp.sin(1.1 * x + phase) + 0.2 * x
        return (
            out
            if channels == 3
            else jnp.concatenate([out, level + jnp.sin(2 * x - phase)], axis=-1)
        )

    def theirs(x, t):
        phase = torch.tensor(float(t)) / 90
        out = 0.7 * torch.sin(1.1 * x + phase) + 0.2 * x
        return out if channels == 3 else torch.cat([out, level + torch.sin(2 * x - phase)], dim=1)

    return ours, theirs


def chain_of_diffusers(
    monkeypatch, scheduler: DDPMScheduler, network: Callable, steps: int, quiet_end: bool = False
) -> np.ndarray:
    """`quiet_end`: the noise of the last step is zero."""
    scheduler.set_timesteps(steps)
    x = first(noise(scheduler.config.num_train_timesteps))
    for t in scheduler.timesteps:
        drawn = first(noise(int(t))) * (0.0 if quiet_end and t == scheduler.timesteps[-1] else 1.0)
        monkeypatch.setattr(
            ddpm_module, "randn_tensor", lambda *shape, drawn=drawn, **options: drawn
        )
        x = scheduler.step(network(x, t), t, x).prev_sample
    return last(x)


def our_chain(
    options: DiffusionConfig, network: Callable, steps: int, clip: bool = True, **sampler
) -> np.ndarray:
    """`sampler`: its name, spacing and eta, and rederive_eps."""
    process = build_process(Config(diffusion=options))
    rederive = sampler.pop("rederive_eps", True)
    table = sampler_table(process, sampler.pop("sampler", "ancestral"), steps, **sampler)

    def run(x: jax.Array, keys: jax.Array) -> jax.Array:
        return reverse_chain(process, table, network, x, keys, clip=clip, rederive_eps=rederive)

    return np.asarray(jax.jit(run)(jnp.asarray(noise(options.timesteps)), KEYS))


def scheduler_of(options: DiffusionConfig, **changes) -> DDPMScheduler:
    """Through the translation that exports use, and back through the one that imports use."""
    theirs = layout.scheduler_config(Config(diffusion=options)) | changes
    if theirs["trained_betas"] is None:
        back = layout.scheduler_settings(Path("scheduler_config.json"), theirs)
        for name in ("timesteps", "schedule", "beta_start", "beta_end", "prediction", "variance"):
            assert back[f"diffusion.{name}"] == getattr(options, name)
    return DDPMScheduler.from_config(theirs)


def error_of(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest error, in units of the larger of 1 and the largest value."""
    return float(np.abs(actual - expected).max() / max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("steps", [1000, 50, 7], ids=["all steps", "50 steps", "7 steps"])
@pytest.mark.parametrize(
    "theirs", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"]
)
def test_every_variance_type(theirs, steps, monkeypatch):
    ours = theirs.removesuffix("_log")
    network, reference = made_up_network(6 if theirs == "learned_range" else 3)
    options = DiffusionConfig(variance=ours)
    expected = chain_of_diffusers(
        monkeypatch, scheduler_of(options, variance_type=theirs), reference, steps
    )
    assert error_of(our_chain(options, network, steps), expected) < TOLERANCE


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize(
    "spacing, steps",
    [("leading", 50), ("leading", 7), ("trailing", 50), ("trailing", 7), ("linspace", 13)],
)
def test_every_spacing(spacing, steps, variance, monkeypatch):
    """Spacing trailing ends at t > 0, where diffusers adds noise to the finished image, but for fixed_small."""
    network, reference = made_up_network(6 if variance == "learned_range" else 3)
    options = DiffusionConfig(variance=variance)
    scheduler = scheduler_of(options, timestep_spacing=spacing)
    ours = our_chain(options, network, steps, spacing=spacing)
    assert (
        error_of(ours, chain_of_diffusers(monkeypatch, scheduler, reference, steps, quiet_end=True))
        < TOLERANCE
    )
    as_shipped = error_of(ours, chain_of_diffusers(monkeypatch, scheduler, reference, steps))
    if spacing == "trailing" and variance != "fixed_small":
        assert as_shipped > 0.1
    else:
        assert as_shipped < TOLERANCE


def ddim_of_diffusers(
    network: Callable, spacing: str, steps: int, eta: float, rederive: bool, gaps: bool = False
) -> np.ndarray:
    """`gaps`: each step leads to the timestep that comes next, in place of one T // steps earlier."""
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    x = first(noise(1000))
    visited = [int(t) for t in scheduler.timesteps]
    for t, following in zip(visited, [*visited[1:], -1]):
        if gaps:
            scheduler.num_inference_steps = 1
            scheduler.register_to_config(num_train_timesteps=t - following)
        drawn = first(noise(t)) if eta else None
        x = scheduler.step(
            network(x, t), t, x, eta, use_clipped_model_output=rederive, variance_noise=drawn
        ).prev_sample
    return last(x)


@pytest.mark.parametrize("rederive", [True, False], ids=["eps from clipped x0", "eps as predicted"])
@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize(
    "spacing, steps", [("leading", 1000), ("leading", 50), ("leading", 7), ("trailing", 50)]
)
def test_ddim(spacing, steps, eta, rederive):
    network, reference = made_up_network(3)
    expected = ddim_of_diffusers(reference, spacing, steps, eta, rederive)
    sampler = dict(sampler="ddim", spacing=spacing, eta=eta, rederive_eps=rederive)
    assert error_of(our_chain(DiffusionConfig(), network, steps, **sampler), expected) < TOLERANCE


@pytest.mark.parametrize("spacing, steps", [("linspace", 50), ("trailing", 7)])
def test_ddim_there_steps_to_timesteps_it_does_not_visit(spacing, steps):
    """DDIMScheduler goes to t - T // steps whatever the spacing (its issue 12633); led to the next timestep, it agrees."""
    network, reference = made_up_network(3)
    ours = our_chain(DiffusionConfig(), network, steps, sampler="ddim", spacing=spacing)
    as_shipped = error_of(ours, ddim_of_diffusers(reference, spacing, steps, 0.0, True))
    mended = error_of(ours, ddim_of_diffusers(reference, spacing, steps, 0.0, True, gaps=True))
    print(f"{spacing}: as shipped {as_shipped:.1e}, mended {mended:.1e}")
    assert mended < TOLERANCE < as_shipped


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "quad", "sigmoid"])
def test_every_schedule_and_prediction(schedule, prediction, monkeypatch):
    network, reference = made_up_network(3)
    options = DiffusionConfig(schedule=schedule, prediction=prediction)
    expected = chain_of_diffusers(monkeypatch, scheduler_of(options), reference, 1000)
    assert error_of(our_chain(options, network, 1000), expected) < TOLERANCE


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_float32_products_cost_the_cosine_schedule_its_digits_there(prediction, monkeypatch):
    """diffusers multiplies alphas in float32, among them 1 - 0.999 with four digits left. In float64 it agrees with us."""
    network, reference = made_up_network(3)
    options = DiffusionConfig(schedule="cosine", prediction=prediction)
    ours = our_chain(options, network, 1000)
    scheduler = scheduler_of(options)
    as_shipped = error_of(ours, chain_of_diffusers(monkeypatch, scheduler, reference, 1000))
    scheduler.alphas_cumprod = torch.from_numpy(
        build_process(Config(diffusion=options)).schedule.alphas_cumprod
    )
    in_double = error_of(ours, chain_of_diffusers(monkeypatch, scheduler, reference, 1000))
    print(f"as shipped {as_shipped:.1e}, with products in float64 {in_double:.1e}")
    assert in_double < TOLERANCE < as_shipped < 10 * TOLERANCE


def test_a_schedule_without_a_name_there_goes_as_its_betas(monkeypatch):
    network, reference = made_up_network(3)
    for schedule in ("warmup10", "const", "warmup50"):
        options = DiffusionConfig(schedule=schedule, timesteps=100, beta_end=0.1)
        expected = chain_of_diffusers(monkeypatch, scheduler_of(options), reference, 100)
        assert error_of(our_chain(options, network, 100), expected) < TOLERANCE


def test_without_clipping(monkeypatch):
    """Of a chain whose start still has signal, so that nothing blows up."""
    network, reference = made_up_network(3)
    options = DiffusionConfig(timesteps=300, variance="fixed_small")
    expected = chain_of_diffusers(
        monkeypatch, scheduler_of(options, clip_sample=False), reference, 300
    )
    assert np.abs(expected).max() > 2
    assert error_of(our_chain(options, network, 300, clip=False), expected) < TOLERANCE


def test_fixed_large_log_is_broken_there(monkeypatch):
    """diffusers takes the square root of a logarithm (its issue 14569): NaN. Imported, it is the fixed_large that it means."""
    _, reference = made_up_network(3)
    scheduler = DDPMScheduler(variance_type="fixed_large_log")
    assert np.isnan(chain_of_diffusers(monkeypatch, scheduler, reference, 10)).all()
    settings = layout.scheduler_settings(
        Path("scheduler_config.json"), {"variance_type": "fixed_large_log"}
    )
    assert settings["diffusion.variance"] == "fixed_large"


def test_learned_is_a_variance_there_and_its_logarithm_here(monkeypatch):
    """The paper's code emits log-variances. diffusers takes the square root of what it is given: fed with exp, it agrees."""
    network, reference = made_up_network(6, level=-6.0)

    def exponentiated(x, t):
        prediction, raw = reference(x, t).chunk(2, dim=1)
        return torch.cat([prediction, torch.exp(raw)], dim=1)

    expected = chain_of_diffusers(
        monkeypatch, DDPMScheduler(variance_type="learned"), exponentiated, 1000
    )
    ours = our_chain(DiffusionConfig(variance="learned"), network, 1000)
    assert error_of(ours, expected) < TOLERANCE
    with pytest.raises(WeightsError, match="variance=learned: it reads a variance"):
        layout.scheduler_config(Config(diffusion=DiffusionConfig(variance="learned")))


# ---------------------------------------------------------------------------------------------- a pipeline


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory) -> Path:
    """A network of two levels, a minute short of good: trained enough that its samples are no noise."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = Config(
        data=DataConfig(name="digits", image_size=8, channels=1, flip=False),
        model=UNetConfig(
            base_channels=16,
            channel_mult=(1, 2),
            blocks_per_level=1,
            attention_resolutions=(4,),
            group_norm_groups=8,
            dropout=0.0,
        ),
        diffusion=DiffusionConfig(timesteps=200, beta_end=0.08),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        train=TrainConfig(
            steps=150,
            batch_size=64,
            ema_decays=(0.95,),
            ema_warmup=True,
            eval_images=0,
            sample_every=0,
        ),
    )
    assert train(config, workdir, data_dir=Path("data"), devices=Devices(jax.devices()[:1])) == 0
    return workdir


def test_a_model_trained_here_draws_the_same_images_in_ddpm_pipeline(
    trained_run, tmp_path, monkeypatch
):
    export_script.main(
        [f"--workdir={trained_run}", "--layout=diffusers", f"--output={tmp_path / 'exported'}"]
    )
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)
    devices = Devices(jax.devices()[:1])
    trained = open_trained(trained_run, devices)
    indices = np.arange(4)
    generator = build_generator(trained.config, devices, batch_size=4)
    (ours,) = generator(trained.params, seed=3, indices=indices)

    keys = jax.vmap(lambda i: jax.random.fold_in(stream_key(3, Stream.SAMPLES), i))(
        jnp.asarray(indices, jnp.uint32)
    )
    draws = iter(
        first(np.asarray(initial_noise(keys, ours.shape[1:], t)))
        for t in range(trained.config.diffusion.timesteps, 0, -1)
    )
    for module in (pipeline_module, ddpm_module):
        monkeypatch.setattr(module, "randn_tensor", lambda *shape, **options: next(draws))
    theirs = pipeline(
        batch_size=4, num_inference_steps=trained.config.diffusion.timesteps, output_type="np"
    ).images
    error = np.abs(np.clip((ours + 1) / 2, 0, 1) - theirs).max()
    print(f"largest difference {error * 255:.4f} grey levels; images spread {theirs.std():.2f}")
    assert theirs.std() > 0.2 and math.isfinite(error)
    assert error <= 1 / 255
    raw = open_trained(trained_run, devices, weights="raw").params
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(raw), jax.tree.leaves(trained.params))
    )


def test_the_pipeline_notices_other_weights(trained_run, tmp_path):
    """Raw weights, exported, are not the averages: what a silent flag in a conversion once got wrong elsewhere."""
    states = []
    for weights in ("ema", "raw"):
        folder = tmp_path / weights
        flags = [
            f"--workdir={trained_run}",
            "--layout=diffusers",
            f"--output={folder}",
            f"--weights={weights}",
        ]
        export_script.main(flags)
        states.append(DDPMPipeline.from_pretrained(folder).unet.state_dict())
    assert any((states[0][name] != states[1][name]).any() for name in states[0])


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_betas_that_end_in_noise_are_those_of_diffusers(schedule):
    """Ours against its function in float64, and against its scheduler, whose products are float32."""
    options = {"beta_schedule": schedule, "prediction_type": "v_prediction"}
    scheduler = DDPMScheduler(**options, rescale_betas_zero_snr=True)
    settings = layout.scheduler_settings(Path("x.json"), dict(scheduler.config))
    fields = {
        name.removeprefix("diffusion."): value
        for name, value in settings.items()
        if name.startswith("diffusion.")
    }
    assert fields["zero_terminal_snr"] is True
    ours = build_process(Config(diffusion=DiffusionConfig(**fields))).schedule.betas
    plain = DiffusionConfig(**fields | {"zero_terminal_snr": False})
    before = torch.from_numpy(build_process(Config(diffusion=plain)).schedule.betas)
    theirs = ddpm_module.rescale_zero_terminal_snr(before).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-14)
    assert ours[-1] == theirs[-1] == 1
    np.testing.assert_allclose(ours, scheduler.betas.numpy(), rtol=1e-3, atol=1e-6)


def test_options_that_the_process_does_not_have_are_refused():
    path = Path("scheduler_config.json")
    for field, value in {
        "trained_betas": [0.1, 0.3, 0.2],
        "beta_schedule": "laplace",
        "thresholding": True,
        "rescale_betas_zero_snr": True,
        "clip_sample_range": 2.0,
        "prediction_type": "flow",
        "variance_type": "learned",
    }.items():
        with pytest.raises(WeightsError, match=f"scheduler_config.json: {field}"):
            layout.scheduler_settings(path, dict(DDPMScheduler().config) | {field: value})
    assert (
        layout.scheduler_settings(path, dict(DDPMScheduler().config))["diffusion.variance"]
        == "fixed_small"
    )
    ddim = layout.scheduler_settings(
        path,
        dict(DDIMScheduler(timestep_spacing="trailing").config) | {"_class_name": "DDIMScheduler"},
    )
    assert (ddim["sampling.sampler"], ddim["sampling.spacing"], ddim["sampling.rederive_eps"]) == (
        "ddim",
        "trailing",
        False,
    )
