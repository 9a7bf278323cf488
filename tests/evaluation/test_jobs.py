"""What evaluations leave behind: records that say what they are of, in files of their own."""

from __future__ import annotations

import csv
import dataclasses
import functools
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.build import build_process
from ddpm_jax.config import Config
from ddpm_jax.data.load import load_source
from ddpm_jax.diffusion.bound import rate_distortion as curve_of
from ddpm_jax.diffusion.bound import timestep_strata
from ddpm_jax.evaluation import (
    inputs,
    jobs,
    memorisation,
    rate_distortion,
    reconstruction,
    references,
)
from ddpm_jax.evaluation.image_sets import of_array
from ddpm_jax.evaluation.jobs import evaluate
from ddpm_jax.evaluation.memorisation import AuditSets
from ddpm_jax.evaluation.nll import Estimate, Nll, Protocol
from ddpm_jax.evaluation.options import EvaluationOptions
from ddpm_jax.evaluation.references import Reference
from ddpm_jax.images import load_png, save_npz
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.workdir import claim_workdir
from ddpm_jax.trained import Trained
from ddpm_jax.training.state import init_state
from tests.support.inception import pictures, save_layers
from tests.support.tiny import tiny_config

CONFIG, ONE = tiny_config(), Devices(jax.devices()[:1])


