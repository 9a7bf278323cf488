"""Asymmetric numeral systems: a stack of bits on which a symbol is pushed at the cost of its information (Duda 2013).

A symbol that owns `frequency` of the 2^30 slots, from `start` on, maps the state s of a lane to

    push   s' = (s // frequency) * 2^30 + start + s % frequency
    pop    s  = frequency * (s' >> 30) + s' % 2^30 - start

so that s' / s is 2^30 / frequency and one undoes the other exactly. The slot s' % 2^30 tells which symbol to pop; on a stack of
random bits it is uniform, so popping is also drawing from the model, at the price of as many bits: that is bits-back coding.
Whoever pops more than was pushed gets the bits of a fixed pseudo-random sequence, counted, which the other side gets back.

The state has `lanes` words of 64 bits that work side by side, and one common tail of 16-bit words. A head stays above 2^48:
rounding in s // frequency costs about frequency / s, and a chain of a thousand steps pushes every pixel a thousand times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, ndtr, ndtri

from ddpm_jax.errors import UserError

PRECISION = 30  # log2 of the slots: a rare symbol still needs one, a leak of thousands of them must not matter
SLOTS = 1 << PRECISION
WORD = 16  # bits of the tail's words
_WORD, _LOW = np.uint64(WORD), np.uint64(1 << (64 - WORD))
_P, _MASK = np.uint64(PRECISION), np.uint64(SLOTS - 1)


class CodingError(UserError):
    """A coded file that cannot be read, or data that cannot be coded."""


class Stack:
    """The message. `lanes` heads, uint64 in [2^48, 2^64), the tail, and how many words were borrowed below it.

    Args:
      lanes: symbols handled at once; each costs up to 64 bits of the finished message.
      seed: of the pseudo-random bits that are there in the beginning.
    """

    def __init__(self, lanes: int, seed: int = 0) -> None:
        self._random = np.random.Philox(key=np.array([seed, 0], np.uint64))
        self.heads = self._random.random_raw(lanes) >> _WORD | _LOW
        self._in_heads = self._head_bits()
        self.borrowed = 0
        self._tail, self._length = np.empty(1024, np.uint16), 0

    @classmethod
    def of(cls, heads: np.ndarray, tail: np.ndarray) -> Stack:
        """A message as received: nothing is borrowed from it."""
        stack = cls(len(heads))
        stack.heads, stack._tail, stack._length = heads.astype(np.uint64), tail.astype(np.uint16), len(tail)
        return stack

    @property
    def lanes(self) -> int:
        return len(self.heads)

    @property
    def tail(self) -> np.ndarray:
        return self._tail[: self._length].copy()

    @property
    def bits(self) -> float:
        """The information in the message: log2 of the heads, and the tail."""
        return self._head_bits() + WORD * self._length

    @property
    def initial_bits(self) -> float:
        """Of these, what was there in the beginning or was borrowed since: the other side has it again after the last symbol."""
        return self._in_heads + WORD * self.borrowed

    def is_initial(self, borrowed: int, seed: int = 0) -> bool:
        """Whether exactly the bits of a fresh stack are left, with `borrowed` words of its sequence uncovered."""
        fresh = Stack(self.lanes, seed)
        words = fresh._draw(borrowed)[::-1]
        return bool(np.array_equal(self.heads, fresh.heads) and np.array_equal(self.tail, words))

    def push(self, start: np.ndarray, frequency: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Puts symbols [n] on the stack, the last first, so that `pop` finds them in order.

        Args:
          start, frequency: uint64 [n]; frequency in 1..SLOTS-1.
          mask: uint64 [n] below SLOTS, added without carry to the slots; see `pop`.
        """
        for rows in reversed(self._rounds(len(start))):
            f, heads = frequency[rows], self.heads[: rows.stop - rows.start]
            most = f << np.uint64(64 - PRECISION)
            for _ in range(2):  # 30 bits at most must go, in words of 16
                full = heads >= most
                self._append(heads[full].astype(np.uint16))
                heads[full] >>= _WORD
            quotient, rest = np.divmod(heads, f)
            heads[:] = (quotient << _P) + rest + start[rows]
            if mask is not None:
                heads ^= mask[rows]

    def pop(
        self,
        count: int,
        symbol_at: Callable[[slice, np.ndarray], tuple[np.ndarray, ...]],
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Takes `count` symbols off the stack.

        Args:
          symbol_at: (rows, slots uint64) -> (symbols int64, start, frequency uint64) of those rows.
          mask: random numbers, if this is a draw: the slots are what was pushed last, not uniform, and not independent of it.
            With a mask known to both sides the draw is as random as the mask.
        """
        symbols = np.empty(count, np.int64)
        for rows in self._rounds(count):
            heads = self.heads[: rows.stop - rows.start]
            if mask is not None:
                heads ^= mask[rows]
            slots = heads & _MASK
            symbols[rows], start, frequency = symbol_at(rows, slots)
            heads[:] = frequency * (heads >> _P) + slots - start
            for bound in (_LOW >> _WORD, _LOW):  # the word that went last comes first
                empty = heads < bound
                heads[empty] = heads[empty] << _WORD | self._take(int(empty.sum()))
        return symbols

    def _head_bits(self) -> float:
        return float(np.log2(self.heads.astype(np.float64)).sum())

    def _rounds(self, count: int) -> list[slice]:
        return [slice(i, min(i + self.lanes, count)) for i in range(0, count, self.lanes)]

    def _append(self, words: np.ndarray) -> None:
        end = self._length + len(words)
        if end > len(self._tail):
            self._tail = np.concatenate([self._tail[: self._length], np.empty(end, np.uint16)])
        self._tail[self._length : end] = words
        self._length = end

    def _take(self, count: int) -> np.ndarray:
        if count > self._length:
            missing = count - self._length
            self._tail = np.concatenate([self._draw(missing)[::-1], self._tail[: self._length]])
            self._length, self.borrowed = count, self.borrowed + missing
        self._length -= count
        return self._tail[self._length : self._length + count].astype(np.uint64)

    def _draw(self, count: int) -> np.ndarray:
        return self._random.random_raw(count).astype(np.uint16)


def draw_mask(seed: int, draw: int, count: int) -> np.ndarray:
    """Random slots, uint64 [count], of one draw: the same for sender and receiver."""
    return np.random.Philox(key=np.array([seed, draw], np.uint64)).random_raw(count) & _MASK


# ---------------------------------------------------------------------------------------------- Gaussians in bins


def cdf_erf(z: np.ndarray) -> np.ndarray:
    return ndtr(z)


def cdf_tanh(z: np.ndarray) -> np.ndarray:
    """The approximation of the paper's code, see `diffusion.standard_normal_cdf_tanh`, in float64."""
    return expit(2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))


