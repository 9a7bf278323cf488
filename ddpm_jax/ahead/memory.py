"""Hold what a compiled program says of the memory of one device."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes a device, while a program runs.

    Attributes:
      peak: in use at once at the worst moment: what the compiler holds against the device's memory.
      aliased: so many of the outputs take the place of donated arguments.
      temporaries: room set aside for them; it may be more than is in use at once, and in part not
        in that memory but on the chip itself.
      code: the program.
    """

    peak: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @classmethod
    def of(cls, executable: jax.stages.Compiled) -> Memory:
        """Read the bytes of a compiled program."""
        memory = executable.memory_analysis()
        return cls(
            memory.peak_memory_in_bytes,
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.generated_code_size_in_bytes,
        )


class OutOfMemory(Exception):
    """A device is too small for a program.

    Attributes:
      needed: bytes a device, or 0 where the compiler did not say.
    """

    def __init__(self, message: str, needed: int = 0) -> None:
        super().__init__(message)
        sizes = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", message)
        number, unit = [part for part in sizes.groups() if part] if sizes else ("0", "K")
        self.needed = needed or int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def gib(size: float) -> str:
    """Write bytes as GiB."""
    return f"{size / GIB:.2f}"
