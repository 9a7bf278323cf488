"""Configs: typed, checked, and clear about what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pickle
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax.build import abstract_params, build_objective, build_process
from ddpm_jax.config import (
    Config,
    LossConfig,
    differences,
    from_dict,
    listed,
    load_config,
    override,
    save_json,
    to_dict,
    validate,
)
from ddpm_jax.config.rules import In
from ddpm_jax.diffusion.losses import Objective
from ddpm_jax.errors import ConfigError
from ddpm_jax.training.state import build_optimizer

FOLDER = Path(__file__).parents[2] / "configs"


def every_config() -> list[str]:
    """Each file of configs/, each variant of a family."""
    names = []
    for path in sorted(FOLDER.glob("*.py")):
        variants = runpy.run_path(str(path)).get("VARIANTS", ())
        names += [f"{path.name}:{variant}" for variant in variants] or [path.name]
    return names


@functools.cache
def parameter_count(path: str) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(load_config(path))))


def overridden(*items: str) -> Config:
    config = Config()
    for item in items:
        override(config, item)
    return validate(config)


@pytest.mark.parametrize("name", every_config())
def test_every_config_loads_and_its_network_can_be_built(name):
    path, _, variant = f"{FOLDER / name}".partition(":")
    build_process(load_config(f"{FOLDER / name}"))
    assert parameter_count(f"{FOLDER / name}") > 1_000_000
    header = Path(path).read_text().split('"""')[1]
    for part in (
        "Command:",
        "Hardware:",
        "Expect:",
        "Source:",
        f"configs/{Path(path).name}",
        variant,
    ):
        assert part in header


@pytest.mark.parametrize(
    "name, parameters, rate, batch, steps, variance, dropout",
    [
        ("cifar10", 35_746_307, 2e-4, 128, 800_000, "fixed_large", 0.1),
        ("celeba64", 78_700_803, 2e-4, 128, 500_000, "fixed_large", 0.1),
        ("celebahq256", 113_673_219, 2e-5, 64, 500_000, "fixed_small", 0.0),
        ("lsun_bedroom", 113_673_219, 2e-5, 64, 2_400_000, "fixed_small", 0.0),
        ("lsun_church", 113_673_219, 2e-5, 64, 1_200_000, "fixed_small", 0.0),
        ("lsun_cat", 113_673_219, 2e-5, 64, 1_800_000, "fixed_small", 0.0),
    ],
)
def test_recipes_are_the_papers(name, parameters, rate, batch, steps, variance, dropout):
    path = f"{FOLDER / name}.py"
    config = load_config(path)
    assert parameter_count(path) == parameters
    assert (config.optimizer.learning_rate, config.train.batch_size, config.train.steps) == (
        rate,
        batch,
        steps,
    )
    assert (config.diffusion.variance, config.model.dropout) == (variance, dropout)
    assert (config.diffusion.timesteps, config.diffusion.beta_start, config.diffusion.beta_end) == (
        1000,
        1e-4,
        0.02,
    )
    assert (config.optimizer.warmup_steps, config.optimizer.gradient_clip) == (5000, 1.0)
    assert config.train.ema_decays == (0.9999,) and not config.train.ema_warmup
    assert config.data.flip == (name != "lsun_bedroom")  # "all sets but LSUN Bedroom", appendix B


def test_table_2_ends_in_the_papers_choice():
    chosen, papers = (
        load_config(f"{FOLDER}/table2.py:eps_simple"),
        load_config(FOLDER / "cifar10.py"),
    )
    assert differences(chosen, papers) == []
    assert differences(load_config(f"{FOLDER}/table2.py:mu_l_learned"), papers) == [
        "diffusion.prediction: 'mu' -> 'eps'",
        "diffusion.variance: 'learned' -> 'fixed_large'",
        "loss.kind: 'vlb' -> 'simple'",
        "optimizer.epsilon: 1e-05 -> 1e-08",
        "optimizer.gradient_clip: 1000.0 -> 1.0",
    ]


def test_the_bound_of_table_2_is_optimised_as_one_term_of_it():
    """The paper's code takes one term where L has T: gradients here are T times those there.

    Some are clipped, and some so small that epsilon tells.
    """
    ours, papers = (
        build_optimizer(load_config(f"{FOLDER}/table2.py:{name}").optimizer, 10)
        for name in ("eps_l_fixed", "eps_simple")
    )
    params = {"w": np.ones(3, np.float32)}
    states = ours.init(params), papers.init(params)
    for gradient in ([5.0, -1.0, 1e-8], [0.1, 0.2, 3e-8], [0.0, -0.3, -1e-8]):
        there = {"w": np.array(gradient, np.float32)}
        here = {"w": 1000 * there["w"]}
        (update, mine), (expected, theirs) = (
            ours.update(here, states[0], params),
            papers.update(there, states[1], params),
        )
        states = mine, theirs
        np.testing.assert_allclose(update["w"], expected["w"], rtol=1e-4)


