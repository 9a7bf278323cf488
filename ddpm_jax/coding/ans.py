"""Push symbols on a stack of bits at the cost of their information: asymmetric numeral systems.

The method is Duda's (2013).

A symbol that owns `frequency` of the 2^30 slots, from `start` on, maps the state s of a lane to

    push   s' = (s // frequency) * 2^30 + start + s % frequency
    pop    s  = frequency * (s' >> 30) + s' % 2^30 - start

so that s' / s is 2^30 / frequency and one undoes the other exactly. The slot s' % 2^30 tells which
symbol to pop. On a stack of random bits it is uniform, so popping is also drawing from the model,
at the price of as many bits: that is bits-back coding. Whoever pops more than was pushed gets the
bits of a fixed pseudo-random sequence, counted, which the other side gets back.

The state has `lanes` words of 64 bits that work side by side, and one common tail of 16-bit words.
A head stays above 2^48: rounding in s // frequency costs about frequency / s, and a chain of a
thousand steps pushes every pixel a thousand times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# log2 of the slots: a rare symbol still needs one, and a leak of thousands of them must not matter.
PRECISION = 30
SLOTS = 1 << PRECISION
WORD = 16  # bits of the tail's words
_WORD, _LOW = np.uint64(WORD), np.uint64(1 << (64 - WORD))
_P, _MASK = np.uint64(PRECISION), np.uint64(SLOTS - 1)


class Stack:
    """The message: heads, a tail, and a pseudo-random sequence below it that can be borrowed from.

    Args:
      lanes: symbols handled at once; each costs up to 64 bits of the finished message.
      seed: of the pseudo-random bits that are there in the beginning.

    Attributes:
      heads: uint64 [lanes], in [2^48, 2^64).
      borrowed: words of the sequence that have been taken.
    """

    def __init__(self, lanes: int, seed: int = 0) -> None:
        self._random = np.random.Philox(key=np.array([seed, 0], np.uint64))
        self.heads = self._random.random_raw(lanes) >> _WORD | _LOW
        self._in_heads = self._head_bits()
        self.borrowed = 0
        self._tail, self._length = np.empty(1024, np.uint16), 0

    @classmethod
    def of(cls, heads: np.ndarray, tail: np.ndarray) -> Stack:
        """Return a message as it was received: nothing is borrowed from it."""
        stack = cls(len(heads))
        stack.heads = heads.astype(np.uint64)
        stack._tail, stack._length = tail.astype(np.uint16), len(tail)
        return stack

    @property
    def lanes(self) -> int:
        """Return the number of heads."""
        return len(self.heads)

    @property
    def tail(self) -> np.ndarray:
        """Return the words below the heads, uint16."""
        return self._tail[: self._length].copy()

    @property
    def bits(self) -> float:
        """Return the information in the message: log2 of the heads, and the tail."""
        return self._head_bits() + WORD * self._length

    @property
    def initial_bits(self) -> float:
        """Return the bits that were there in the beginning or were borrowed since.

        The other side has them again after the last symbol.
        """
        return self._in_heads + WORD * self.borrowed

    def is_initial(self, borrowed: int, seed: int = 0) -> bool:
        """Say whether exactly the bits of a fresh stack are left.

        Args:
          borrowed: words of its sequence that lie uncovered.
        """
        if borrowed != self._length:  # which a damaged file may claim to be of any size
            return False
        fresh = Stack(self.lanes, seed)
        words = fresh._draw(borrowed)[::-1]
        return bool(np.array_equal(self.heads, fresh.heads) and np.array_equal(self.tail, words))

    def push(
        self, start: np.ndarray, frequency: np.ndarray, mask: np.ndarray | None = None
    ) -> None:
        """Put symbols [n] on the stack, the last first, so that `pop` gives them in order.

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
        """Take `count` symbols off the stack.

        Args:
          symbol_at: (rows, slots uint64) -> (symbols int64, start, frequency uint64) of those rows.
          mask: random numbers, if this is a draw: the slots are what was pushed last, not uniform,
            and not independent of it. With a mask known to both sides the draw is as random as the
            mask.
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
    """Draw random slots, uint64 [count], for one draw: the same for sender and receiver."""
    return np.random.Philox(key=np.array([seed, draw], np.uint64)).random_raw(count) & _MASK