@dataclass(frozen=True)
class Lattice:
    """The bins that real numbers are cut into: bin k is [origin + k width, origin + (k+1) width), the outer two are open."""

    origin: float
    width: float
    bins: int

    def centres(self, k: np.ndarray) -> np.ndarray:
        return self.origin + (k + 0.5) * self.width


class BinnedGaussian:
    """N(mean, std^2) over the bins of a lattice, in slots.

    Args:
      mean, std: float64 [n].
      leak: give every bin at least one slot, at the cost of bins / 2^30 for the others. The model of what may be anything must
        leak, or an unlikely symbol has no code. The model that symbols are drawn from must not: its far tails would be drawn
        far too often.
    """

    def __init__(
        self,
        lattice: Lattice,
        mean: np.ndarray,
        std: np.ndarray,
        *,
        leak: bool,
        cdf: Callable[[np.ndarray], np.ndarray] = cdf_erf,
    ) -> None:
        self._lattice, self._mean, self._std, self._leak, self._cdf = lattice, mean, std, leak, cdf

    def push(self, stack: Stack, k: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Codes bins k, int64 [n]."""
        rows = slice(0, len(k))
        start, end = self._edge(rows, k), self._edge(rows, k + 1)
        if (end <= start).any():
            raise CodingError("the message is of another model, or this machine computes the network differently")
        stack.push(start.astype(np.uint64), (end - start).astype(np.uint64), mask)

    def pop(self, stack: Stack, mask: np.ndarray | None = None) -> np.ndarray:
        """Decodes, or draws, bins int64 [n]."""
        return stack.pop(len(self._mean), self._symbol_at, mask)

    def _edge(self, rows: slice, k: np.ndarray) -> np.ndarray:
        """The slot where bin k begins, int64."""
        lattice = self._lattice
        edge = lattice.origin + k * lattice.width
        share = self._cdf((edge - self._mean[rows]) / self._std[rows])
        leak = 1 if self._leak else 0
        slots = np.floor((SLOTS - leak * lattice.bins) * share).astype(np.int64) + leak * k
        return np.where(k <= 0, 0, np.where(k >= lattice.bins, SLOTS, slots))

    def _symbol_at(self, rows: slice, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The bin that a slot lies in, by bisection, begun where the Gaussian's quantile says."""
        lattice, slots = self._lattice, slots.astype(np.int64)
        quantile = self._mean[rows] + self._std[rows] * ndtri((slots + 0.5) / SLOTS)
        guess = np.clip((quantile - lattice.origin) / lattice.width, 0, lattice.bins - 1).astype(np.int64)
        low, high = np.maximum(guess - 1, 0), np.minimum(guess + 2, lattice.bins)
        low = np.where(self._edge(rows, low) <= slots, low, 0)
        high = np.where(self._edge(rows, high) > slots, high, lattice.bins)
        while (high - low > 1).any():
            middle = (low + high) // 2
            below = self._edge(rows, middle) <= slots
            low, high = np.where(below, middle, low), np.where(below, high, np.maximum(middle, low + 1))
        start = self._edge(rows, low)
        return low, start.astype(np.uint64), (self._edge(rows, low + 1) - start).astype(np.uint64)
