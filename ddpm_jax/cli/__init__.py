"""Commands: flags, one call, the result."""

import importlib.util
import os
import sys


def obstacle() -> str | None:
    """Say why no command can run here: what would otherwise be a traceback at the first import."""
    if importlib.util.find_spec("fcntl") is None:  # which keeps two trainings apart
        return "ddpm_jax runs on Linux, on macOS, and on Windows in WSL (wsl --install)"
    count = os.environ.get("JAX_NUM_CPU_DEVICES", "1").strip()
    if not count.removeprefix("+").isdecimal() or int(count) < 1:
        return f"JAX_NUM_CPU_DEVICES={count}: must be a whole number, at least 1"
    listing = {"-h", "--help", "--version"} & {*sys.argv[1:]}  # which needs no JAX
    if not listing and any(name.startswith("JAX_") for name in os.environ):
        try:
            importlib.import_module("jax")
        except ValueError as error:  # of a variable that JAX reads when it is imported
            return " ".join(str(error).split())
    return None


if (_obstacle := obstacle()) is not None:
    print(f"error: {_obstacle}", file=sys.stderr)
    raise SystemExit(1)
