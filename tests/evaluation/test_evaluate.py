"""Test the bound over a split: the same on any devices and in any batches.

It comes with its protocol, or there is one clear line and no number.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ddpm_jax.build import denoiser, init_params
from ddpm_jax.config import Config
from ddpm_jax.data.load import load_source
from ddpm_jax.data.source import ArraySource
from ddpm_jax.diffusion.randomness import Stream, example_keys, stream_key
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import jobs, reconstruction
from ddpm_jax.evaluation.jobs import evaluate
from ddpm_jax.evaluation.nll import Estimate, EvaluationError, Nll, Protocol, evaluate_nll
from ddpm_jax.evaluation.options import EvaluationOptions
from ddpm_jax.evaluation.rate_distortion import save_csv, table_4
from ddpm_jax.evaluation.reconstruction import reconstruction_errors, report
from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.reproduction import ledger
from ddpm_jax.reproduction.records import recorded
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.evaluations import append_evaluation, read_evaluations
from ddpm_jax.runs.workdir import claim_workdir
from ddpm_jax.trained import Trained
from ddpm_jax.training.state import init_state
from tests.support.commands import command_module as script
from tests.support.tiny import images, tiny_config


def measure(
    config: Config, source: ArraySource, devices: int, batch_size: int, params=None, **protocol
) -> Nll:
    chosen = Devices(jax.devices()[:devices])
    params = chosen.replicate(init_params(config) if params is None else params)
    return evaluate_nll(
        config, params, source, chosen, protocol=Protocol(**protocol), batch_size=batch_size
    )


def test_bound_does_not_depend_on_batches_or_devices() -> None:
    """Measure 13 images at 5 of 20 timesteps each: the last batch is short everywhere.

    On 8 devices most of it is filling.
    """
    config = tiny_config()
    source = ArraySource(images(config, 13))
    nlls = [
        measure(config, source, *layout, num_timesteps=5) for layout in ((1, 13), (1, 5), (8, 8))
    ]
    assert {nll.images for nll in nlls} == {13}
    for nll in nlls[1:]:
        np.testing.assert_allclose(nll.term, nlls[0].term, rtol=1e-4)
        np.testing.assert_allclose(nll.term_error, nlls[0].term_error, rtol=1e-3)
        np.testing.assert_allclose(nll.curve.rmse, nlls[0].curve.rmse, rtol=1e-4)
        np.testing.assert_allclose(
            dataclasses.astuple(nll.total), dataclasses.astuple(nlls[0].total), rtol=1e-4
        )


@pytest.mark.parametrize("clip", [True, False])
def test_bound_is_that_of_the_equations_written_out(clip: bool) -> None:
    """Compare with eqs. 5, 7, 12 and 13 in float64 NumPy, pixel by pixel, at the same x_t."""
    config = tiny_config(diffusion={"timesteps": 6, "beta_start": 1e-3, "variance": "fixed_large"})
    source, params = ArraySource(images(config, 3)), init_params(config)
    nll = measure(config, source, 1, 3, params, cdf="erf", clip=clip, seed=7)

    betas = np.linspace(1e-3, 0.2, 6)
    alphas_cumprod = np.cumprod(1 - betas)
    network = jax.jit(lambda x, t: denoiser(config)(params)(x, t))
    keys = example_keys(stream_key(7, Stream.LIKELIHOOD), jnp.arange(3, dtype=jnp.uint32))
    x0 = source.images / 127.5 - 1
    total = np.zeros(3)
    for t in range(6):
        draw = [jax.random.normal(jax.random.fold_in(key, t), x0.shape[1:]) for key in keys]
        ab, before = alphas_cumprod[t], np.append(1, alphas_cumprod)[t]
        x_t = np.sqrt(ab) * x0 + np.sqrt(1 - ab) * np.array(draw)
        eps = np.asarray(network(jnp.asarray(x_t, jnp.float32), jnp.full(3, t)), np.float64)
        guess = (x_t - np.sqrt(1 - ab) * eps) / np.sqrt(ab)
        guess = np.clip(guess, -1, 1) if clip else guess

        on_x0, on_x_t = (
            np.sqrt(before) * betas[t] / (1 - ab),
            np.sqrt(1 - betas[t]) * (1 - before) / (1 - ab),
        )
        guessed_mean, true_mean = (on_x0 * x + on_x_t * x_t for x in (guess, x0))
        if t:
            true, model = betas[t] * (1 - before) / (1 - ab), betas[t]
            kl = (
                np.log(model / true) / 2
                + (true + (true_mean - guessed_mean) ** 2) / (2 * model)
                - 0.5
            )
            total += kl.mean(axis=(1, 2, 3)) / np.log(2)
        else:
            std = np.sqrt(betas[1] * (1 - alphas_cumprod[0]) / (1 - alphas_cumprod[1]))
            upper = scipy.stats.norm.cdf(
                np.where(x0 > 0.999, np.inf, x0 + 1 / 255), guessed_mean, std
            )
            lower = scipy.stats.norm.cdf(
                np.where(x0 < -0.999, -np.inf, x0 - 1 / 255), guessed_mean, std
            )
            decoder = -np.log2(np.maximum(upper - lower, 1e-12)).mean(axis=(1, 2, 3))
            total += decoder
    ab = alphas_cumprod[-1]
    total += (ab * x0**2 + (1 - ab) - 1 - np.log(1 - ab)).mean(axis=(1, 2, 3)) / 2 / np.log(2)
    np.testing.assert_allclose(nll.total.mean, total.mean(), rtol=1e-3)
    np.testing.assert_allclose(
        nll.total.standard_error, total.std(ddof=1) / math.sqrt(3), rtol=5e-3
    )
    np.testing.assert_allclose(nll.decoder.mean, decoder.mean(), rtol=1e-3)


def test_parts_add_up_and_the_estimate_agrees_with_all_terms() -> None:
    config = tiny_config(diffusion={"timesteps": 30, "beta_end": 0.2})
    source = ArraySource(images(config, 24))
    whole, estimate = (measure(config, source, 1, 24, num_timesteps=count) for count in (0, 8))
    for nll in (whole, estimate):
        np.testing.assert_allclose(
            nll.total.mean, nll.prior.mean + nll.middle.mean + nll.decoder.mean, rtol=1e-12
        )
        np.testing.assert_allclose(
            nll.total.mean, nll.prior.mean + nll.strata.size @ nll.term, rtol=1e-12
        )
        np.testing.assert_allclose(nll.rate + nll.decoder.mean, nll.total.mean, rtol=1e-12)
    np.testing.assert_allclose(whole.curve.rate[-1], whole.rate, rtol=1e-12)
    # A step of the curve is the term that was just sent.
    np.testing.assert_allclose(whole.curve.rate[0], whole.prior.mean, rtol=1e-12)
    np.testing.assert_allclose(np.diff(whole.curve.rate), whole.term[:0:-1], rtol=1e-9)
    # The same images and, at t = 0, the same noise: the two differ by the timesteps drawn.
    np.testing.assert_allclose(estimate.decoder.mean, whole.decoder.mean, rtol=1e-5)
    assert abs(estimate.total.mean - whole.total.mean) < 3 * math.hypot(
        estimate.total.standard_error, whole.total.standard_error
    )
    assert estimate.middle.standard_error > whole.middle.standard_error
    assert [steps for steps, _, _ in table_4(whole)] == [30, 27, 24, 21, 18, 15, 12, 9, 6, 3]


def test_rows_of_a_curve_add_up_to_its_total(tmp_path: Path) -> None:
    """Each row has its own stratum: its timesteps, whose mean is t, times its term are in the bound."""
    config = tiny_config(diffusion={"timesteps": 30, "beta_end": 0.2})
    nll = measure(config, ArraySource(images(config, 4)), 1, 4, num_timesteps=6)
    save_csv(tmp_path / "curve.csv", nll)
    t, size, steps, term = np.loadtxt(
        tmp_path / "curve.csv", delimiter=",", skiprows=1, usecols=range(4), unpack=True
    )
    assert size.sum() == 30 and len(set(size)) > 2
    below = np.append(np.cumsum(size[::-1])[::-1][1:], 0)  # timesteps of the rows that follow
    np.testing.assert_allclose(t, below + (size - 1) / 2)
    np.testing.assert_allclose(steps, 30 - t)
    np.testing.assert_allclose(nll.prior.mean + size @ term, nll.total.mean, rtol=1e-6)


@pytest.mark.parametrize("clip", [None, True, False])
def test_the_protocol_is_that_of_the_options(workdir: Path, monkeypatch, clip: bool | None) -> None:
    """A bound clips as the paper's does where nothing is said."""
    seen = []

    def stop(*args, protocol: Protocol, **options) -> None:
        seen.append(protocol)
        raise EvaluationError("seen")

    monkeypatch.setattr(jobs, "evaluate_nll", stop)
    options = EvaluationOptions(
        metrics=("nll",), workdir=workdir, num_timesteps=5, clip=clip, cdf="erf", seed=3
    )
    with pytest.raises(EvaluationError, match="seen"):
        evaluate(options, Devices(jax.devices()[:1]))
    assert seen == [Protocol(5, clip is not False, "erf", 3)]


