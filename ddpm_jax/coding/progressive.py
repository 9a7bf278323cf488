"""Send x_T, ..., x_0 one after the other, so that every prefix of the message is a picture.

This is the progressive coding of Ho et al. 2020, section 4.3. Their Algorithms 3 and 4 send x_{t-1}
at the cost of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) by coding relative to noise that sender
and receiver share, and leave open how. Here a step leads from t to any s < t, and with the
posterior's variance

    x_s = mean of p + sigma z,    z ~ N(0, I) under p,    z ~ N(d, I) under q,
    |d|^2 = (SNR_s - SNR_t) |x_0 - x0_hat|^2,

so what is to be sent is noise that leans towards d. Steps of a fraction of a bit, as a chain of a
thousand has, would waste most of what they send: the sender jumps as far as `step_rate` bits/dim
reach. It sends s, and the number of bits n, which stands for the size of d: p is widened to the
variance 1 + mean(d^2), and the cost becomes that of Gaussian d, size/2 log2(1 + mean(d^2)).

The shared noise is a codebook of Gaussian words, walked by a trellis: n bits cut z into n segments,
the word of a segment is chosen by the last `MEMORY` bits, and Viterbi's algorithm finds the path
with the largest log q(z) - log p(z) (trellis source coding, Viterbi & Omura 1974). With endless
memory the best path would lean as far as a draw of q does in the mean; with 2^14 states that takes
a tenth more bits, `SURPLUS`. A path that falls short is no error: both sides have the same x_s, and
the next step codes what is missing.

The message: for each step the changes of t - s and of n, in Elias' gamma code, then n bits; at the
end x_0 under the decoder p(x_0 | x_1), by `ans`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from ddpm_jax.coding.ans import Stack
from ddpm_jax.coding.bits_back import CDFS, LEVELS, Network, decoder_moments
from ddpm_jax.coding.gaussians import BinnedGaussian
from ddpm_jax.diffusion.schedule import NoiseSchedule
from ddpm_jax.errors import CodingError

MEMORY = 14  # bits of a state of the trellis
SURPLUS = 1.1  # bits sent for each bit of KL: what a trellis of this memory falls short of
LEAST_BITS = 24  # of a step: codes much shorter than that are worth half their length
AT_ONCE = 64  # segments whose words are compared at once, which takes AT_ONCE * 2^MEMORY numbers


@dataclass(frozen=True)
class Received:
    """The state of a receiver after some steps.

    Attributes:
      t: the timestep that has been reached.
      bits: read so far.
      x0: x0_hat, [b,h,w,c].
      x: x_t itself, [b,h,w,c].
    """

    t: int
    bits: int
    x0: np.ndarray
    x: np.ndarray


class ProgressiveCoder:
    """A coder that sends and receives groups of images.

    Args:
      step_rate: bits/dim that a step should send, but never fewer than LEAST_BITS in all. The
        smaller, the fresher is x0_hat, and the more often the network is asked.
      cdf: of the decoder.
      seed: of the shared noise.
      on_step: called after each forward pass: for progress.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        network: Network,
        *,
        step_rate: float = 0.02,
        cdf: str = "erf",
        seed: int = 0,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._signal = schedule.alphas_cumprod
        self._noise = schedule.sqrt_one_minus_alphas_cumprod**2
        self._network, self._cdf, self._seed, self._on_step = network, CDFS[cdf], seed, on_step
        self._step_rate = step_rate

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, Stack]:
        """Code uint8 images [b,h,w,c].

        Returns:
          The bits of all transitions, uint8 of 0 and 1, and the stack that holds x_0.
        """
        x0, bits, before = LEVELS.centres(images.astype(np.float64)), _BitWriter(), (0, 0)
        t, x = self._start(images.shape)
        while t > 0:
            x0_hat = self._x0_hat(x, t)
            s, count = self._plan(t, np.mean((x0 - x0_hat) ** 2), x.size)
            mean, std, on_x0 = self._transition(t, s, x, x0_hat)
            noise = SharedNoise(self._seed, t, x.size, count)
            path = noise.search((on_x0 * (x0 - x0_hat) / std).ravel())
            for now, then in zip((t - s, count), before):
                bits.gamma(_zigzag(now - then) + 1)
            bits.extend(path)
            t, x, before = s, mean + std * noise.of(path).reshape(x.shape), (t - s, count)
        stack = Stack(1, self._seed)
        self._decoder(x).push(stack, images.astype(np.int64).ravel())
        return bits.bits(), stack

    def receive(self, bits: np.ndarray, shape: tuple[int, ...]) -> Iterator[Received]:
        """Read the steps of images of `shape`, up to x_1; stop whenever it is enough.

        Yields:
          What has been received before each step, and at the end.

        Raises:
          CodingError: the message is damaged, or of another model.
        """
        reader, jump, count = _BitReader(bits), 0, 0
        t, x = self._start(shape)
        while t > 0:
            x0_hat = self._x0_hat(x, t)
            yield Received(t, reader.position, x0_hat, x)
            jump += _unzigzag(reader.gamma() - 1)
            count += _unzigzag(reader.gamma() - 1)
            s = t - jump
            if not 0 <= s < t:
                raise CodingError(
                    "the message does not lead to x_0: it is damaged, or was coded by another model"
                )
            path = reader.take(count)
            mean, std, _ = self._transition(t, s, x, x0_hat)
            t, x = s, mean + std * SharedNoise(self._seed, t, x.size, count).of(path).reshape(shape)
        yield Received(0, reader.position, self._x0_hat(x, 0), x)

    def decode(self, bits: np.ndarray, stack: Stack, shape: tuple[int, ...]) -> np.ndarray:
        """Decode the whole message, the uint8 images [b,h,w,c]."""
        *_, last = self.receive(bits, shape)
        return self._decoder(last.x).pop(stack).astype(np.uint8).reshape(shape)

    def _start(self, shape: tuple[int, ...]) -> tuple[int, np.ndarray]:
        """Return T-1 and x_T, which are shared: L_T says that nothing need be sent."""
        size, timesteps = int(np.prod(shape)), len(self._signal)
        noise = SharedNoise(self._seed, timesteps, size, 0).of(np.zeros(0, np.uint8))
        return timesteps - 1, noise.reshape(shape)

    def _plan(self, t: int, squared_error: float, size: int) -> tuple[int, int]:
        """Choose the s < t to go to, and the bits to spend.

        It goes as far as `step_rate` reaches, and at least one timestep.
        """
        snr = self._signal[: t + 1] / self._noise[: t + 1]
        counts = SURPLUS * size / 2 * np.log2(1 + squared_error * (snr[:-1] - snr[-1]))
        affordable = np.flatnonzero(counts <= max(self._step_rate * size, LEAST_BITS))
        s = int(affordable[0]) if affordable.size else t - 1
        return s, round(counts[s])

    def _x0_hat(self, x: np.ndarray, t: int) -> np.ndarray:
        x0_hat = self._network(x.astype(np.float32), t).x0
        self._on_step()
        if not np.isfinite(x0_hat).all():
            raise CodingError(
                f"the network's output is not finite at t={t}: "
                "code with another checkpoint or other weights"
            )
        return x0_hat

    def _transition(
        self, t: int, s: int, x: np.ndarray, x0_hat: np.ndarray
    ) -> tuple[np.ndarray, float, float]:
        """Return the step from t to s at x0_hat, eq. 7.

        Returns:
          Its mean, its standard deviation, and the factor of x0 in the mean.
        """
        ratio = self._signal[t] / self._signal[s]
        beta = self._noise[t] - ratio * self._noise[s]
        on_x0 = beta * np.sqrt(self._signal[s]) / self._noise[t]
        on_x_t = np.sqrt(ratio) * self._noise[s] / self._noise[t]
        return on_x0 * x0_hat + on_x_t * x, np.sqrt(beta * self._noise[s] / self._noise[t]), on_x0

    def _decoder(self, x: np.ndarray) -> BinnedGaussian:
        """Return p(x_0 | x_1), eq. 13."""
        mean, std = decoder_moments(self._network(x.astype(np.float32), 0), 0)
        return BinnedGaussian(LEVELS, mean, std, leak=True, cdf=self._cdf)