def test_improved_ddpm_is_the_published_network():
    """52,546,438 parameters with the variance, as the released checkpoints of 52.5 M have.

    Timesteps enter as 0..1000.
    """
    assert parameter_count(f"{FOLDER}/improved_ddpm.py:4k_cosine_hybrid") == 52_546_438
    config = load_config(f"{FOLDER}/improved_ddpm.py:4k_cosine_vlb")
    assert config.model.timestep_scale * config.diffusion.timesteps == 1000
    start, step = (
        np.pi / 2 * np.array([0.008, 1 / 4000]) / 1.008
    )  # beta_0 = 1 - cos^2(start + step) / cos^2(start), expanded
    assert build_process(config).schedule.betas[0] == pytest.approx(
        2 * np.tan(start) * step + step**2, rel=1e-3
    )


@pytest.mark.parametrize(
    "variant, dropout",
    [
        ("1k_linear_simple", 0.1),
        ("4k_linear_simple", 0.1),
        ("4k_linear_hybrid", 0.1),
        ("4k_cosine_simple", 0.3),
        ("4k_cosine_hybrid", 0.3),
        ("4k_cosine_vlb", 0.3),
    ],
)
def test_improved_ddpm_drops_out_what_its_appendix_has_for_the_schedule(variant, dropout):
    assert load_config(f"{FOLDER}/improved_ddpm.py:{variant}").model.dropout == dropout


@pytest.mark.parametrize(
    "name, said",
    [
        ("table2.py:eps", "table2.py:VARIANT, one of mu_l_learned, mu_l_fixed"),
        ("table2.py", "table2.py:VARIANT, one of mu_l_learned, mu_l_fixed"),
        ("cifar10.py:small", "cifar10.py has no variants"),
    ],
)
def test_variants_are_named(name, said):
    with pytest.raises(ConfigError) as caught:
        load_config(f"{FOLDER / name}")
    assert said in str(caught.value)


def test_a_runs_own_config_is_a_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(save_json(overridden("train.steps=7")))
    assert load_config(path, ["seed=3"]) == overridden("train.steps=7", "seed=3")
    path.write_text("{")
    with pytest.raises(ConfigError, match="config.json: not JSON"):
        load_config(path)


def test_overrides_are_typed():
    config = overridden(
        "train.steps=1e5",
        "optimizer.learning_rate=1",
        "model.channel_mult=(1,2)",
        "model.attention_resolutions=16",
        "data.flip=false",
        "diffusion.schedule=cosine",
    )
    assert config.train.steps == 100_000 and type(config.train.steps) is int
    assert type(config.optimizer.learning_rate) is float
    assert config.model.channel_mult == (1, 2) and config.model.attention_resolutions == (16,)
    assert config.data.flip is False and config.diffusion.schedule == "cosine"


@pytest.mark.parametrize(
    "item, said",
    [
        (
            "optimizer.learning_rat=1",
            "config.optimizer has no field 'learning_rat': did you mean learning_rate?",
        ),
        ("optimzer.epsilon=1", "config has no field 'optimzer': did you mean optimizer?"),
        ("seed.x=1", "config.seed.x: seed is a value, it has no fields"),
        ("train=5", "config.train is a section; set one of its fields: steps"),
        ("train.steps", "write config.train.steps=VALUE"),
        ("train.steps=many", "config.train.steps=many: must be int"),
        ("train.steps=1.5", "config.train.steps=1.5: must be int"),
        ("train.steps=True", "config.train.steps=True: must be int"),
        ("data.flip=maybe", "config.data.flip=maybe: must be true or false"),
        ("optimizer.learning_rate=nan", "config.optimizer.learning_rate=nan: must be float"),
        ("optimizer.learning_rate=1e999", "config.optimizer.learning_rate=inf: must be finite"),
        ("model.channel_mult=(1,'2')", "config.model.channel_mult=2: must be int"),
        ("diffusion.schedule=linar", "config.diffusion.schedule=linar: one of linear, quad, const"),
        ("diffusion.timesteps=0", "config.diffusion.timesteps=0: must be at least 1"),
        ("diffusion.beta_end=1.0", "config.diffusion.beta_end=1.0: must be in (0, 1)"),
        ("diffusion.beta_start=0", "config.diffusion.beta_start=0.0: must be in (0, 1)"),
        (
            "data.image_size=36",
            "config.data.image_size=36: must be divisible by 8, for the 4 levels",
        ),
        (
            "model.base_channels=100",
            "config.model.base_channels=100: must be a multiple of model.group_norm_groups=32",
        ),
        ("model.attention_resolutions=(7,)", "sizes of this network's feature maps: 32, 16, 8, 4"),
        ("model.heads=3", "config.model.heads=3: must divide the widths with attention"),
        ("model.dropout=1.0", "config.model.dropout=1.0: must be in [0, 1)"),
        (
            "loss.kind=hybrid",
            "config.loss.kind=hybrid: hybrid trains a learned variance: set diffusion.variance",
        ),
        ("diffusion.variance=learned", "diffusion.variance=learned is trained by vlb or hybrid"),
        ("diffusion.schedule=jsd", "eps cannot give x0: use x0, v or mu"),
        ("diffusion.zero_terminal_snr=true", "eps cannot give x0: use x0, v or mu"),
        (
            "train.accumulation=3",
            "config.train.batch_size=128: must be divisible by train.accumulation=3",
        ),
        ("train.ema_decays=(1.0,)", "config.train.ema_decays=(1.0,): each in [0, 1)"),
        ("sampling.steps=2000", "config.sampling.steps=2000: must be in 0..1000"),
        ("data.name=../secrets", "config.data.name=../secrets: NAME or NAME/CONFIGURATION"),
        ("seed=-1", "config.seed=-1: must be in 0..2^32-1"),
    ],
)
def test_bad_values_are_named_with_what_is_accepted(item, said):
    with pytest.raises(ConfigError) as caught:
        overridden(item)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_objective_is_written_once():
    """The section `loss` is the objective of the layer below, in its order, and one field more."""
    names = [field.name for field in dataclasses.fields(LossConfig)]
    assert names == [field.name for field in dataclasses.fields(Objective)] + ["timestep_sampling"]
    assert list(to_dict(Config())["loss"]) == names
    config = Config(loss=LossConfig(kind="hybrid", vlb_weight=0.5, min_snr_gamma=3.0))
    assert build_objective(config) == Objective("hybrid", vlb_weight=0.5, min_snr_gamma=3.0)
    with pytest.raises(ConfigError, match="config.loss.kind=mse: one of simple, vlb, hybrid"):
        from_dict(to_dict(Config(loss=LossConfig(kind="mse"))))