def codes_written_out(config: Config, params, x: np.ndarray) -> np.ndarray:
    """Go from x_0 to x_T and back by eq. 13 of the DDIM paper in float64, all T steps.

    The network is asked for eps where a step starts.
    """
    levels = np.concatenate(
        [
            [1],
            np.cumprod(1 - np.linspace(config.diffusion.beta_start, config.diffusion.beta_end, 20)),
        ]
    )
    network = jax.jit(denoiser(config)(params, None))

    def ask(x, t):
        return np.asarray(
            network(jnp.asarray(x, jnp.float32), jnp.full(len(x), max(t, 0))), np.float64
        )

    way = [(t - 1, t) for t in range(20)] + [(t, t - 1) for t in range(19, -1, -1)]
    for t, to in way:
        eps, a, b = ask(x, t), levels[t + 1], levels[to + 1]
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - b) * eps
    return x


def test_reconstruction_is_that_of_the_equations_whatever_the_batches() -> None:
    """Take random weights, which are no inverse of themselves: each image has its own error."""
    config = tiny_config()
    source, params = ArraySource(images(config, 13)), init_params(config)
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    x = source.images / 127.5 - 1
    expected = np.square((codes_written_out(config, params, x) - x) / 2).mean((1, 2, 3))
    assert expected.min() > 1e-4
    for count, batch_size in ((1, 13), (1, 5), (8, 8)):
        chosen = Devices(jax.devices()[:count])
        errors = reconstruction_errors(
            config, chosen.replicate(params), source, chosen, batch_size=batch_size
        )
        np.testing.assert_allclose(errors, expected, rtol=2e-3)
    assert (
        len(
            reconstruction_errors(
                config, chosen.replicate(params), source, chosen, num_images=3, batch_size=8
            )
        )
        == 3
    )


