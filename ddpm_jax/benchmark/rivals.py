"""Run the same network in PyTorch, as diffusers builds it, in a process of its own.

Its training step does what ours does: flips, noise, the forward and backward pass, a clip of the
norm, fused Adam and one moving average. Its sampling step is the ancestral one. The process works
when it is asked to, and ends with the one that started it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.machine import HUGE_PAGES
from ddpm_jax.weights.layouts.diffusers_config import network_config

VARIANTS = ("eager", "compiled")  # channels_last both; the second through torch.compile
LONGEST_LINE = 400  # characters of what a library says of an error


class RivalError(UserError):
    """PyTorch cannot take part."""


class Diffusers:
    """diffusers' UNet2DModel in a process of its own.

    Args:
      config: of the network, batch sizes aside; dtype bfloat16 means autocast.
      threads: of PyTorch, where it runs on a CPU.

    Raises:
      RivalError: PyTorch or diffusers is not installed, sees no GPU where JAX is on one, or failed.
      WeightsError: diffusers has no such network.
    """

    def __init__(self, config: Config, batch_size: int, threads: int) -> None:
        network = {
            name: value
            for name, value in network_config(config).items()
            if not name.startswith("_")
        }
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        task = (
            network,
            batch_size,
            threads,
            config.model.dtype == "bfloat16",
            config.optimizer.gradient_clip,
        )
        self._process = context.Process(
            target=_serve, args=(there, task), name="rival", daemon=True
        )
        # PyTorch has its memory as it comes, and not as our commands arrange theirs.
        ours = os.environ.get("GLIBC_TUNABLES") == HUGE_PAGES
        if ours:
            del os.environ["GLIBC_TUNABLES"]
        self._process.start()
        if ours:
            os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        there.close()
        self.about: dict[str, Any] = self._receive()
        platform = jax.default_backend()
        if platform != "cpu" and self.about["device"] == "cpu":
            self.close()
            raise RivalError(
                f"against=diffusers: PyTorch {self.about['torch']} is on the CPU and JAX on a "
                f"{platform}: install PyTorch's build for CUDA, or leave against out"
            )

    def train(self, variant: str, steps: int) -> float:
        """Return the seconds a training step, of so many."""
        return self._ask(("train", variant, steps))

    def sample(self, variant: str, steps: int) -> float:
        """Return the seconds a sampling step, of so many."""
        return self._ask(("sample", variant, steps))

    def peak_bytes(self) -> int:
        """Return the most bytes in use at once, on the GPU or, on a CPU, by the process."""
        return self._ask(("memory", "", 0))

    def close(self) -> None:
        """End the process."""
        self._here.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()

    def _ask(self, request: tuple[str, str, int]) -> Any:
        with contextlib.suppress(BrokenPipeError):  # `_receive` says that nobody is there
            self._here.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer, error = self._here.recv()
        except (EOFError, ConnectionError) as problem:
            raise RivalError(
                "against=diffusers: the process with PyTorch died, perhaps for lack of memory"
            ) from problem
        if error:
            raise RivalError(f"against=diffusers: {error}")
        return answer


def _serve(pipe: Connection, task: tuple[Any, ...]) -> None:
    """Do what is asked over `pipe`, and answer (result, None) or (None, the error in one line)."""
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):  # nobody asks any more
        try:
            work = _prepare(*task)
        except ImportError as error:
            pipe.send((None, f"{error}; pip install 'ddpm_jax[torch]'"))
            return
        except Exception as error:  # libraries of others: it has any type, and the parent says it
            pipe.send((None, _line(error)))
            return
        pipe.send((work["about"], None))
        while True:
            what, variant, steps = pipe.recv()
            try:
                answer = work[what](variant, steps), None
            except Exception as error:  # such as out of memory, or a compiler that is missing
                answer = None, f"{variant}: {_line(error)}"
            pipe.send(answer)


def _line(error: Exception) -> str:
    """Return what an error says in one line, of a bearable length, and its type."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def batch_shape(network: dict[str, Any], batch_size: int) -> tuple[int, int, int, int]:
    """Return (images, channels, height, width) of a batch for a network of `network_config`."""
    size = network["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return batch_size, network["in_channels"], height, width


def _prepare(
    network: dict[str, Any], batch_size: int, threads: int, half: bool, gradient_clip: float
) -> dict[str, Callable[..., Any] | dict[str, Any]]:
    import resource

    import diffusers
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = diffusers.UNet2DModel(**network).to(device, memory_format=torch.channels_last)
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, fused=True)
    forward = {"eager": model, "compiled": torch.compile(model)}
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    signal, noise_level = (
        x.float().to(device)[:, None, None, None]
        for x in (alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())
    )
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    of_x0 = betas * before.sqrt() / (1 - alphas_cumprod)
    of_x = (1 - betas).sqrt() * (1 - before) / (1 - alphas_cumprod)
    shape, classes = batch_shape(network, batch_size), network["num_class_embeds"]
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    labels = torch.arange(batch_size, device=device) % classes if classes else None

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=half)

    def finished() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def train(variant: str, steps: int) -> float:
        model.train()
        start = finished()
        for _ in range(steps):
            x0 = (
                images.to(device, non_blocking=True, memory_format=torch.channels_last).float()
                / 127.5
                - 1
            )
            x0 = torch.where(torch.rand(batch_size, 1, 1, 1, device=device) < 0.5, x0, x0.flip(-1))
            t, eps = torch.randint(0, 1000, (batch_size,), device=device), torch.randn_like(x0)
            with autocast():
                x = signal[t] * x0 + noise_level[t] * eps
                predicted = forward[variant](x, t, class_labels=labels).sample
            F.mse_loss(predicted.float(), eps).backward()
            if gradient_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(average, list(model.parameters()), 1e-4)
        return (finished() - start) / steps

    @torch.no_grad()
    def sample(variant: str, steps: int) -> float:
        model.eval()
        x = torch.randn(*shape, device=device).contiguous(memory_format=torch.channels_last)
        start = finished()
        for i in range(999, 999 - steps, -1):
            with autocast():
                t = torch.full((batch_size,), i, device=device)
                eps = forward[variant](x, t, class_labels=labels).sample.float()
            x0 = ((x - noise_level[i] * eps) / signal[i]).clamp(-1, 1)
            x = (
                float(of_x0[i]) * x0
                + float(of_x[i]) * x
                + float(betas[i].sqrt()) * torch.randn_like(x)
            )
        return (finished() - start) / steps

    def memory(variant: str, steps: int) -> int:
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    about = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return {"about": about, "train": train, "sample": sample, "memory": memory}