def run_of(config: Config, folder: Path) -> Path:
    claim_workdir(folder, config)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, init_state(config).replace(step=jnp.int32(3)))
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(CONFIG, tmp_path_factory.mktemp("run"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the generator draw noise of the seed and of what it is built with."""

    def build(config, devices, **how):
        sampling = sum(map(ord, str(config.sampling)))

        def draw(params, *, seed: int, indices: np.ndarray, labels: None) -> np.ndarray:
            first = float(jax.tree.leaves(params)[0].ravel()[0])
            random = np.random.default_rng([seed, sampling, int(abs(first) * 1e9)])
            return random.uniform(-1, 1, (len(indices), 8, 8, 1)).astype(np.float32)

        return types.SimpleNamespace(draw=draw, sampler=types.SimpleNamespace(steps=20))

    monkeypatch.setattr(inputs, "build_generator", build)


@pytest.fixture
def nll(monkeypatch: pytest.MonkeyPatch) -> Nll:
    """Return a bound of two images and three strata; nothing is plotted."""
    monkeypatch.setattr(rate_distortion, "save_plot", lambda *_: None)
    strata, some = timestep_strata(build_process(CONFIG).schedule, 3), Estimate(1.0, 0.1)
    term = np.array([0.3, 0.2, 0.1])
    curve = curve_of(strata, 0.0, term, 0 * term, term)
    return Nll(strata, *[some] * 4, term, 0 * term, curve, images=2, seconds=1.0)


def images_of(split: str) -> np.ndarray:
    return load_source(CONFIG.data, "data", split).images


def rows_of(path: Path) -> list[list[str]]:
    with path.open() as file:
        return list(csv.reader(file))


def test_a_likelihood_keeps_its_curve_whatever_is_measured_after_it(
    nll: Nll, tmp_path: Path
) -> None:
    """Each has terms of its own here, and still has them when all are written."""
    trained = Trained(CONFIG, None, "ema 0.9", 3)
    curves = {}
    protocols = [Protocol(), Protocol(clip=False), Protocol(cdf="erf"), Protocol(seed=1)]
    for number, protocol in enumerate(protocols):
        own = dataclasses.replace(nll, term=nll.term + number)
        record = rate_distortion.report(own, protocol, trained, "test", tmp_path)
        curves[tmp_path / record["curve"]] = own.term[0]
    assert len(curves) == 4
    for path, term in curves.items():
        assert float(rows_of(path)[-1][3]) == pytest.approx(term)
    names = sorted(path.name for path in curves)
    assert names[0] == "nll_test_step3_ema0.9_2x3_clip_erf_seed0.csv"
    assert "nll_test_step3_ema0.9_2x3_unclipped_tanh_seed0.csv" in names
    assert "nll_test_step3_ema0.9_2x3.csv" not in names  # as files were called before


def test_each_line_of_a_curve_is_of_one_stratum(nll: Nll, tmp_path: Path) -> None:
    """With t falling in all columns, while terms and their errors come with t rising."""
    own = dataclasses.replace(nll, term_error=np.array([0.03, 0.02, 0.01]))
    rate_distortion.save_csv(tmp_path / "nll.csv", own)
    names, *rows = rows_of(tmp_path / "nll.csv")
    columns = dict(zip(names, np.array(rows, float).T, strict=True))
    t = own.strata.first + (own.strata.size - 1) / 2
    expected = {
        "t": t,
        "timesteps": own.strata.size,
        "reverse_steps": 20 - t,
        "term": own.term,
        "term_standard_error": own.term_error,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name], values[::-1], rtol=1e-8, err_msg=name)
    np.testing.assert_allclose(columns["rate"], own.curve.rate, rtol=1e-8)
    np.testing.assert_allclose(columns["rmse"], own.curve.rmse, rtol=1e-8)


def test_an_audit_keeps_its_pairs_whatever_is_measured_after_it(workdir: Path, drawn: None) -> None:
    """The distances of each record are in its file when all are written."""
    common = {"metrics": ("audit",), "workdir": workdir, "num_images": 4, "reference_images": 30}
    changes = [
        {},
        {"seed": 1},
        {"weights": "raw"},
        {"sampler": "ddim"},
        {"reference_images": 20},
    ]
    files = {}
    for change in changes:
        (record,) = evaluate(EvaluationOptions(**common | change), ONE)
        path = workdir / record["pairs"]
        assert path not in files
        files[path] = rows_of(path)
        assert path.with_suffix(".png").is_file()
    for path, rows in files.items():
        assert rows_of(path) == rows
    assert next(iter(files)).name.startswith("audit_pixels_step3_ema0.9_ancestral20_seed0_4_")
    (again,) = evaluate(EvaluationOptions(**common), ONE)
    assert workdir / again["pairs"] == next(iter(files))  # the same protocol has the same file


def test_an_audit_holds_samples_against_images_that_were_not_trained_on(
    workdir: Path, tmp_path: Path
) -> None:
    """Held-out images are as near as held-out images; those of the training set are suspects."""
    train, test = images_of("train"), images_of("test")
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
    found = []
    for name, samples in (("test.npz", test), ("train.npz", train[:30])):
        save_npz(tmp_path / name, samples)
        options = EvaluationOptions(
            metrics=("audit",), workdir=workdir, samples=tmp_path / name, num_images=len(samples)
        )
        found += evaluate(options, ONE)
    assert [record["value"] for record in found] == [0.5, 1]
    assert found[0]["suspects"] < 0.02 and found[1]["suspects"] == 1
    assert [record["held_out_images"] for record in found] == [len(test), 30]


def test_each_sample_of_an_audit_is_beside_its_own_image(tmp_path: Path) -> None:
    """Samples are training images in another order: all are equal to what they lie nearest to."""
    train = pictures(15, channels=1)
    order = np.random.default_rng(0).permutation(15)
    sets = AuditSets(
        of_array(train[order], {}), of_array(train, {}), of_array(pictures(5, channels=1), {})
    )
    audit = memorisation.audit_pixels(sets)
    memorisation.save_csv(tmp_path / "audit.csv", audit)
    memorisation.save_pairs(tmp_path / "audit.png", audit, sets)
    _, *rows = rows_of(tmp_path / "audit.csv")
    assert rows == [[str(sample), str(image), "0"] for sample, image in enumerate(order)]
    picture = load_png(tmp_path / "audit.png")
    above, below = picture[:64], picture[-64:]
    np.testing.assert_array_equal(above, below)
    np.testing.assert_array_equal(above[::8, :64:8], train[order[0]])


def test_audits_of_samples_by_the_same_name_have_files_of_their_own(
    workdir: Path, tmp_path: Path
) -> None:
    pairs = []
    for number in (1, 2):
        path = tmp_path / str(number) / "samples.npz"
        path.parent.mkdir()
        save_npz(path, pictures(4, channels=1, seed=number))
        options = {"metrics": ("audit",), "samples": path, "reference_images": 30}
        (record,) = evaluate(EvaluationOptions(workdir=workdir, **options), ONE)
        pairs.append(record["pairs"])
    assert pairs[0] != pairs[1]
    assert all(pair.startswith("evaluations/audit_pixels_samples_4_") for pair in pairs)


def test_samples_are_kept_under_all_that_they_depend_on(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of any of it draws again, and a repetition does not."""
    asked = []

    def draw(params, *, seed: int, indices: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        asked.append(indices)
        return np.zeros((len(indices), 8, 8, 1), np.float32)

    generator = types.SimpleNamespace(draw=draw)
    monkeypatch.setattr(inputs, "build_generator", lambda *_, **__: generator)
    monkeypatch.setattr(inputs, "open_trained", functools.cache(inputs.open_trained))

    def draws(run: Path, change: dict) -> int:
        before = len(asked)
        options = EvaluationOptions(metrics=("pixels",), workdir=run, num_images=2, **change)
        assert len(inputs.Inputs(options, ONE).samples) == 1
        return len(asked) - before

    ddim, deis = ({"sampler": name, "steps": 4} for name in ("ddim", "deis"))
    changes = [{"eta": 0.5}, {"clip": False}, {"spacing": "trailing"}, {"dynamic_threshold": 0.9}]
    of_samplers = [ddim, *(ddim | change for change in changes), deis, deis | {"order": 3}]
    of_classes = [{}, {"guidance": 2.0}, {"label": (1,)}, {"label": (2,)}]
    classes = run_of(tiny_config(model={"num_classes": 4}), tmp_path / "classes")
    for run, protocols in ((workdir, of_samplers), (classes, of_classes)):
        for expected in (1, 0):
            count = [draws(run, protocol) for protocol in protocols]
            assert count == [expected] * len(protocols)


@pytest.mark.parametrize("asked, batch", [(500, 256), (1024, 512)])
def test_samples_are_drawn_in_even_batches(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, asked: int, batch: int
) -> None:
    """A block on disk is 512 samples, whatever is drawn at once: a batch fills as little of it."""
    built = []

    class Built(Exception):
        """A generator was asked for."""

    def build(config, devices, *, batch_size: int, **_: object) -> None:
        built.append(batch_size)
        raise Built

    monkeypatch.setattr(inputs, "build_generator", build)
    options = EvaluationOptions(
        metrics=("pixels",), workdir=workdir, num_images=1000, batch_size=asked
    )
    with pytest.raises(Built):
        _ = inputs.Inputs(options, ONE).samples
    assert built == [batch]


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_metric_sees_the_split_that_was_asked_for(
    workdir: Path, nll: Nll, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    seen = []
    monkeypatch.setattr(jobs, "evaluate_nll", lambda *args, **_: seen.append(args[2]) or nll)
    monkeypatch.setattr(
        reconstruction,
        "reconstruction_errors",
        lambda *args, **_: seen.append(args[2]) or np.ones(4),
    )
    options = EvaluationOptions(metrics=("nll", "reconstruction"), workdir=workdir, split=split)
    evaluate(options, ONE)
    own = images_of(split)
    assert len(seen) == 2
    for source in seen:
        np.testing.assert_array_equal(source.images, own)

    save_npz(tmp_path / "own.npz", own)
    same, other = (
        evaluate(
            EvaluationOptions(
                metrics=("pixels",),
                workdir=workdir,
                samples=tmp_path / "own.npz",
                reference=reference,
            ),
            ONE,
        )[0]["value"]
        for reference in (split, {"train": "test", "test": "train"}[split])
    )
    assert same < 1e-9 < 1e-3 < other


def fid_of_three_layers(workdir: Path, folder: Path, **fields: Any) -> EvaluationOptions:
    """The options of an FID by a network that is written to `folder`."""
    save_layers(folder / "three.npz")
    return EvaluationOptions(
        metrics=("fid",),
        workdir=workdir,
        features="64",
        inception=folder / "three.npz",
        cache=folder,
        **fields,
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_reference_of_a_split_is_of_its_images(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    known, seen = Reference(None, None, None, {}), []
    monkeypatch.setattr(references, "look_up", lambda *args: seen.append(args[2]) or known)
    monkeypatch.setattr(references, "check", lambda *_: None)
    options = fid_of_three_layers(workdir, tmp_path, reference=split)
    inputs.Inputs(options, ONE).reference()
    (images,) = seen
    assert images.description["split"] == split
    np.testing.assert_array_equal(images.read(np.arange(images.count)), images_of(split))


def test_records_of_the_network_name_it_beside_samples_of_others(
    workdir: Path, nll: Nll, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound and the reconstruction are the run's; the distance is that of the samples."""
    monkeypatch.setattr(jobs, "evaluate_nll", lambda *_, **__: nll)
    monkeypatch.setattr(reconstruction, "reconstruction_errors", lambda *_, **__: np.ones(4))
    save_npz(tmp_path / "own.npz", load_source(CONFIG.data, "data", "train").images[:4])
    options = EvaluationOptions(
        metrics=("nll", "reconstruction", "pixels"),
        workdir=workdir,
        samples=tmp_path / "own.npz",
        num_images=4,
        reference_images=30,
    )
    *of_network, of_samples = evaluate(options, ONE)
    for record in of_network:
        assert (record["weights"], record["step"]) == ("ema 0.9", 3)
    assert "weights" not in of_samples and "step" not in of_samples
    assert {record["data"] for record in (*of_network, of_samples)} == {"digits"}


@pytest.mark.parametrize("count, whole", [(None, True), (30, False), (10_000, True)])
def test_a_reference_says_whether_it_is_of_the_whole_split(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int | None, whole: bool
) -> None:
    known = Reference(None, None, None, {})
    monkeypatch.setattr(references, "look_up", lambda *_: known)
    monkeypatch.setattr(references, "check", lambda *_: None)
    options = fid_of_three_layers(workdir, tmp_path, reference_images=count)
    assert inputs.Inputs(options, ONE).reference().whole == whole
