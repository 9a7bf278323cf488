"""Compile a config for a TPU slice, with no TPU at hand, and tell what the compiler decided.

train   the training step of config.train.batch_size images, over all chips
sample  the whole chain of config.sampling, --samples_per_chip images at once on each chip

Memory, operations and collectives are what would run; times are the compiler's estimates plus a bound from below for the
collectives (docs/tpu.md). A batch that does not fit is refused with one that does. It needs libtpu (requirements-tpu.txt) and
minutes of a CPU for each program. --table prints reports as the rows of a table instead.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from ddpm_jax import ahead_of_time, cli
from ddpm_jax.config import ConfigError
from ddpm_jax.tpu import Topology
from ddpm_jax.tpu_report import format_report, format_table

PROGRAMS = ("train", "sample")


def main(argv: list[str] | None = None) -> None:
    flags = cli.parser(
        __doc__,
        "python scripts/compile_for_tpu.py --config=configs/cifar10.py --topology=v5e:4x4 --output=cifar10.json "
        "--config.train.batch_size=512",
    )
    cli.add_config(flags, required=False)
    add = flags.add_argument
    add("--topology", metavar="NAME", help="v4:2x2x1 to v4:4x8x8, v5e:1x1 to v5e:16x16, v5p:2x2x1 to v5p:4x8x8")
    add("--what", default="train,sample", metavar="A,B", help=f"of {', '.join(PROGRAMS)} (default: both)")
    add("--samples_per_chip", type=int, default=16, metavar="N", help="that a chip draws at once (default: 16)")
    add("--output", type=Path, metavar="FILE", help="the figures as JSON; each program is written when it is done")
    add("--table", type=Path, nargs="+", metavar="FILE", help="print these reports as a table, and compile nothing")
    options, overrides = cli.parse_with_overrides(flags, argv)
    if options.table:
        print(format_table([read(path) for path in options.table]))
        return
    for name in ("config", "topology"):
        if getattr(options, name) is None:
            raise ConfigError(f"--{name}: say which")
    what = options.what.split(",")
    if not set(what) <= set(PROGRAMS):
        raise ConfigError(f"--what={options.what}: any of {', '.join(PROGRAMS)}, with commas between")
    topology = Topology(options.topology)
    if options.samples_per_chip < 1:
        raise ConfigError(f"--samples_per_chip={options.samples_per_chip}: must be at least 1")
    config = cli.load_config(options.config, overrides)

    jax.config.update("jax_platforms", "cpu")  # libtpu compiles here; nothing must look for a TPU to run on
    done = {"config": str(options.config), "overrides": overrides}
    for name in what:
        batch_size = config.train.batch_size if name == "train" else options.samples_per_chip * topology.chips
        report = ahead_of_time.report(
            config, topology, name, batch_size, say=lambda line: print(line, file=sys.stderr, flush=True)
        )
        done[name] = report
        print(format_report(report), flush=True)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(done, indent=1) + "\n")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
    except ValueError:  # not JSON, or not even text
        report = None
    if not isinstance(report, dict) or not {"train", "sample"} & set(report):
        raise ConfigError(f"--table {path}: not a report of this script")
    return report


if __name__ == "__main__":
    cli.run(main)
