"""Use a trained network from Python: the object that `ddpm_jax.load` hands out."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ddpm_jax.build import Params, build_network, build_process, denoiser, image_shape
from ddpm_jax.config import Config, from_dict, to_dict
from ddpm_jax.data.classes import Labels, classes_of
from ddpm_jax.data.source import ArraySource
from ddpm_jax.diffusion.process import GaussianDiffusion
from ddpm_jax.errors import check
from ddpm_jax.evaluation.nll import Protocol, evaluate_nll
from ddpm_jax.images import from_uint8, to_uint8
from ddpm_jax.parallel.devices import Devices
from ddpm_jax.sampling.generate import Generator, build_generator, even_batch
from ddpm_jax.sampling.sampler import codes_config, with_sampling
from ddpm_jax.trained import Trained, find_origin, open_network

GENERATORS = 8  # compiled chains that a model keeps


def load(
    what: str | Path,
    weights: str = "ema",
    step: int | Literal["best"] | None = None,
    *,
    layout: str | None = None,
    overrides: str | Iterable[str] = (),
    network: Any = None,
) -> Model:
    """Open a trained network. Nothing is written.

    Args:
      what: the name of a network that ships ("digits", "faces", "fashion_mnist",
        "cifar10_small"), a run directory, or a published checkpoint: a file, or a diffusers folder.
      weights: "ema", "raw", or a decay of the run such as "0.9999".
      step: the checkpoint of a run, "best" for the lowest held-out loss; the newest by default.
      layout: the code base that wrote a published checkpoint, where its tensors leave that open.
      overrides: "section.field=value", for settings that a published checkpoint does not tell.
      network: the one of a run that was trained with `train(..., network=...)`.

    Raises:
      UserError: there is no such thing, it may be two things, or it cannot be read as asked.
    """
    devices = Devices()
    options = {"weights": weights, "step": step, "layout": layout, "overrides": overrides}
    return Model(open_network(what, devices, network=network, **options), devices, network)


def train(
    config: Config,
    workdir: str | Path,
    data_dir: str | Path | None = None,
    *,
    step: int | Literal["best"] | None = None,
    from_: str | Path | None = None,
    network: Any = None,
    source: Any = None,
    held_out: Any = None,
) -> Model:
    """Train a network, from the newest checkpoint in `workdir` if there is one, and return it.

    Args:
      workdir: the run directory.
      data_dir: the prepared data sets; by default where the run's data was, or "data".
      step: go on from this checkpoint; newer ones are moved aside, not deleted.
      from_: start from the weights, averages and optimizer of this run, "runs/x" or "runs/x:100",
        or of a network that ships.
      network: one's own in place of the UNet: a Flax module, linen or nnx, called as
        `module(x_t, t)`, with labels as a third where the config has classes; or
        `Network(init, apply)` of two functions. `config.model` must suit the size of the images all
        the same; channel_mult=(1,) and attention_resolutions=() suit any.
      source: training images in place of those of the config: an array uint8 [N,h,w,c], a pair of
        it and labels [N], a function that returns an iterable of arrays, or an ArraySource.
      held_out: images of the held-out loss, likewise, but no function.

    Raises:
      UserError: a config, data set or run directory that does not serve.
      KeyboardInterrupt, SystemExit: on SIGINT and SIGTERM, once the state is saved.
    """
    from ddpm_jax.training import loop, stopping

    what = f"config={config}: must be a Config, such as load_config makes of a file"
    check(isinstance(config, Config), what)
    config = from_dict(to_dict(config))  # through the door of files: lists become tuples
    workdir = Path(workdir).expanduser()
    data_dir = None if data_dir is None else Path(data_dir).expanduser()
    parent = None if from_ is None else find_origin(str(from_), Devices())
    own = {"network": network, "source": source, "held_out": held_out, "parent": parent}
    code = loop.train(config, workdir, data_dir=data_dir, step=step, **own)
    stopping.raise_if_stopped(code, workdir)
    return load(workdir, network=network)


class Model:
    """A trained network on all devices.

    Attributes:
      config: the run that it belongs to.
      process: its diffusion process.
      params: its parameters, on the first device.
      weights: what these are: "ema 0.9999", "raw", or what a published file says.
      step: of the checkpoint.
      notes: what an import has to say: where the settings come from, and warnings.
      classes: the names of its classes, in their order; () where they are not known.
    """

    def __init__(self, trained: Trained, devices: Devices, network: Any = None) -> None:
        self._trained, self._devices = trained, devices
        self._network = build_network(trained.config, network)
        self.config: Config = trained.config
        self.process: GaussianDiffusion = build_process(trained.config)
        self.weights, self.step, self.notes = trained.weights, trained.step, trained.notes
        self.classes: tuple[str, ...] = trained.classes
        self._generator = functools.lru_cache(GENERATORS)(self._build_generator)

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self._trained.params))
        size = "x".join(map(str, image_shape(self.config)))
        return (
            f"<Model of {self.config.data.name}, {size}: {count:,} parameters, "
            f"weights {self.weights!r}, step {self.step}>"
        )

    @functools.cached_property
    def params(self) -> Params:
        """Return the parameters on the first device."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), self._trained.params)

    def denoise(self, x_t: ArrayLike, t: ArrayLike, labels: ArrayLike | None = None) -> jax.Array:
        """Apply the network, compiled, without dropout.

        This is the denoiser that `diffusion/` takes: `reverse_chain(model.process, table,
        model.denoise, x_T, keys)`.

        Args:
          x_t: [b,h,w,c], images in [-1, 1] with noise.
          t: timesteps 0 to T - 1, [b] or one for all.
          labels: classes, [b] or one for all.

        Returns:
          What config.diffusion.prediction says, [b,h,w,c]; twice the channels where the variance is
          learned.
        """
        x_t = jnp.asarray(x_t, jnp.float32)
        t = jnp.broadcast_to(jnp.asarray(t, jnp.int32), x_t.shape[:1])
        if labels is not None:
            labels = jnp.broadcast_to(jnp.asarray(labels, jnp.int32), x_t.shape[:1])
        return self._denoise(self.params, x_t, t, labels)

    @functools.cached_property
    def _denoise(self) -> jax.stages.Wrapped:
        bind = denoiser(self.config, self._network)
        return jax.jit(lambda params, x_t, t, labels: bind(params, labels)(x_t, t))

    def sample(
        self,
        n: int,
        seed: int = 0,
        sampler: str | None = None,
        steps: int | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        order: int | None = None,
        labels: Labels = None,
        guidance: float = 1.0,
        batch_size: int = 64,
        progress: bool = False,
        first: int = 0,
        clip: bool | None = None,
        rederive_eps: bool | None = None,
        dynamic_threshold: float | None = None,
    ) -> np.ndarray:
        """Draw samples `first` to `first + n - 1` of `seed`, as the command `ddpm sample` does.

        Args:
          sampler: "ancestral", "ddim", "unipc" or another; the config's by default, as all.
          steps: of the chain; 0 is all T.
          spacing: of fewer steps than T: "linspace", "trailing", "logsnr" or another.
          eta: of ddim, 0 to 1.
          order: of deis and unipc, 2 or 3.
          labels: a class, or several that are taken in turn, by number or by the name that the run
            has for it (`Model.classes`).
          guidance: classifier-free, towards the label; 1 is none.
          batch_size: samples at once, over all devices.
          progress: show the steps done and the time left on stderr.
          clip, dynamic_threshold: limit x0_hat to [-1, 1], or by this percentile of each sample.
          rederive_eps: of ddim and deis, derive eps_hat from the limited x0_hat.

        Returns:
          uint8 [n,h,w,c].
        """
        check(n >= 1, f"n={n}: must be at least 1")
        check(0 <= first <= 2**32 - n, f"first={first}: must be in 0..{2**32 - n}")
        check(guidance == 1 or labels is not None, f"guidance={guidance}: give labels")
        of_eps = (sampler or self.config.sampling.sampler) in ("ddim", "deis")
        check(of_eps or rederive_eps is None, "rederive_eps: only ddim and deis use eps_hat")
        indices = first + np.arange(n)
        inputs = {"seed": seed, "indices": indices, "labels": self._labels(labels, indices)}
        names = "sampler steps spacing eta order clip rederive_eps dynamic_threshold".split()
        values = (sampler, steps, spacing, eta, order, clip, rederive_eps, dynamic_threshold)
        changes = tuple(zip(names, values))
        generator = self._generator(even_batch(batch_size, n), changes, guidance, progress=progress)
        return to_uint8(generator.draw(self._trained.params, **inputs))

    def encode(
        self,
        images: np.ndarray,
        steps: int | None = None,
        labels: Labels = None,
        batch_size: int = 64,
    ) -> np.ndarray:
        """Encode images into the noise from which DDIM makes them (Song et al. 2021, section 4.3).

        Args:
          images: uint8 [n,h,w,c].
          steps: of the chain; the config's by default, 0 is all T.
          labels: as for `sample`.

        Returns:
          float32 [n,h,w,c], the codes x_T.
        """
        return self._ddim(from_uint8(self._images(images)), steps, labels, batch_size, True)

    def decode(
        self,
        codes: np.ndarray,
        steps: int | None = None,
        labels: Labels = None,
        batch_size: int = 64,
    ) -> np.ndarray:
        """Decode what `encode` returned, or a mix of several: DDIM with eta = 0 from x_T.

        Args:
          codes: float32 [n,h,w,c].
          steps, labels: those of `encode`.

        Returns:
          uint8 [n,h,w,c].
        """
        codes = np.asarray(codes, np.float32)
        self._check_shape("codes", codes)
        return to_uint8(self._ddim(codes, steps, labels, batch_size, False))

    def bits_per_dim(
        self,
        images: np.ndarray,
        num_timesteps: int = 0,
        seed: int = 0,
        labels: Labels = None,
        batch_size: int = 128,
    ) -> float:
        """Measure the variational bound on images, as `ddpm evaluate --metrics=nll` does.

            L = L_T + sum_t L_t + L_0, in bits a dimension (eq. 5 of the paper)

        Args:
          images: uint8 [n,h,w,c].
          num_timesteps: terms an image; 0 is all T, otherwise an unbiased estimate.
          seed: of noise and timesteps.
          labels: as for `sample`.

        Returns:
          The mean over the images.
        """
        images = self._images(images)
        classes = self._labels(labels, np.arange(len(images)))
        source = ArraySource(images, None if classes is None else classes.astype(np.int32))
        nll = evaluate_nll(
            self.config,
            self._trained.params,
            source,
            self._devices,
            protocol=Protocol(num_timesteps=num_timesteps, seed=seed),
            batch_size=batch_size,
            network=self._network,
        )
        return nll.total.mean

    def _build_generator(
        self,
        batch_size: int,
        changes: tuple[tuple[str, object], ...],
        guidance: float = 1.0,
        **options: bool,
    ) -> Generator:
        configure = codes_config if "inverted" in options else with_sampling
        config = configure(self.config, **dict(changes))
        how = {"batch_size": batch_size, "guidance": guidance, **options}
        return build_generator(config, self._devices, network=self._network, **how)

    def _ddim(
        self, x: np.ndarray, steps: int | None, labels: Labels, batch_size: int, inverted: bool
    ) -> np.ndarray:
        even, changes = even_batch(batch_size, len(x)), (("steps", steps),)
        generator = self._generator(even, changes, inverted=inverted)
        numbers = np.arange(len(x))
        inputs = {"seed": 0, "indices": numbers, "labels": self._labels(labels, numbers)}
        return generator.draw(self._trained.params, x=x, **inputs)

    def _images(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        self._check_shape("images", images)
        check(images.dtype == np.uint8, f"images: {images.dtype}, must be uint8")
        return images

    def _check_shape(self, name: str, array: np.ndarray) -> None:
        shape = image_shape(self.config)
        what = f"n,{','.join(map(str, shape))}"
        fits = array.ndim == 4 and array.shape[1:] == shape and len(array) > 0
        check(fits, f"{name}: of shape {list(array.shape)}, must be [{what}]")

    def _labels(self, labels: Labels, indices: np.ndarray) -> np.ndarray | None:
        """Return the classes of images with numbers `indices`, the given ones in turn."""
        classes = self.config.model.num_classes
        if labels is None:
            optional = not classes or self.config.model.label_dropout
            check(bool(optional), f"labels: this network has {classes} classes and needs one each")
            return None
        given = classes_of(labels, self.classes, classes)
        return given[indices % len(given)]
