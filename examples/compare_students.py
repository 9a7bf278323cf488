"""Draw what a student learned from its teacher: three rows of samples from the same noise.

    python examples/compare_students.py --teacher=runs/faces --student=runs/faces_4

The teacher in 50 steps of DDIM, the teacher in as few steps as the student, and the student.
"""

import argparse
from pathlib import Path

import numpy as np

import ddpm_jax as ddpm


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="a run directory")
    parser.add_argument("--student", type=Path, required=True, help="a run of ddpm distill")
    parser.add_argument("--num_images", type=int, default=12, help="in a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--output", default="students.png")
    options = parser.parse_args()
    ddpm.tune_cpu()
    count, seed = options.num_images, options.seed
    teacher, student = ddpm.load(options.teacher), ddpm.load(options.student)
    own = student.config.sampling
    rows = [
        teacher.sample(count, seed=seed, sampler="ddim", steps=50),
        teacher.sample(count, seed=seed, sampler="ddim", steps=own.steps, spacing=own.spacing),
        student.sample(count, seed=seed),
    ]
    picture = ddpm.grid(np.concatenate(rows), columns=count, scale=options.scale)
    ddpm.save_png(options.output, picture)
    print(f"wrote {options.output}: 50 steps, {own.steps} steps, the student's {own.steps} steps")


if __name__ == "__main__":
    main()
