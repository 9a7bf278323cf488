"""Test images from anywhere, statistics with their descent, and all of evaluate.py.

Inception is its first three layers with random weights.
"""

from __future__ import annotations

import dataclasses
import json
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.load import load_source
from ddpm_jax.data.source import ArraySource
from ddpm_jax.errors import DataError, EvaluationError, UserError
from ddpm_jax.evaluation import inputs, references
from ddpm_jax.evaluation.image_sets import of_array, of_split, open_images
from ddpm_jax.evaluation.inception import features as features_file
from ddpm_jax.evaluation.inception.features import Extractor
from ddpm_jax.evaluation.inception.weights import inception_of
from ddpm_jax.evaluation.options import EvaluationOptions
from ddpm_jax.evaluation.quality import measure
from ddpm_jax.evaluation.quality_report import Number, format_numbers, over_seeds
from ddpm_jax.figures.neighbours import nearest_in_features
from ddpm_jax.images import load_png, save_npz, save_png
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.reproduction import ledger
from ddpm_jax.reproduction.records import recorded
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.evaluations import read_evaluations
from ddpm_jax.runs.workdir import claim_workdir
from ddpm_jax.training.state import init_state
from tests.support.commands import command_module as script
from tests.support.inception import pictures, random_layers, save_layers
from tests.support.tiny import tiny_config


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    cache = tmp_path_factory.mktemp("features")
    return Extractor(
        inception_of(random_layers("64"), "three.npz"),
        Devices(jax.devices()[:2]),
        cache=cache,
        batch_size=16,
    )


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "three.npz"
    save_layers(path)
    return path


def split(images: np.ndarray, **fields) -> tuple:
    config = tiny_config(data={"image_size": images.shape[1], "channels": images.shape[3]} | fields)
    return of_split(ArraySource(images), config.data, "train"), config.data


# ------------------------------------------------------------------------------------------- images