def test_an_estimate_is_a_mean_and_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(3, 2, 10_000)
    estimate = Estimate.of(values)
    assert abs(estimate.mean - 3) < 4 * 0.02
    np.testing.assert_allclose(estimate.standard_error, 0.02, rtol=0.05)
    assert math.isnan(Estimate.of(values[:1]).standard_error)


def test_classes_reach_the_network() -> None:
    config = tiny_config(model={"num_classes": 3})
    params = jax.tree.map(lambda leaf: leaf + 0.05, init_params(config))
    pixels = images(config, 4)
    first, second = (
        measure(config, ArraySource(pixels, np.array(labels, np.int32)), 1, 4, params).total.mean
        for labels in ([0, 0, 0, 0], [2, 2, 2, 2])
    )
    assert first != second


def test_images_without_labels_are_those_of_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """As label_dropout trains them: the class after the last; without it they are refused."""
    config = tiny_config(model={"num_classes": 3, "label_dropout": 0.1})
    pixels, one = images(config, 2), Devices(jax.devices()[:1])
    network = Network(
        lambda key: {},
        lambda params, x, t, labels, dropout: x * labels[:, None, None, None] / 9,
        lambda params: params,
    )

    def bound(labels: list[int] | None) -> float:
        source = ArraySource(pixels, labels and np.array(labels, np.int32))
        options = {"protocol": Protocol(num_timesteps=2), "network": network}
        return evaluate_nll(config, {}, source, one, **options).total.mean

    assert bound(None) == bound([3, 3])
    asked = []

    def draw(params: object, *, x: np.ndarray, labels: np.ndarray | None, **_: object):
        asked.append(labels)
        return x

    generator = SimpleNamespace(draw=draw, batch_size=2)
    monkeypatch.setattr(reconstruction, "build_generator", lambda *_, **__: generator)
    plain = ArraySource(pixels)
    np.testing.assert_array_equal(reconstruction_errors(config, {}, plain, one), [0, 0])
    assert asked == [None, None]
    config.model.label_dropout = 0.0
    with pytest.raises(EvaluationError, match="digits has no labels: this network has 3 classes"):
        bound(None)
    with pytest.raises(EvaluationError, match="digits has no labels: this network has 3 classes"):
        reconstruction_errors(config, {}, plain, one)


