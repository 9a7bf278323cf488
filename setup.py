"""Build the package with the folders that ship beside it; pyproject.toml says everything else."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "pretrained", "benchmarks")


class BuildWithShipped(build_py):
    """Copy what ships into the package, where `ddpm_jax.files.shipped` finds it.

    An editable installation runs from the checkout, and finds it there.
    """

    def run(self) -> None:
        """Build the package."""
        super().run()
        for name in () if self.editable_mode else SHIPPED:
            target = Path(self.build_lib, "ddpm_jax", "shipped", name)
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree(name, target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithShipped})
