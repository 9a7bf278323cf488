"""Hold what a coded file holds: one line of JSON, the header, and the sections that it lists.

Anybody may have written the file, so all that a decoder looks at is checked when it is read. What
the sections say is for the coders, which notice that it is not what was encoded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.coding.bits_back import CDFS
from ddpm_jax.config.checking import short
from ddpm_jax.config.reading import typed
from ddpm_jax.errors import CodingError, ConfigError
from ddpm_jax.files import parse_json, replacing

FORMAT = "ddpm_jax images 1"
METHODS = ("lossless", "progressive")
MOST_IMAGES = 2**22  # of a file
MOST_AT_ONCE = 2**16  # images of a group, or lanes: a damaged file may claim any number


@dataclass(frozen=True)
class Settings:
    """How images are coded.

    Attributes:
      method: "lossless" is `bits_back`: the length of the bound, and initial bits. "progressive" is
        `progressive`: longer by about a tenth, no initial bits, and every prefix is a picture.
      group: images coded side by side, in one batch of the network.
      clip, cdf: the model, as in `diffusion.bound.bound_terms`.
      step_rate: bits/dim of a progressive step, see `ProgressiveCoder`.
      lanes: of the lossless stack.
      seed: of initial bits, or of shared noise.
    """

    method: str = "lossless"
    group: int = 20
    clip: bool = True
    cdf: str = "tanh"
    step_rate: float = 0.02
    lanes: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CodingError(f"method={self.method}: one of {', '.join(METHODS)}")
        if self.cdf not in CDFS:
            raise CodingError(f"cdf={self.cdf}: one of {', '.join(CDFS)}")
        for name, least in (("group", 1), ("lanes", 1), ("step_rate", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise CodingError(f"{name}={getattr(self, name)}: must be at least {least}")
        if max(self.group, self.lanes) > MOST_AT_ONCE:
            raise CodingError(
                f"group={self.group}, lanes={self.lanes}: must be at most {MOST_AT_ONCE}"
            )

    @classmethod
    def of(cls, values: Any) -> Settings:
        """Return the settings that a header has; what it leaves out has its default.

        Raises:
          ConfigError: a value of another type.
          CodingError: no object, a setting that is not known, or a value out of range.
        """
        kinds = typing.get_type_hints(cls)
        if not isinstance(values, dict) or not values.keys() <= kinds.keys():
            raise CodingError(f"settings={short(values)}: an object with {', '.join(kinds)}")
        return cls(**{name: typed(value, kinds[name], name) for name, value in values.items()})


@dataclass(frozen=True)
class Coded:
    """A coded file.

    Attributes:
      header: `shape` [n,h,w,c], `settings`, `model`, and for lossless files `net_bits`, what the
        images took, `initial_bits`, what the stack held before and gives back, and `borrowed`,
        the words that it took from below itself.
      sections: what the coder wrote.
    """

    header: dict[str, Any]
    sections: list[bytes]

    @property
    def payload_bytes(self) -> int:
        """Return the size of the sections."""
        return sum(map(len, self.sections))

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        sizes = [len(section) for section in self.sections]
        header = {"format": FORMAT, "sections": sizes} | self.header
        return json.dumps(header).encode() + b"\n" + b"".join(self.sections)

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> Coded:
        """Read the content of a file.

        Args:
          name: of the file, for messages.

        Raises:
          CodingError: it is no such file, damaged or cut off.
        """
        line, _, rest = content.partition(b"\n")
        try:
            header = parse_json(line)
            right = header.pop("format") == FORMAT
        except (ValueError, KeyError, TypeError, AttributeError):
            right = False
        if not right:
            raise CodingError(f"{name}: not a file of {FORMAT!r}; make one with mode=encode")
        try:
            sizes = [*typed(header.pop("sections", None), tuple[int, ...], "sections")]
            _check_header(header, sizes)
        except (ConfigError, CodingError) as error:
            raise CodingError(
                f"{name}: its header is damaged ({error}): make it anew with mode=encode"
            ) from error
        if sum(sizes) != len(rest):
            raise CodingError(
                f"{name}: {len(rest)} bytes follow the header, not {sum(sizes)}: "
                "the file is cut off or damaged"
            )
        ends = np.cumsum([0, *sizes])
        return cls(header, [rest[a:b] for a, b in zip(ends[:-1], ends[1:])])

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with replacing(path) as file:
            file.write(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Coded:
        """Read a file.

        Raises:
          CodingError: it is missing, no such file, damaged or cut off.
        """
        if not path.is_file():
            raise CodingError(f"{path}: no such file")
        return cls.from_bytes(path.read_bytes(), str(path))


def _check_header(header: dict[str, Any], sizes: list[int]) -> None:
    """Check what a decoder reads of a header, in place, and that the sections are of its coder.

    Raises:
      ConfigError: a value of another type.
      CodingError: a value that no encoder writes.
    """
    shape = typed(header.get("shape"), tuple[int, ...], "shape")
    if len(shape) != 4 or min(shape) < 1 or shape[0] > MOST_IMAGES or math.prod(shape) >= 2**48:
        raise CodingError(f"shape={short(shape)}: images, height, width, channels")
    settings = Settings.of(header.get("settings"))
    # What was checked is what a decoder gets: 8.0 has passed as 8.
    header |= {"shape": [*shape], "settings": dataclasses.asdict(settings)}
    if not isinstance(header.get("model"), dict):
        raise CodingError(f"model={short(header.get('model'))}: must be an object")
    if settings.method == "lossless":
        count, lanes, heads, tails = 2, settings.lanes, sizes[0::2], sizes[1::2]
        header["borrowed"] = typed(header.get("borrowed"), int, "borrowed")
        if header["borrowed"] < 0:
            raise CodingError(f"borrowed={header['borrowed']}: must be at least 0")
    else:
        count, lanes, heads, tails = 3 * -(-shape[0] // settings.group), 1, sizes[1::3], sizes[2::3]
    if len(sizes) != count:
        raise CodingError(f"{len(sizes)} sections, not {count}")
    if min(sizes) < 0 or any(n != 8 * lanes for n in heads) or any(n % 2 for n in tails):
        raise CodingError(f"sections={short(sizes)}: not those of a stack of {lanes} lanes")