def test_images_from_folders_and_files_are_the_same(tmp_path: Path) -> None:
    """Open PNGs by name at any depth, and .npz files: plain, compressed, and stored as samples."""
    images = pictures(5, 6)
    for number, image in enumerate(images):
        save_png(tmp_path / "folder" / ("a" if number < 2 else "b") / f"{number}.png", image)
    save_npz(tmp_path / "plain.npz", images, np.arange(5))
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    with (
        zipfile.ZipFile(tmp_path / "stored.npz", "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array(member, images)
    for name in ("folder", "plain.npz", "small.npz", "stored.npz"):
        result = open_images(tmp_path / name)
        assert result.count == 5 and result.shape == (6, 6, 3)
        np.testing.assert_array_equal(result.read(np.array([4, 0, 2])), images[[4, 0, 2]])
        assert result.first(3).count == 3 and result.first(9).count == 5
    assert open_images(tmp_path / "folder").description == {"folder": "folder", "formats": ".png"}


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_folders_have_the_channels_of_the_run(tmp_path: Path, channels: int) -> None:
    """Grey and RGBA samples are the same whether they lie in a folder or in an .npz."""
    images = pictures(3, channels=channels)
    for number, image in enumerate(images):
        save_png(tmp_path / "folder" / f"{number}.png", image)
    save_npz(tmp_path / "same.npz", images)
    config = tiny_config(data={"channels": channels})
    for name in ("folder", "same.npz"):
        options = EvaluationOptions(config=config, samples=tmp_path / name)
        given = inputs.Inputs(options, Devices(jax.devices()[:1])).given
        assert given.shape == (8, 8, channels)
        np.testing.assert_array_equal(given.read(np.arange(3)), images)


def test_own_samples_say_how_they_were_drawn(tmp_path: Path) -> None:
    save_npz(tmp_path / "x.npz", pictures(2))
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    noted = {
        "config.sampling.steps": 50,
        "config.model.dropout": 0.1,
        "weights": "ema 0.9",
        "step": 7,
        "seed": 1,
        "label": None,
    }
    (parts / "protocol.json").write_text(json.dumps(noted))
    result = open_images(tmp_path / "x.npz")
    assert result.description["drawn"] == {
        "config.sampling.steps": 50,
        "weights": "ema 0.9",
        "step": 7,
        "seed": 1,
        "label": None,
    }
    assert result.describe() == "file x.npz, steps 50, weights ema 0.9, step 7, seed 1"


def test_what_are_no_images_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    save_png(tmp_path / "mixed" / "a.png", pictures(1, 6)[0])
    save_png(tmp_path / "mixed" / "b.png", pictures(1, 8)[0])
    (tmp_path / "torn.npz").write_bytes(b"PK\x05\x06")
    (tmp_path / "text.txt").write_text("x")
    arrays = {
        "floats": pictures(3) / 127.5 - 1,
        "first": pictures(3).transpose(0, 3, 1, 2),
        "flat": pictures(3)[..., 0],
        "zeros": (pictures(3) > 127).astype(np.uint8),
        "objects": np.array([{}], object),
    }
    for name, array in arrays.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
    np.savez(tmp_path / "named.npz", images=pictures(3))
    for name, message in (
        ("none.npz", "none.npz: no such file"),
        ("torn.npz", "torn.npz is damaged"),
        ("named.npz", "named.npz has no array arr_0, only images.npy"),
        ("floats.npz", "pixels are float64; FID is of 8-bit images"),
        ("first.npz", r"shape \[3, 3, 8, 8\]: move the channels to the end"),
        ("flat.npz", r"shape \[3, 8, 8\]: expected \[images, height, width, 1, 3 or 4\]"),
        ("zeros.npz", "pixels are all 0 or 1: scale them to 0..255"),
        ("objects.npz", "objects.npz is damaged"),
        ("text.txt", "a folder of images, or an .npz with arr_0"),
        ("empty", "has no images"),
        ("gone", "no such folder"),
    ):
        with pytest.raises((EvaluationError, DataError), match=message) as error:
            open_images(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(
        EvaluationError, match="b.png is 8x8, a.png is 6x6: bring all to one size first"
    ):
        open_images(tmp_path / "mixed").read(np.arange(2))


# --------------------------------------------------------------------------------------- references


def test_reference_survives_the_disk_with_its_descent(
    extractor: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its moments are of all images, which come in three blocks here."""
    monkeypatch.setattr(features_file, "BLOCK", 7)
    real, data = split(pictures(20))
    built = references.build(extractor, real, "64", most_features=7)
    x = np.concatenate([block.features["64"] for block in extractor.blocks(real, ("64",))]).astype(
        np.float64
    )
    references.save(tmp_path / "ref.npz", built)
    with np.load(tmp_path / "ref.npz") as file:  # the names that pytorch-fid reads
        np.testing.assert_allclose(file["mu"], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(x, rowvar=False), rtol=1e-8, atol=1e-15)
    loaded = references.load(tmp_path / "ref.npz")
    chosen = np.sort(np.random.Generator(np.random.Philox(0)).permutation(20)[:7])
    np.testing.assert_array_equal(loaded.features, x[chosen].astype(np.float32))
    images = loaded.provenance["images"]
    assert (
        images["data"] == "digits"
        and images["split"] == "train"
        and images["crop"] == "none"
        and "no flips" in images["pixels"]
    )
    assert (
        loaded.provenance["count"] == 20
        and loaded.provenance["resize"] == "tf"
        and loaded.provenance["features"] == "64"
    )
    assert loaded.provenance["inception"] == {
        "name": "three.npz",
        "sha256": extractor.weights.sha256,
    }
    assert loaded.file["name"] == "ref.npz" and len(loaded.file["sha256"]) == 64
    references.check(loaded, extractor, "64", real.description)
    same = measure(extractor, real, loaded, ["fid"], "64")
    assert same[0].metric == "FID-64" and 0 <= same[0].value < 1e-6


def test_reference_of_another_kind_is_an_error(extractor: Extractor, tmp_path: Path) -> None:
    real, data = split(pictures(16))
    built = references.build(extractor, real, "64")
    half = Extractor(extractor.weights, extractor.devices, resize="half_pixel")
    other = Extractor(inception_of(random_layers("64", seed=9), "other.npz"), extractor.devices)
    for eyes, tap, own, message in (
        (
            half,
            "64",
            None,
            "made with resize=tf, this is half_pixel: pass that one, or build one that fits",
        ),
        (other, "64", None, r"made with the Inception three.npz \(.{8}\), this is other.npz"),
        (extractor, "2048", None, "has 64 features, these are 2048: pass features=64, or build"),
        (
            extractor,
            "64",
            real.description | {"data": "cifar10"},
            "is of data=digits, this run has data=cifar10",
        ),
        (
            extractor,
            "64",
            real.description | {"crop": "celeba64"},
            "is of crop=none, this run has crop=celeba64",
        ),
    ):
        with pytest.raises(EvaluationError, match=message) as error:
            references.check(built, eyes, tap, own)
        assert "\n" not in str(error.value)
    references.check(built, extractor, "64", None)
    with pytest.raises(EvaluationError, match="samples are 6x6, the reference is of 8x8 images"):
        measure(extractor, of_array(pictures(16, 6), {}), built, ["fid"], "64")
    few = measure(extractor, of_array(pictures(5), {}), built, ["fid"], "64")
    assert few[0].value > 0 and few[0].extra == {}  # nothing to extrapolate from
    with pytest.raises(
        EvaluationError, match=r"reference: 1 image\(s\); a distribution needs at least two"
    ):
        references.build(extractor, real.first(1), "64")


def test_statistics_of_others(extractor: Extractor, tmp_path: Path) -> None:
    """pytorch-fid's file has two arrays and no descent: FID it is good for, KID not."""
    real, _ = split(pictures(16))
    own = references.build(extractor, real, "64")
    np.savez(tmp_path / "others.npz", mu=own.gaussian.mean, sigma=own.gaussian.covariance)
    assert references.has_statistics(tmp_path / "others.npz")
    loaded = references.load(tmp_path / "others.npz")
    references.check(loaded, extractor, "64", real.description)
    samples = of_array(pictures(16, seed=1), {})
    (ours,), (theirs,) = (
        measure(extractor, samples, reference, ["fid"], "64") for reference in (own, loaded)
    )
    assert ours.value == pytest.approx(theirs.value, rel=1e-12)
    assert "nobody noted" in loaded.describe()
    with pytest.raises(EvaluationError, match="KID: the reference has moments only"):
        measure(extractor, samples, loaded, ["kid"], "64")
    np.savez(tmp_path / "mean.npz", mu=np.zeros(3))
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    (tmp_path / "torn.npz").write_bytes(b"nothing")
    for name, message in (
        ("mean.npz", "has no sigma, only mu"),
        ("bad.npz", "bad.npz: statistics: numbers that are not finite"),
        ("torn.npz", "torn.npz is damaged"),
        ("gone.npz", "gone.npz: no such file; build one .* or name train or test"),
    ):
        with pytest.raises(EvaluationError, match=message):
            references.load(tmp_path / name)


def test_reference_of_a_changed_data_set_is_an_error(extractor: Extractor, tmp_path: Path) -> None:
    """Build statistics once, then look them up; one changed pixel must not be answered so."""
    images = pictures(30)
    real, _ = split(images)
    built = references.look_up(tmp_path, extractor, real, "64")
    (path,) = tmp_path.iterdir()
    assert path.name == f"digits_train_8_30_64_tf_{extractor.weights.sha256[:8]}.npz"
    again = references.look_up(tmp_path, extractor, real, "64")
    assert again.file == built.file
    changed, _ = split(images ^ np.uint8(1))
    with pytest.raises(
        EvaluationError, match="is of other images than the split now has: remove it"
    ):
        references.look_up(tmp_path, extractor, changed, "64")


def test_a_reference_of_many_pixels_is_known_by_eight_images(
    extractor: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set prepared anew with another crop has as many images by the same name."""
    images = pictures(30)
    real, _ = split(images)
    built = references.look_up(tmp_path, extractor, real, "64")
    monkeypatch.setattr(references, "SMALL", 0)
    assert references.look_up(tmp_path, extractor, real, "64").file == built.file
    cropped, _ = split(np.roll(images, 1, axis=2))
    with pytest.raises(EvaluationError, match="is of other images than the split now has"):
        references.look_up(tmp_path, extractor, cropped, "64")
    older = dataclasses.replace(built, provenance=built.provenance.copy())
    del older.provenance["eight_sha256"]
    references.check_pixels(older, cropped)  # nothing tells
    monkeypatch.setattr(references, "SMALL", 2**30)
    with pytest.raises(EvaluationError, match="is of other images than the split now has"):
        references.check_pixels(older, cropped)


# ------------------------------------------------------------------------------------------ numbers


def test_names_say_what_a_number_is_not() -> None:
    table = format_numbers(
        [Number("FID-768", 1.5, {"infinity": 1.25, "infinity_standard_error": 0.01})], 2000
    )
    assert not any(line.split()[0] == "FID" for line in table.splitlines())
    assert (
        "FID-768 of 2,000 images, not 50,000: fewer images, larger numbers" in table
        and "1.25" in table
    )
    assert "warning" not in format_numbers([Number("FID", 3.17, {})], 50_000)


def test_several_seeds_give_mean_and_deviation() -> None:
    runs = [
        [Number("FID", value, {"infinity": value - 1, "infinity_standard_error": 0.1})]
        for value in (3.0, 4.0, 8.0)
    ]
    (number,) = over_seeds(runs)
    assert (
        number.value == 5
        and number.extra["infinity"] == 4
        and number.extra["seed_values"] == [3, 4, 8]
    )
    assert number.extra["seed_deviation"] == pytest.approx(np.std([3, 4, 8], ddof=1))
    assert over_seeds(runs[:1]) == runs[0]


def test_errors_of_single_draws_are_not_shown_beside_their_mean() -> None:
    """They would be too large by the root of the number of draws."""
    extra = {"infinity": 1.0, "infinity_standard_error": 0.1, "standard_error": 0.2}
    one = [Number("FID", 3.0, extra)]
    (number,) = over_seeds([one, one])
    assert set(number.extra) == {"infinity", "seed_deviation", "seed_values"}
    assert "standard error" not in format_numbers([number], 50_000)
    assert format_numbers(one, 50_000).count("standard error") == 2


def test_numbers_do_not_depend_on_order_batches_or_devices(
    extractor: Extractor, tmp_path: Path
) -> None:
    real, samples = split(pictures(16))[0], pictures(16, seed=5)
    result = []
    for devices, batch, order in (
        (1, 16, np.arange(16)),
        (8, 8, np.random.default_rng(0).permutation(16)),
    ):
        eyes = Extractor(extractor.weights, Devices(jax.devices()[:devices]), batch_size=batch)
        reference = references.build(eyes, real, "64")
        result.append(measure(eyes, of_array(samples[order], {}), reference, ["fid", "prdc"], "64"))
    for one, many in zip(*result, strict=True):
        assert one.metric == many.metric
        np.testing.assert_allclose(many.value, one.value, rtol=1e-4, atol=1e-9)


# --------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = (
        tmp_path_factory.mktemp("run"),
        tiny_config(sampling={"sampler": "ddim", "steps": 3}),
    )
    claim_workdir(folder, config)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, init_state(config).replace(step=jnp.int32(3)))
    return folder


@pytest.fixture
def evaluate(workdir: Path, inception: Path, tmp_path_factory: pytest.TempPathFactory):
    place = tmp_path_factory.getbasetemp() / "shared"
    common = [
        f"--inception={inception}",
        f"--cache={place / 'cache'}",
        f"--data_dir={place / 'data'}",
        "--batch_size=16",
    ]

    def run(*flags: str, run: Path | None = workdir) -> None:
        script("evaluate").main([*([f"--workdir={run}"] if run else []), *common, *flags])

    return run


def test_script_scores_a_run_and_notes_the_protocol(
    evaluate, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--features=64", "--num_images=40", "--reference_images=40"]
    flags = ["--metrics=fid,kid,prdc", "--seeds=0,1", *common]
    evaluate(*flags)
    evaluate("--metrics=audit", *common)  # of one draw
    printed = capsys.readouterr().out
    records = {record["metric"]: record for record in read_evaluations(workdir)}
    expected = [
        "FID-64",
        "KID-64",
        "precision-64",
        "recall-64",
        "density-64",
        "coverage-64",
        "audit-pixels",
        "audit-features-64",
    ]
    assert list(records) == expected and "FID-64 of 40 images, not 50,000" in printed
    record = records["FID-64"]
    assert (
        record["weights"] == "ema 0.9"
        and record["step"] == 3
        and record["num_images"] == 40
        and record["resize"] == "tf"
    )
    assert (
        record["samples"]["sampling"]["sampler"] == "ddim"
        and record["samples"]["sampling"]["steps"] == 3
    )
    assert record["samples"]["seeds"] == [0, 1] and len(record["seed_values"]) == 2
    assert record["inception"]["name"] == "three.npz" and len(record["inception"]["sha256"]) == 64
    reference = record["reference"]
    assert (
        reference["provenance"]["images"]["split"] == "train"
        and reference["provenance"]["count"] == 40
    )
    paper = ledger.read_json(Path("benchmarks/paper.json"))
    (cell,) = (one for one in ledger.evaluations(paper, "lsun_cat") if one["metric"] == "fid")
    (made,) = (one for one in recorded(workdir) if one["metric"] == "fid-64")
    others = {line.split()[0] for line in ledger.mismatch(made, cell)}
    assert others == {"metric", "sampler", "steps", "num_images", "reference_images"}
    assert len(reference["file"]["sha256"]) == len(reference["provenance"]["pixels_sha256"]) == 64
    pairs = workdir / records["audit-pixels"]["pairs"]
    rows = pairs.read_text().splitlines()
    assert (
        rows[0] == "sample,train_image,distance"
        and len(rows) == 41
        and pairs.with_suffix(".png").is_file()
    )
    (first, _) = sorted((workdir / "evaluations" / "samples").glob("*.npz"))
    assert first.name.startswith("step3_ema0.9_ddim3_seed0_") and np.load(first)["arr_0"].shape == (
        40,
        8,
        8,
        1,
    )

    def blocks() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in first.parent.glob("*.npz")}

    before = blocks()
    evaluate(*flags)
    assert blocks() == before and len(before) == 2  # nothing was drawn again
    again = [record for record in read_evaluations(workdir) if record["metric"] == "FID-64"]
    assert again[1]["value"] == again[0]["value"]


def test_samples_are_of_each_seed_and_of_the_classes_in_turn(tmp_path: Path, monkeypatch) -> None:
    """A generator in the place of the run's own notes what it is asked for."""
    config = tiny_config(model={"num_classes": 4})
    claim_workdir(tmp_path / "run", config)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(0, init_state(config))
    asked = []

    class Generator:
        sampler = types.SimpleNamespace(steps=1)

        def draw(self, params, *, seed: int, indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
            asked.append((seed, indices.tolist(), labels.tolist()))
            return np.zeros((len(indices), 8, 8, 1), np.float32)

    monkeypatch.setattr(inputs, "build_generator", lambda *args, **options: Generator())
    common = {"metrics": ("fid",), "workdir": tmp_path / "run", "num_images": 5}
    for more in ({"seeds": (7, 8)}, {"seed": 9, "label": (3, 1)}):
        options = EvaluationOptions(**common, **more)
        assert len(inputs.Inputs(options, Devices(jax.devices()[:1])).samples) == len(options.draws)
    numbers = list(range(5))
    assert asked == [
        (7, numbers, [0, 1, 2, 3, 0]),
        (8, numbers, [0, 1, 2, 3, 0]),
        (9, numbers, [3, 1, 3, 1, 3]),
    ]


def test_script_scores_images_of_others(
    evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Score a data set's own images, which have no distance to it, by several ways.

    Then score without any run at all.
    """
    own = load_source(tiny_config().data, "data", "train").images[:12]
    save_npz(tmp_path / "own.npz", own)
    for number, image in enumerate(own):
        save_png(tmp_path / "own" / f"{number:03d}.png", image)
    common = ["--metrics=fid", "--features=64", "--reference_images=12"]
    for name in ("own.npz", "own"):
        evaluate(*common, f"--samples={tmp_path / name}")
    save_npz(tmp_path / "noise.npz", pictures(12, channels=1))
    evaluate(
        "--metrics=fid",
        "--features=64",
        f"--samples={tmp_path / 'own'}",
        f"--reference={tmp_path / 'own.npz'}",
        run=None,
    )
    evaluate(
        "--build_reference",
        "--features=64",
        f"--samples={tmp_path / 'noise.npz'}",
        f"--output={tmp_path / 'ref.npz'}",
        run=None,
    )
    reference = f"--reference={tmp_path / 'ref.npz'}"
    evaluate(
        "--metrics=fid", "--features=64", f"--samples={tmp_path / 'own.npz'}", reference, run=None
    )
    assert f"wrote {tmp_path / 'ref.npz'}: noise.npz, 12 images" in capsys.readouterr().out
    records = [record for record in read_evaluations(tmp_path) if record["metric"] == "FID-64"]
    assert records[0]["value"] < 1e-6 < 1e-2 < records[1]["value"]
    assert records[1]["reference"]["provenance"]["images"] == {"file": "noise.npz"}


def test_script_builds_the_reference_of_a_split(evaluate, tmp_path: Path) -> None:
    evaluate(
        "--build_reference",
        "--features=64",
        "--reference=test",
        "--reference_images=25",
        f"--output={tmp_path / 'test.npz'}",
    )
    known = references.load(tmp_path / "test.npz").provenance
    assert known["images"]["split"] == "test" and known["count"] == 25


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--metrics=fid"],
            "FID needs the 2048 features of Inception, and three.npz ends at 64: fetch https://.*features=64",
        ),
        (["--metrics=is"], "Inception Score needs the 1008 class scores"),
        (["--metrics=sfid"], "sFID needs the spatial features"),
        (["--metrics=kid", "--features=768"], "KID-768 needs the 768 features"),
        (
            ["--metrics=fid", "--features=64", "--inception=gone.pth"],
            "inception=gone.pth: no such file",
        ),
        (
            ["--metrics=fid", "--features=64", "--reference=gone.npz"],
            "reference=gone.npz: no such file",
        ),
        (
            ["--metrics=fid", "--features=64", "--samples=gone.npz"],
            "samples=gone.npz: no such file",
        ),
        (
            ["--metrics=fid", "--num_images=1", "--features=64", "--reference_images=50"],
            "FID: 1 images; at least 2 are needed",
        ),
        (
            ["--metrics=fid", "--sampler=ddim", "--samples=x.npz"],
            "sampler: of no use with samples",
        ),
        (["--metrics=fid", "--seeds=0,1", "--samples=x.npz"], "seeds: of no use with samples"),
        (["--metrics=fid", "--guidance=3", "--samples=x.npz"], "guidance: of no use with samples"),
        (["--metrics=pixels", "--seeds=0,1"], "seeds: pixels is of one draw"),
        (["--metrics=kid,audit", "--seeds=0,1"], "seeds: audit is of one draw"),
        (
            ["--metrics=fid", "--config.sampling.steps=50"],
            "--config.sampling.steps=50: of no use without --config: .* --steps, --sampler",
        ),
        (["--metrics=fid", "--steps=99"], "steps"),
        (["--metrics=fid", "--label=1"], "label=1: this run has no classes"),
        (
            ["--metrics=fid", "--guidance=2", "--features=64", "--reference_images=50"],
            "guidance: this run has no classes",
        ),
        (["--metrics=fid", "--config=configs/digits.py"], "config: of no use with workdir"),
        (["--metrics=fid", "--reference_images=0"], "reference_images=0: must be at least 1"),
        (["--metrics=fid", "--seeds=0,-1"], "seed=-1: must be in"),
        (["--metrics=fid", "--build_reference"], "either --metrics or --build_reference"),
        (["--build_reference", "--features=64", "--samples=x.npz"], "needs output"),
        (
            ["--build_reference", "--features=64", "--reference=x.npz"],
            "train or test, or samples",
        ),
    ],
)
def test_script_refuses_in_one_line(
    evaluate, workdir: Path, flags: list[str], message: str
) -> None:
    before = read_evaluations(workdir)
    with pytest.raises(UserError, match=message) as error:
        evaluate(*flags)
    assert "\n" not in str(error.value)
    assert read_evaluations(workdir) == before


def test_script_without_a_run_says_what_it_needs(evaluate, tmp_path: Path) -> None:
    save_npz(tmp_path / "x.npz", pictures(30))
    for flags, message in (
        (["--metrics=fid"], "workdir: which run"),
        (["--metrics=nll", f"--samples={tmp_path / 'x.npz'}"], "workdir: which run"),
        (
            ["--metrics=fid", "--features=64", f"--samples={tmp_path / 'x.npz'}"],
            "the train split of which data set",
        ),
    ):
        with pytest.raises(EvaluationError, match=message):
            evaluate(*flags, run=None)


def test_neighbours_in_features_are_shown_below_those_in_pixels(
    workdir: Path, inception: Path, tmp_path: Path, capsys
) -> None:
    """Check both rows, the printed numbers, and the search against features sorted outright."""
    flags = [
        "--mode=neighbours",
        "--num_images=3",
        "--columns=4",
        "--search=16",
        "--batch_size=8",
        "--labels=false",
        f"--cache={tmp_path}",
        f"--inception={inception}",
    ]
    script("sample").main(
        [f"--workdir={workdir}", *flags, "--space=both", f"--output={tmp_path / 'both.png'}"]
    )
    assert load_png(tmp_path / "both.png").shape == (10 * 6 - 2, 10 * 5 - 2, 1)
    printed = capsys.readouterr().out
    assert (
        printed.count("(RMSE in levels 0..255)") == 3
        and printed.count("(RMSE in 64 Inception features)") == 3
    )
    weights = inception_of(random_layers("64"), "three.npz")
    extractor = Extractor(weights, Devices(jax.devices()[:1]), batch_size=8)
    train, _ = split(load_source(tiny_config().data, "data", "train").images[:16])
    queries = of_array(pictures(3, channels=1), {})
    distances, result = nearest_in_features(extractor, "64", queries, train, 4)
    x, y = (
        np.concatenate([b.features["64"] for b in extractor.blocks(images, ("64",))])
        for images in (queries, train)
    )
    every = np.sqrt(((x[:, None].astype(float) - y) ** 2).mean(2))
    np.testing.assert_array_equal(result, np.argsort(every, axis=1)[:, :4])
    np.testing.assert_allclose(distances, np.sort(every, axis=1)[:, :4], rtol=1e-6)


def test_a_flipped_byte_of_stored_samples_is_found(tmp_path: Path) -> None:
    """The file is mapped into memory, which by itself compares nothing with the CRC."""
    path = tmp_path / "samples.npz"
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(path, images)
    np.testing.assert_array_equal(open_images(path).read(np.arange(30)), images)
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)
    with pytest.raises(EvaluationError, match="samples.npz is damaged .*CRC-32.*: write it anew"):
        open_images(path)
