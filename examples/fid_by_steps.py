"""Compare samplers by the FID of their samples over the number of steps: a table and a plot.

    python examples/fid_by_steps.py runs/faces --output=fid.png --students runs/faces_4

Every number is a line of evaluations.jsonl in its run; what was measured of the newest step's
average, with the same settings, seed, samples and real images, is not measured again. Students
(`ddpm distill`) are drawn as their own config says.
"""

import argparse
import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt

import ddpm_jax as ddpm
from ddpm_jax.config import SamplingConfig
from ddpm_jax.evaluation.jobs import evaluate
from ddpm_jax.evaluation.options import EvaluationOptions
from ddpm_jax.evaluation.quality import full_name
from ddpm_jax.runs.checkpoints import Checkpoints
from ddpm_jax.runs.evaluations import read_evaluations
from ddpm_jax.runs.workdir import imported_weights, load_workdir_config
from ddpm_jax.sampling.sampler import chain_steps, with_sampling
from ddpm_jax.training.state import ema_name

SAMPLERS = {
    "ancestral": {"sampler": "ancestral", "spacing": "linspace"},
    "ddim": {"sampler": "ddim", "spacing": "linspace"},
    "dpmpp_2m_sde, trailing": {"sampler": "dpmpp_2m_sde", "spacing": "trailing"},
    "dpmpp_2m, trailing": {"sampler": "dpmpp_2m", "spacing": "trailing"},
    "deis 2, trailing": {"sampler": "deis", "order": 2, "spacing": "trailing"},
    "deis 3, trailing": {"sampler": "deis", "order": 3, "spacing": "trailing"},
    "unipc 2, trailing": {"sampler": "unipc", "order": 2, "spacing": "trailing"},
    "unipc 2, logsnr": {"sampler": "unipc", "order": 2, "spacing": "logsnr"},
    "unipc 3, logsnr": {"sampler": "unipc", "order": 3, "spacing": "logsnr"},
}


def fid(run, options, **sampling):
    """Return the FID of `run` with these fields of the sampler, measured or looked up."""
    config = with_sampling(load_workdir_config(run), **sampling)
    classes = config.model.num_classes
    drawn = dataclasses.asdict(config.sampling) | {"steps": chain_steps(config)}
    wanted = {"step": Checkpoints.reading(run).steps()[-1], "resize": "tf"}
    wanted |= {"metric": full_name("FID", options["features"]), "num_images": options["num_images"]}
    of_samples = {"seeds": [0], "guidance": 1.0}
    of_samples |= {"labels": list(range(classes)) if classes else None}
    averages = f"ema {ema_name(config.train.ema_decays[0])}", imported_weights(run, "ema")
    for record in read_evaluations(run):
        samples = record.get("samples", {})
        if (
            wanted.items() <= record.items()
            and record["weights"] in averages
            and all(samples.get(name) == value for name, value in of_samples.items())
            and dataclasses.asdict(SamplingConfig()) | samples["sampling"] == drawn
            and of_train(record["reference"], options["reference_images"])
        ):
            return record["value"]
    measure = EvaluationOptions(metrics=("fid",), workdir=run, **options, **sampling)
    return evaluate(measure)[0]["value"]


def of_train(reference, count):
    """Return whether a record's reference is so many images of the train split, None for all."""
    about = reference["provenance"]
    seen = about.get("count", 0)
    enough = seen == count or reference["whole"] and (count is None or seen < count)
    return enough and about.get("images", {}).get("split") == "train"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--students", type=Path, nargs="*", default=[], help="runs of ddpm distill")
    parser.add_argument("--steps", default="5,8,10,15,20,50")
    parser.add_argument("--samplers", nargs="*", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--reference_images", type=int)
    parser.add_argument("--features", default="2048")
    parser.add_argument("--inception", type=Path, help="a file of weights")
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--output", default="fid_by_steps.png")
    options = vars(parser.parse_args())
    ddpm.tune_cpu()
    run, students, output = (options.pop(name) for name in ("run", "students", "output"))
    counts = [int(count) for count in options.pop("steps").split(",")]
    curves = {name: [] for name in options.pop("samplers")}
    for count in counts:  # the short chains first, of all samplers
        for name, curve in curves.items():
            # What belongs to other samplers may stand in the run's config.
            row = {"eta": 0.0, "order": 0} | SAMPLERS[name]
            curve.append(fid(run, options, steps=count, **row))
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curve in curves.items():
        print(f"| {name} |", " | ".join(f"{value:.3f}" for value in curve), "|")
        ax.plot(counts, curve, marker=".", label=name)
    for student in students:
        own = load_workdir_config(student).sampling
        value = fid(student, options)
        print(f"| student, {own.steps} steps | {value:.3f} |")
        ax.plot(own.steps, value, "k*", label="student" * (student == students[0]))
    ax.set(xscale="log", yscale="log", xlabel="steps", ylabel=full_name("FID", options["features"]))
    ax.set_xticks(counts, counts, minor=False)
    ax.xaxis.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(output, dpi=120)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
