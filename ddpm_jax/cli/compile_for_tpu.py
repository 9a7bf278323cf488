"""Compile a config for a TPU slice, with no TPU at hand, and report what the compiler decided.

It is compile_ahead.py for TPUs alone, which --topology names. Memory, operations and exchanges are
what would run; times are the compiler's estimates plus a bound from below for the exchanges
(docs/ahead.md). A batch that does not fit is refused with one that does. It needs libtpu (the extra
tpu) and minutes of a CPU for each program. --table prints reports as the rows of a table instead.
"""

import argparse

from ddpm_jax.ahead.topology import Topology
from ddpm_jax.cli import compile_ahead, flags


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    return compile_ahead.parser(
        __doc__,
        "python scripts/compile_for_tpu.py --config=configs/cifar10.py --topology=v5e:4x4 "
        "--output=cifar10.json --config.train.batch_size=512",
        "topology",
        "v4:2x2x1 to v4:4x8x8, v5e:1x1 to v5e:16x16, v5p:2x2x1 to v5p:4x8x8",
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options, overrides = flags.parse_with_overrides(parser(), argv)
    if options.table:
        compile_ahead.print_table(options)
        return
    compile_ahead.check_names(options, "topology")
    compile_ahead.compile_all(options, overrides, Topology(options.topology))
