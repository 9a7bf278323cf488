"""Train the students of a teacher, each with half the steps of the one before."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.build import Params, build_process, denoiser
from ddpm_jax.config import Config, differences, override, validate
from ddpm_jax.diffusion.process import Denoiser, q_sample
from ddpm_jax.distillation.target import SPACING, Halving, student_loss, two_step_target
from ddpm_jax.errors import ConfigError, WorkdirError, check
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.runs.data_origin import data_dir_of, from_python, read_origin
from ddpm_jax.runs.workdir import CONFIG, load_workdir_config
from ddpm_jax.sampling.sampler import chain_steps
from ddpm_jax.trained import open_trained
from ddpm_jax.training.form import TreeForm
from ddpm_jax.training.loop import train
from ddpm_jax.training.origin import Origin, look_up, read_record
from ddpm_jax.training.step import build_train_step

# The outputs of teacher and student are read alike, in one step of training.
SHARED = ("diffusion.", "model.timestep_scale:", "model.attention_resolutions:")


def distill(
    teacher: Origin,
    workdir: Path,
    *,
    data_dir: Path | None = None,
    steps: list[int] | None = None,
    overrides: list[str] | None = None,
    devices: Devices | None = None,
) -> int:
    """Train a student for each of `steps`, the last one in `workdir`, those before beside it.

    Each starts from the weights of its teacher, which takes twice its steps of DDIM. The same call
    goes on where one was interrupted.

    Args:
      data_dir: the prepared data sets; by default where the teacher's data was, or "data".
      steps: of the students in turn, each half of the one before; by default half of the teacher's.
      overrides: "section.field=value" of the students' configs, which are the teacher's otherwise.

    Returns:
      0 when all are trained, 128 + the signal's number when stopped.

    Raises:
      UserError: a teacher, steps, config or run directory that does not serve.
    """
    devices = Devices() if devices is None else devices
    if not (teacher.run / "config.json").is_file():
        raise WorkdirError(f"teacher={teacher.run}: not a run directory, it has no config.json")
    steps = check_steps(load_workdir_config(teacher.run), steps)
    for count in steps:
        last = count == steps[-1]
        here = workdir if last else stage(workdir, count)
        config = student_config(teacher.run, count, overrides or [])
        known = here if (here / CONFIG).is_file() else teacher.run
        code = train(
            config,
            here,
            data_dir=data_dir_of(known, data_dir),
            parent=Origin(teacher.run, teacher.step, averaged=True),
            devices=devices,
            build_step=functools.partial(build_student_step, workdir=here),
        )
        if code:
            return code
        teacher = Origin(here)
    return 0


def stage(workdir: Path, steps: int) -> Path:
    """Return the run directory of a student on the way to the one in `workdir`."""
    named = workdir if workdir.name not in ("", "..") else workdir.resolve()
    return named.with_name(f"{named.name}.stages") / str(steps)


def check_steps(teacher: Config, steps: list[int] | None) -> list[int]:
    """Return the steps of the students of `teacher`.

    Raises:
      UserError: they do not halve from one to the next, or a student's student does not halve.
    """
    own = teacher.distillation.steps
    counts = [(own or chain_steps(teacher)) // 2] if steps is None else steps
    text = ",".join(map(str, counts))
    halves = all(one == 2 * other for one, other in zip(counts, counts[1:]))
    check(
        bool(counts) and counts[-1] >= 1 and halves,
        f"steps={text}: at least 1, and each half of the one before, such as 8,4,2",
    )
    check(
        not own or 2 * counts[0] == own,
        f"steps={text}: the teacher is a student of {own} steps, its own has half of them",
    )
    return counts


def student_config(teacher: Path, steps: int, overrides: list[str]) -> Config:
    """Return the config of a student: the teacher's with its own steps and sampler.

    Raises:
      ConfigError: the teacher's process, its images or an override do not serve.
    """
    whole = load_workdir_config(teacher)
    config = copy.deepcopy(whole)
    config.distillation.steps, config.distillation.teacher = steps, str(teacher.resolve())
    # It is trained at the timesteps of its own steps alone, and without noise on the way.
    sampling = config.sampling
    sampling.sampler, sampling.steps, sampling.spacing = "ddim", steps, SPACING
    sampling.eta, sampling.order, sampling.rederive_eps = 0.0, 0, True
    sampling.dynamic_threshold = 0.0
    config.loss.timestep_sampling = "uniform"
    config.train.eval_images = config.train.keep_best = 0  # the loss of all timesteps says nothing
    config.model.dropout = 0.0
    for item in overrides:
        override(config, item)
    validate(config)
    other = [line for line in differences(whole, config) if line.startswith(SHARED)]
    if other:
        raise ConfigError(f"config.{other[0]}: a student has that of its teacher")
    named = any(item.startswith(("data.name=", "data.path=")) for item in overrides)
    check(
        named or not from_python(read_origin(teacher)),
        f"teacher={teacher}: it was given its images from Python: name those of its students, such "
        "as config.data.name=folder with config.data.path=FOLDER",
    )
    return config


def build_student_step(
    config: Config, devices: Devices, form: TreeForm, parent: Origin | None, *, workdir: Path
) -> Callable[..., Any]:
    """Build the compiled step of a student, `step(state, batch) -> (state, metrics)`.

    The teacher is the checkpoint `parent` that the student starts from; where it goes on, that
    which origin.json of `workdir` names. It is looked up once: the newest may be another by now.

    Raises:
      WorkdirError: it is not there any more, or another one.
    """
    origin = look_up(read_record(workdir)) if parent is None else parent
    teacher = open_trained(origin.run, devices, step=origin.step).params
    objective, steps = student_objective(config), config.distillation.steps
    step = build_train_step(config, form, loss=objective, timesteps=steps)

    def both(pair: tuple[Any, Params], batch: Any, *, axis_name: str | None = None) -> Any:
        state, teacher = pair
        state, metrics = step(state, batch, axis_name=axis_name, teacher=teacher)
        return (state, teacher), metrics

    # The teacher goes through the step, so that it lies in memory once and in no program.
    mapped, kept = devices.map_step(both), [teacher]

    def student_step(state: Any, batch: Any) -> tuple[Any, Any]:
        (state, kept[0]), metrics = mapped((state, kept[0]), batch)
        return state, metrics

    return student_step


def student_objective(config: Config) -> Callable[..., dict[str, jax.Array]]:
    """Build the loss of a student, as `build_train_step` takes it.

    Its `t` counts the student's steps, from 0, the one that ends at the image.
    """
    process, bind = build_process(config), denoiser(config)
    halving = Halving.of(process.schedule, config.distillation.steps)

    def loss(
        denoise: Denoiser,
        x0: jax.Array,
        step: jax.Array,
        eps: jax.Array,
        labels: jax.Array | None,
        teacher: Params,
    ) -> dict[str, jax.Array]:
        t = jax.numpy.asarray(halving.start, jax.numpy.int32)[step]
        z = q_sample(process.schedule, x0, t, eps)
        two_steps = bind(teacher, labels)
        clip = config.sampling.clip
        target = jax.lax.stop_gradient(
            two_step_target(process, halving, two_steps, z, step, clip=clip)
        )
        weighting = config.distillation.weighting
        return {"loss": student_loss(process, halving, denoise(z, t), target, z, step, weighting)}

    return loss