def test_what_has_no_likelihood_is_refused() -> None:
    config = tiny_config()
    params = init_params(config)
    source = ArraySource(images(config, 4))
    with pytest.raises(EvaluationError, match="split is empty"):
        measure(config, ArraySource(images(config, 0)), 1, 4)
    with pytest.raises(EvaluationError, match="float32: the likelihood is one of 8-bit images"):
        measure(config, ArraySource(source.images.astype(np.float32)), 1, 4)
    with pytest.raises(EvaluationError, match="num_timesteps=21: must be in 2..20"):
        measure(config, source, 1, 4, num_timesteps=21)
    with pytest.raises(EvaluationError, match="cdf=logistic: one of tanh, erf"):
        measure(config, source, 1, 4, cdf="logistic")
    with pytest.raises(
        EvaluationError, match="no likelihood: the bound is not finite at t=.*earlier checkpoint"
    ):
        measure(config, source, 1, 4, jax.tree.map(lambda leaf: leaf * jnp.nan, params))
    assert issubclass(EvaluationError, UserError)


def test_an_unbounded_variance_that_left_float32_is_refused() -> None:
    config = tiny_config(diffusion={"variance": "learned"}, loss={"kind": "vlb"})
    params = init_params(config)
    params["conv_out"]["bias"] = jnp.array([0.0, -200.0])
    source = ArraySource(images(config, 4))
    with pytest.raises(EvaluationError, match="variance=learned is unbounded.*learned_range"):
        measure(config, source, 1, 4, params)


def test_records_are_strict_json(tmp_path: Path) -> None:
    append_evaluation(tmp_path, {"metric": "nll", "total": 3.5})
    append_evaluation(tmp_path, {"metric": "fid", "value": 2})
    first, second = read_evaluations(tmp_path)
    assert first["total"] == 3.5 and second["metric"] == "fid" and second["time"].endswith("Z")
    with pytest.raises(ValueError, match="total not finite"):
        append_evaluation(tmp_path, {"total": math.nan})
    assert len(read_evaluations(tmp_path)) == 2


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("run"), tiny_config()
    claim_workdir(folder, config)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, init_state(config).replace(step=jnp.int32(3)))
    return folder


