"""The last value of a field that is accepted, and the first that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddpm_jax.config import Config, from_dict, load_config, override, to_dict, validate
from ddpm_jax.errors import ConfigError
from ddpm_jax.sampling.sampler import with_sampling

ABOVE_0, BELOW_1 = 1e-12, 1 - 1e-12
LARGEST = 2**31 - 1
# field: (accepted, refused), with what else has to be set for the field to be at its edge
EDGES: dict[str, tuple[list, list]] = {
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
    "data.image_size": ([32], [0]),
    "data.channels": ([1, 3, 4], [0, 2, 5]),
    "data.padding": ([0, 15], [-1, 16]),
    "model.blocks_per_level": ([1], [0]),
    "model.channel_mult": (["(1,1,1,1,1,1)"], ["()", "(1,0)", "(1,1,1,1,1,1,1)"]),
    "model.heads": ([1, 256], [0, 512]),
    "model.head_channels": ([0, 256], [-1, 512]),
    "model.dropout": ([0.0, BELOW_1], [-ABOVE_0, 1.0]),
    "model.timestep_scale": ([ABOVE_0], [0.0]),
    "model.group_norm_groups": ([1, 128], [0, 256]),
    "model.group_norm_epsilon": ([ABOVE_0], [0.0]),
    "model.skip_scale": ([ABOVE_0], [0.0]),
    "model.num_classes": ([0, LARGEST], [-1, LARGEST + 1]),
    "model.label_dropout": ([0.0, 1.0], [-ABOVE_0, 1 + 1e-9]),
    "diffusion.timesteps": ([1, LARGEST], [0, LARGEST + 1]),
    "diffusion.beta_start": ([ABOVE_0, BELOW_1], [0.0, 1.0]),
    "diffusion.beta_end": ([ABOVE_0, BELOW_1], [0.0, 1.0]),
    "loss.min_snr_gamma": ([ABOVE_0], [0.0]),
    "loss.p2_k": ([ABOVE_0], [0.0]),
    "loss.p2_gamma": ([0.0], [-ABOVE_0]),
    "loss.vlb_weight": ([ABOVE_0], [0.0]),
    "optimizer.learning_rate": ([ABOVE_0], [0.0]),
    "optimizer.warmup_steps": ([0], [-1]),
    "optimizer.beta1": ([0.0, BELOW_1], [-ABOVE_0, 1.0]),
    "optimizer.beta2": ([0.0, BELOW_1], [-ABOVE_0, 1.0]),
    "optimizer.epsilon": ([ABOVE_0], [0.0]),
    "optimizer.gradient_clip": ([0.0], [-ABOVE_0]),
    "train.steps": ([1], [0]),
    "train.batch_size": ([1], [0]),
    "train.accumulation": ([1, 128], [0, 3, 256]),
    "train.ema_decays": (["(0.0,)", f"({BELOW_1},)"], ["()", "(1.0,)", "(-1e-9,)", "(0.5,0.5)"]),
    "train.max_nonfinite_steps": ([1], [0]),
    "train.log_every": ([1], [0]),
    "train.eval_every": ([1], [0]),
    "train.eval_images": ([0], [-1]),
    "train.checkpoint_every": ([1], [0]),
    "train.keep_checkpoints": ([1], [0]),
    "train.keep_every": ([0], [-1]),
    "train.keep_best": ([0, 1], [-1]),
    "train.sample_every": ([0], [-1]),
    "train.sample_images": ([1], [0]),
    "sampling.steps": ([0, 1000], [-1, 1001]),
    "sampling.eta": ([0.0, 1.0], [-ABOVE_0, 1 + 1e-9]),
    "sampling.order": ([0, 2, 3], [-1, 1, 4]),
    "sampling.dynamic_threshold": ([0.0, 1.0], [-ABOVE_0, 1 + 1e-9]),
}


def changed(*items: str) -> Config:
    config = Config()
    for item in items:
        override(config, item)
    return validate(config)


@pytest.mark.parametrize("field", EDGES)
def test_fields_end_where_they_say(field: str) -> None:
    accepted, refused = EDGES[field]
    for value in accepted:
        changed(f"{field}={value}")
    for value in refused:
        with pytest.raises(ConfigError) as caught:
            changed(f"{field}={value}")
        assert field in str(caught.value) and "\n" not in str(caught.value)


# What several fields say together: the last that goes, the first that does not, and its name.
SMALL = "model.attention_resolutions=()"
LEARNED = "diffusion.variance=learned_range"
TOGETHER = [
    (["data.image_size=8", SMALL, "data.padding=3"],
     ["data.image_size=8", SMALL, "data.padding=4"], "data.padding"),
    (["data.image_size=8", SMALL], ["data.image_size=4", SMALL], "data.image_size"),
    (["data.name=folder", "data.path=x"], ["data.name=folder"], "data.path"),
    ([], ["data.path=x"], "data.path"),
    (["train.batch_size=6", "train.accumulation=3"],
     ["train.batch_size=7", "train.accumulation=3"], "train.batch_size"),
    (["diffusion.timesteps=21", "diffusion.rescale_betas=true"],
     ["diffusion.timesteps=20", "diffusion.rescale_betas=true"], "diffusion.rescale_betas"),
    (["diffusion.schedule=jsd", "diffusion.prediction=v"],
     ["diffusion.schedule=jsd"], "diffusion.prediction"),
    (["diffusion.zero_terminal_snr=true", "diffusion.prediction=v"],
     ["diffusion.zero_terminal_snr=true"], "diffusion.prediction"),
    (["diffusion.zero_terminal_snr=true", "diffusion.prediction=v", "diffusion.timesteps=2"],
     ["diffusion.zero_terminal_snr=true", "diffusion.prediction=v", "diffusion.timesteps=1"],
     "diffusion.zero_terminal_snr"),
    ([LEARNED, "loss.kind=hybrid"], ["loss.kind=hybrid"], "loss.kind"),
    ([LEARNED, "loss.kind=vlb"], [LEARNED], "loss.kind"),
    (["loss.weighting=p2"], ["loss.weighting=p2", "loss.kind=vlb"], "loss.weighting"),
    (["train.keep_best=1", "train.eval_every=2500"],
     ["train.keep_best=1", "train.eval_every=3000"], "train.keep_best"),
    (["train.keep_best=0", "train.eval_images=0"],
     ["train.keep_best=1", "train.eval_images=0"], "train.keep_best"),
    (["diffusion.timesteps=9", "sampling.steps=9"],
     ["diffusion.timesteps=9", "sampling.steps=10"], "sampling.steps"),
    (["sampling.dynamic_threshold=0.9"],
     ["sampling.dynamic_threshold=0.9", "sampling.clip=false"], "sampling.dynamic_threshold"),
    (["model.attention_resolutions=(4,)"],
     ["model.attention_resolutions=(2,)"], "model.attention_resolutions"),
]  # fmt: skip


@pytest.mark.parametrize("fine, wrong, named", TOGETHER, ids=[row[2] for row in TOGETHER])
def test_fields_fit_together_up_to_their_edge(fine: list, wrong: list, named: str) -> None:
    changed(*fine)
    with pytest.raises(ConfigError, match=f"config.{named}="):
        changed(*wrong)


def test_every_door_checks_what_comes_in(tmp_path: Path) -> None:
    """A config's file, overrides of it, its JSON, and what a command changes of its sampling."""
    named = "config.train.accumulation=0: must be at least 1"
    with pytest.raises(ConfigError, match=named):
        load_config("digits", ["train.accumulation=0"])
    with pytest.raises(ConfigError, match="config.train.batch_size=128: must be divisible by"):
        load_config("digits", ["train.accumulation=3"])
    values = to_dict(Config())
    values["train"]["accumulation"] = 0
    with pytest.raises(ConfigError, match=named):
        from_dict(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=named):
        load_config(tmp_path / "config.json")
    (tmp_path / "mine.py").write_text(
        "from ddpm_jax.config import Config, TrainConfig\n\n\n"
        "def get_config():\n    return Config(train=TrainConfig(accumulation=0))\n"
    )
    with pytest.raises(ConfigError, match=named):
        load_config(tmp_path / "mine.py")
    with pytest.raises(ConfigError, match="config.sampling.steps=1001: must be in 0..1000"):
        with_sampling(Config(), steps=1001)
    assert with_sampling(Config(), steps=1000, eta=None).sampling.steps == 1000