# --------------------------------------------------------------------------------- the shared noise


class SharedNoise:
    """A codebook of Gaussian vectors [size], one for each path of `count` bits.

    It is a function of (seed, t, size, count) alone. The vectors' variance is 1 + mean(d^2) for the
    d that takes `count` bits.
    """

    def __init__(self, seed: int, t: int, size: int, count: int) -> None:
        self._size, self._memory = size, min(MEMORY, count)
        self._segments, self._width = max(count, 1), -(-size // max(count, 1))
        self._variance = 2 ** (2 * count / SURPLUS / size)
        random = np.random.Philox(key=np.array([seed, t], np.uint64))
        raw = random.random_raw((1 << self._memory) * self._width)
        words = np.sqrt(self._variance) * ndtri(((raw >> np.uint64(11)) + 0.5) / 2**53)
        self._words = words.astype(np.float32).reshape(-1, self._width)
        # The pixels of a segment lie anywhere, and no two segments use the same signs of a word.
        self._order = np.argsort(random.random_raw(size), kind="stable")
        signs = random.random_raw(self._segments * self._width) >> np.uint64(63)
        self._signs = signs.astype(np.float32) * 2 - 1

    def of(self, path: np.ndarray) -> np.ndarray:
        """Return the vector of a path, float64."""
        states = np.zeros(self._segments, np.int64)
        state, mask = 0, (1 << self._memory) - 1
        for j, bit in enumerate(path):
            states[j] = state = (state << 1 | int(bit)) & mask
        z = np.empty(self._size)
        z[self._order] = (self._words[states].ravel() * self._signs)[: self._size]
        return z

    def search(self, lean: np.ndarray) -> np.ndarray:
        """Find the path, uint8 [count], whose vector z speaks most for q against p.

        With q = N(lean, I) and p = N(0, variance I), log q - log p is, but for a constant,

            z.lean - (1 - 1/variance) |z|^2 / 2,

        a sum over segments, hence Viterbi's algorithm.
        """
        if not self._memory:
            return np.zeros(0, np.uint8)
        padded = np.zeros(self._segments * self._width, np.float32)
        padded[: self._size] = lean[self._order]
        leans = (padded * self._signs).reshape(self._segments, -1)
        costs = np.float32((1 - 1 / self._variance) / 2) * (self._words**2).sum(axis=1)
        parts = np.array_split(leans, -(-self._segments // AT_ONCE))
        gains = (gain for part in parts for gain in part @ self._words.T - costs)
        states = len(self._words)
        top = states >> 1
        # A state is reached from low, or from low with the oldest bit set.
        low = np.arange(states) >> 1
        best = np.full(states, -np.inf, np.float32)
        best[0] = 0
        from_top = np.empty((self._segments, states), bool)
        for j, gain in enumerate(gains):
            from_top[j] = best[low + top] > best[low]
            best = np.where(from_top[j], best[low + top], best[low]) + gain
        path, state = np.empty(self._segments, np.uint8), int(best.argmax())
        for j in reversed(range(self._segments)):
            path[j] = state & 1
            state = state >> 1 | (top if from_top[j, state] else 0)
        return path


# -------------------------------------------------------------------------------------------- bits


def _zigzag(n: int) -> int:
    return 2 * n if n >= 0 else -2 * n - 1


def _unzigzag(n: int) -> int:
    return n // 2 if n % 2 == 0 else -(n + 1) // 2


class _BitWriter:
    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def gamma(self, n: int) -> None:
        """Write n >= 1 in Elias' gamma code: a zero for each bit of n after the first, then n."""
        digits = bin(n)[2:]
        self.extend(np.array([0] * (len(digits) - 1) + [int(digit) for digit in digits], np.uint8))

    def extend(self, bits: np.ndarray) -> None:
        self._parts.append(bits)

    def bits(self) -> np.ndarray:
        return np.concatenate(self._parts) if self._parts else np.zeros(0, np.uint8)


class _BitReader:
    def __init__(self, bits: np.ndarray) -> None:
        self._bits, self.position = bits, 0

    def take(self, count: int) -> np.ndarray:
        if count < 0 or self.position + count > len(self._bits):
            raise CodingError(
                "the message ends in the middle of a step: "
                "it is cut off, or was coded by another model"
            )
        self.position += count
        return self._bits[self.position - count : self.position]

    def gamma(self) -> int:
        zeros = 0
        while not self.take(1)[0]:
            zeros += 1
        return int("1" + "".join(map(str, self.take(zeros))), 2)