def unlike_the_paper(workdir: Path) -> set[str]:
    """Return the flags by which the newest record differs from that of the paper's first cell."""
    made = recorded(workdir)[-1]
    paper = ledger.read_json(Path("benchmarks/paper.json"))
    cells = ledger.evaluations(paper, "eps_simple")
    cell = next(one for one in cells if one["metric"] == made["metric"])
    return {line.split()[0] for line in ledger.mismatch(made, cell)}


def test_script_prints_a_table_and_leaves_a_record(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script("evaluate").main(
        [f"--workdir={workdir}", "--metrics=nll", "--num_images=20", "--batch_size=16", "--cdf=erf"]
    )
    printed = capsys.readouterr().out
    assert (
        "digits test, 20 images, 20 of 20 terms, weights ema 0.9, step 3, clip true, "
        "cdf erf, seed 0" in printed
    )
    (record,) = read_evaluations(workdir)
    expected = {
        "metric": "nll",
        "weights": "ema 0.9",
        "step": 3,
        "data": "digits",
        "split": "test",
        "num_images": 20,
    }
    expected |= {
        "num_timesteps": 20,
        "timesteps": 20,
        "clip": True,
        "cdf": "erf",
        "seed": 0,
        "unit": "bits/dim",
    }
    expected |= {"forward_passes": 400}
    assert record | expected == record
    assert unlike_the_paper(workdir) == {"num_images", "cdf"}
    assert f"{record['total']:.5f}" in printed
    rows = list(csv.DictReader((workdir / record["curve"]).read_text().splitlines()))
    assert len(rows) == 20 and [float(row["t"]) for row in rows] == list(range(19, -1, -1))
    np.testing.assert_allclose(
        sum(float(row["term"]) for row in rows) + record["prior"], record["total"], rtol=1e-6
    )
    np.testing.assert_allclose(
        float(rows[-1]["rate"]) + record["decoder"], record["total"], rtol=1e-6
    )
    assert float(rows[-1]["rmse"]) == pytest.approx(record["rmse"])
    assert (workdir / record["curve"]).with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_script_reconstructs(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_evaluations(workdir)
    script("evaluate").main(
        [
            f"--workdir={workdir}",
            "--metrics=reconstruction",
            "--steps=5",
            "--num_images=9",
            "--batch_size=8",
        ]
    )
    printed = capsys.readouterr().out
    assert "digits test, 9 images, 5 steps, spacing linspace, weights ema 0.9, step 3" in printed
    (record,) = read_evaluations(workdir)[len(before) :]
    expected = {
        "metric": "reconstruction",
        "steps": 5,
        "split": "test",
        "num_images": 9,
        "step": 3,
        "weights": "ema 0.9",
    }
    assert record | expected == record
    assert unlike_the_paper(workdir) == {"num_images", "steps"}
    assert f"{record['value']:.6f} +- {record['standard_error']:.6f}" in printed


def test_a_reconstruction_in_sections_has_the_steps_of_its_sections() -> None:
    config = tiny_config(sampling={"spacing": "sections:3,4"})
    record = report(np.ones(2), Trained(config, None, "ema 0.9", 3), "test")
    assert (record["steps"], record["spacing"]) == (7, "sections:3,4")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--metrics=nll,speed", "metrics=speed: any of"),
        ("--num_images=0", "num_images=0: must be at least 1"),
        ("--batch_size=-1", "batch_size=-1: must be at least 1"),
        ("--seed=-1", "seed=-1: must be in"),
        ("--num_timesteps=1", "num_timesteps=1: must be in 2..20"),
        ("--weights=0.5", "weights=0.5: this run has"),
        ("--step=7", "no checkpoint of step 7"),
    ],
)
def test_script_refuses_in_one_line_and_writes_nothing(
    workdir: Path, flag: str, message: str
) -> None:
    before = read_evaluations(workdir)
    with pytest.raises(UserError, match=message) as error:
        script("evaluate").main([f"--workdir={workdir}", "--metrics=nll", flag])
    assert "\n" not in str(error.value)
    assert read_evaluations(workdir) == before


