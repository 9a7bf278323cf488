"""Run the command `ddpm`, whose first word names one of the commands in this folder.

`ddpm train ...` does what `python scripts/train.py ...` does. The module of a command is imported
when it runs, so that the list of commands is there at once.
"""

from __future__ import annotations

import ast
import difflib
import sys
from importlib import metadata
from pathlib import Path

from ddpm_jax.progress import Lenient, say

COMMANDS = (
    "train",
    "distill",
    "sample",
    "evaluate",
    "prepare-data",
    "import-weights",
    "export-weights",
    "code-images",
    "plot-metrics",
    "reproduce",
    "first-hour",
    "benchmark",
    "compare-with-diffusers",
    "compile-ahead",
    "compile-for-tpu",
)


def main(program: str = "ddpm") -> None:
    """Run the command that the first word of the command line names, and end the process.

    Args:
      program: what the user typed before that word.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(help_text(program), file=Lenient(sys.stdout), flush=True)
        sys.exit(0)
    if name == "--version":
        version = metadata.version("ddpm_jax")
        print(f"ddpm_jax {version}", file=Lenient(sys.stdout), flush=True)
        sys.exit(0)
    if name not in COMMANDS:
        say(f"error: {refusal(name)} ({program} --help lists the commands)")
        sys.exit(2)
    from ddpm_jax.cli import flags
    from ddpm_jax.cli.run import run_named

    del sys.argv[1]  # a command reads its flags where a script has them
    flags.start_as(*program.split(), name)
    run_named(module_name(name))


def refusal(name: str) -> str:
    """Return what is wrong with the first word of the command line."""
    if not name or name.startswith("-"):
        return "name a command first"
    near = difflib.get_close_matches(name.replace("_", "-").removesuffix(".py"), COMMANDS, 1)
    return f"no command {name!r}" + (f", did you mean {near[0]}?" if near else "")


def module_name(command: str) -> str:
    """Return the name of a command's module."""
    return command.replace("-", "_")


def help_text(program: str) -> str:
    """List the commands, each with the first line of its module's docstring."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary(name)}" for name in COMMANDS]
    return "\n".join(
        [
            f"usage: {program} COMMAND [flags]",
            "",
            "Denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020) in JAX and Flax.",
            "",
            *lines,
            "",
            f"{program} COMMAND --help lists the flags of a command.",
        ]
    )


def summary(command: str) -> str:
    """Return the first line of the docstring of a command's module, which is not imported."""
    path = Path(__file__).with_name(f"{module_name(command)}.py")
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
