"""Find a batch that fits into a device's memory, by compiling as few batches as possible."""

from __future__ import annotations

from collections.abc import Callable


def fitting_batch(
    needed: Callable[[int], int], batch_size: int, unit: int, used: int, fixed: int, hbm: int
) -> int:
    """Find a batch below `batch_size` that fits, a multiple of `unit` by 2^a or 3 2^a.

    The bytes used are taken as `fixed` plus so many an image, and the batch that follows is put to
    the test.

    Args:
      needed: compiles a batch of this size and gives its bytes.
      unit: the least batch.
      used: bytes of `batch_size` images, more than `hbm`.
      fixed: bytes that no batch makes fewer.
      hbm: bytes that a chip has.

    Returns:
      The batch, or 0 if not even `unit` fits.
    """
    while batch_size > unit:
        share = max(hbm - fixed, 0) / (used - fixed) if used > fixed else 0.5
        batch_size = unit * round_down(int(batch_size * share) // unit)
        used = needed(batch_size)
        if used <= hbm:
            return batch_size
    return 0


def round_down(count: int) -> int:
    """Return the largest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... up to `count`, and 1 below."""
    power = 1 << max(count.bit_length() - 1, 0)
    return power + power // 2 if power > 1 and count >= power + power // 2 else power


def largest_batch(
    needed: Callable[[int], int], start: int, unit: int, fixed: int, memory: int
) -> tuple[int, int]:
    """Find the largest batch that fits, to a sixteenth of it.

    The bytes of two batches, one that fits and one that does not, say where the limit may lie
    between them; every second trial halves what is between them, whatever the bytes say.

    Args:
      needed: compiles a batch of this size and gives its bytes.
      start: the batch to begin with, a multiple of `unit`.
      unit: the least batch; all batches are multiples of it.
      fixed: bytes that no batch makes fewer.
      memory: bytes that a device has.

    Returns:
      The largest batch that was found to fit, 0 if not even `unit` does, and the smallest that was
      found not to fit. All batches between the two are less than a sixteenth, or `unit`, apart.
    """
    low, used_low, high, used_high = 0, min(fixed, memory), 0, 0
    size, halve = start, False
    while True:
        used = needed(size)
        if used <= memory:
            low, used_low = size, used
        else:
            high, used_high = size, used
        grain = unit * (1 << max((low // unit).bit_length() - 5, 0))
        if high and high - low <= grain:
            return low, high
        if high:
            share = 0.5 if halve else (memory - used_low) / (used_high - used_low)
            guess = low + int(share * (high - low)) // grain * grain
            size = min(max(guess, low + grain), high - 1) // unit * unit
            halve = not halve
        else:  # as if all that is not fixed grew with the batch
            share = (memory - fixed) / max(used_low - fixed, 1)
            size = max(low + grain, int(low * min(share, 16.0)) // grain * grain)