@pytest.mark.slow
def test_coding_script_measures_encodes_and_decodes(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = script("code_images").main
    common = [f"--workdir={workdir}", "--num_images=6"]
    for method in ("lossless", "progressive"):
        main([*common, "--mode=measure", f"--method={method}", "--step_rate=0.3"])
        printed = capsys.readouterr().out
        assert "equal bit for bit" in printed and "PNG, one file each" in printed
        record = read_evaluations(workdir)[-1]
        assert (
            record["metric"] == "coding"
            and record["settings"]["method"] == method
            and record["png_bytes"] > 0
        )
    coded, whole, lossy = tmp_path / "coded.ddpm", tmp_path / "whole.npz", tmp_path / "lossy.npz"
    main([*common, "--mode=encode", "--method=progressive", f"--output={coded}"])
    assert json.loads(coded.read_bytes().split(b"\n")[0])["shape"] == [6, 8, 8, 1]
    for output, flags in ((whole, []), (lossy, ["--rate=1"])):
        main(
            [
                f"--workdir={workdir}",
                "--mode=decode",
                f"--input={coded}",
                f"--output={output}",
                *flags,
            ]
        )
    assert "lossy, from" in capsys.readouterr().out
    pixels = [np.load(path)["arr_0"] for path in (whole, lossy)]
    np.testing.assert_array_equal(
        pixels[0], load_source(tiny_config().data, "data", "test").images[:6]
    )
    assert pixels[1].shape == (6, 8, 8, 1) and (pixels[1] != pixels[0]).any()
    again = tmp_path / "again.ddpm"
    main(
        [
            f"--workdir={workdir}",
            "--mode=encode",
            "--method=progressive",
            f"--images={whole}",
            f"--output={again}",
        ]
    )
    assert again.read_bytes() == coded.read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole.read_bytes()[:100])
    for flags, message in (
        (["--mode=decode", f"--output={tmp_path / 'x.npz'}"], "mode=decode needs input"),
        (["--mode=encode"], "mode=encode needs output"),
        (["--mode=decode", f"--input={coded}", "--output=x.jpg"], "must end in .npz or .png"),
        (["--mode=encode", "--images=none.npz", "--output=x"], "none.npz: no such file"),
        (
            ["--mode=encode", f"--images={tmp_path / 'torn.npz'}", "--output=x"],
            r"torn.npz is damaged or no .npz file .*: name an .npz with an array arr_0",
        ),
    ):
        with pytest.raises(UserError, match=message):
            main([f"--workdir={workdir}", *flags])


def test_flags_have_the_defaults_of_the_options() -> None:
    values = vars(script("evaluate").parser().parse_args([]))
    defaults = {"seeds": None, "metrics": None}  # written as text
    for field in dataclasses.fields(EvaluationOptions):
        expected = defaults.get(field.name, getattr(EvaluationOptions(), field.name))
        assert values[field.name] == expected, field.name


def test_evaluation_from_python(workdir: Path) -> None:
    before = read_evaluations(workdir)
    options = EvaluationOptions(
        metrics=("pixels",), workdir=workdir, num_images=12, sampler="ddim", steps=2, clip=False
    )
    (record,) = evaluate(options, Devices(jax.devices()[:1]))
    (written,) = read_evaluations(workdir)[len(before) :]
    assert {**record, "time": written["time"]} == written
    assert record["samples"]["sampling"]["steps"] == 2
    assert record["samples"]["sampling"]["clip"] is False
    with pytest.raises(EvaluationError, match="metrics: name any of nll"):
        evaluate(EvaluationOptions())
    with pytest.raises(EvaluationError, match="features=2047: one of 64, 192, 768, 2048"):
        EvaluationOptions(features="2047")
