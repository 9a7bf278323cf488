"""What the scripts share: flags, and how a script ends.

Exit codes: 0 done; 1 something the user can mend, told in one line; 2 a flag that does not parse; 128 + n stopped by signal n
with everything saved. A traceback means a fault of the code.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ddpm_jax.config import Config, load_config
from ddpm_jax.errors import UserError


def parser(description: str | None, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_workdir(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="the run directory")


def add_data_dir(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR", help="prepared data sets (default: data)")


def add_config(flags: argparse.ArgumentParser, *, required: bool = True) -> None:
    flags.add_argument("--config", required=required, metavar="FILE", help="of configs/, FILE:VARIANT, or a config.json")
    flags.add_argument_group("config fields").add_argument(
        "--config.SECTION.FIELD", metavar="VALUE", help="override one field, e.g. --config.train.steps=1000; repeatable"
    )


def parse_with_config(flags: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """The flags, and the config with its `--config.a.b=value` overrides."""
    options, overrides = parse_with_overrides(flags, argv)
    return options, load_config(options.config, overrides)


def parse_with_overrides(flags: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and apart from them the `--config.a.b=value` overrides, which argparse cannot list, as "a.b=value"."""
    argv = sys.argv[1:] if argv is None else argv
    prefix = "--config."
    overrides = [item.removeprefix(prefix) for item in argv if item.startswith(prefix)]
    return flags.parse_args([item for item in argv if not item.startswith(prefix)]), overrides


def run(main: Callable[[], int | None]) -> None:
    """Ends the process with the code of `main`, a UserError or a failing disk told in one line."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what it raises as well
    try:
        code = main() or 0
    except UserError as error:
        code = complain(str(error))
    except OSError as error:
        if error.errno is None or error.strerror is None:
            raise
        code = complain(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # A failed save leaves threads of the checkpoint library that would raise, or hang, at exit.
        os._exit(code)
    sys.exit(0)


def complain(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1