@pytest.mark.parametrize(
    "interval, inside, outside",
    [
        ("[0, 1)", (0, 0.5), (-1e-9, 1, 1.0, float("nan"))),
        ("(0, 1)", (1e-300, 0.999), (0, 1)),
        ("[0, 1]", (0, 1), (-1e-9, 1 + 1e-9)),
    ],
)
def test_intervals_are_read_as_written(interval, inside, outside):
    assert all(In(interval).holds(value) for value in inside)
    assert not any(In(interval).holds(value) for value in outside)


def test_a_config_survives_its_json():
    config = overridden(
        "model.channel_mult=(1,3)", "train.ema_decays=(0.9,0.99)", "diffusion.prediction=v"
    )
    assert from_dict(json.loads(save_json(config))) == config


def test_json_with_unknown_or_mistyped_fields_is_refused():
    values = to_dict(Config())
    with pytest.raises(ConfigError, match="has no field 'p2_gama'"):
        from_dict(values | {"loss": {"p2_gama": 1.0}})
    with pytest.raises(ConfigError, match="config: train must be a JSON object, not 3"):
        from_dict(values | {"train": 3})
    with pytest.raises(ConfigError, match="config.seed=1.5: must be int"):
        from_dict(values | {"seed": 1.5})


def test_differences_name_the_fields():
    old, new = Config(), overridden("train.steps=5", "model.heads=2")
    assert differences(old, new) == ["model.heads: 1 -> 2", "train.steps: 800000 -> 5"]


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "no such file"),
        ("def get_config(): return 3", "must return a ddpm_jax.config.Config, not int"),
        ("x = 1", "AttributeError"),
        ("def get_config(: ", "SyntaxError"),
    ],
)
def test_config_files_at_fault_are_named(tmp_path, text, said):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "section, name, near",
    [
        ("optimizer", "learning_rat", "learning_rate"),
        ("loss", "weigthing", "weighting"),
        ("data", "image_siz", "image_size"),
    ],
)
def test_a_misspelt_field_is_refused_where_it_is_set(section, name, near):
    """From Python it would be one more attribute, of no effect."""
    config = Config()
    with pytest.raises(ConfigError, match=rf"has no field '{name}': did you mean {near}\?"):
        setattr(getattr(config, section), name, 1)
    with pytest.raises(ConfigError, match="Config has no field 'optimiser': did you mean opt"):
        config.optimiser = 1
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, seed=3).seed == 3


def test_numbers_of_numpy_are_numbers():
    config = Config()
    config.optimizer.learning_rate, config.train.steps = np.float64(1e-4), np.int64(3)
    config = from_dict(to_dict(config))
    assert type(config.optimizer.learning_rate) is float and type(config.train.steps) is int


def test_a_single_override_need_not_be_in_a_list():
    """Its letters would be overrides otherwise."""
    assert load_config("digits", "train.steps=200") == load_config("digits", ["train.steps=200"])
    assert load_config("digits", "train.steps=200").train.steps == 200
    assert listed(("a=1", "b=2")) == ["a=1", "b=2"] and listed(()) == []
