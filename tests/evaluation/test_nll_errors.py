"""The standard errors of the likelihood, from the single terms of each image."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.build import build_process, denoiser, init_params
from ddpm_jax.data.source import ArraySource
from ddpm_jax.diffusion.bound import bound_terms, prior_term
from ddpm_jax.evaluation.nll import Protocol, evaluate_nll
from ddpm_jax.evaluation.rate_distortion import save_csv
from ddpm_jax.network.adapt import Network
from ddpm_jax.parallel.devices import Devices
from tests.support.tiny import images, tiny_config

LIKELIHOOD = 9  # number of the stream


def test_one_image_leaves_the_errors_of_terms_unknown(tmp_path: Path) -> None:
    """In the CSV as in the table; the terms themselves are known."""
    config, one = tiny_config(), Devices(jax.devices()[:1])
    network = Network(lambda key: {}, lambda params, x, *_: x / 2, lambda params: params)
    source, protocol = ArraySource(images(config, 1)), Protocol(num_timesteps=3)
    nll = evaluate_nll(config, {}, source, one, protocol=protocol, network=network)
    assert np.isnan(nll.total.standard_error) and np.isnan(nll.term_error).all()
    save_csv(tmp_path / "nll.csv", nll)
    rows = np.genfromtxt(tmp_path / "nll.csv", delimiter=",", names=True)
    assert len(rows) == 3 and np.isnan(rows["term_standard_error"]).all()
    assert np.isfinite(rows["term"]).all()


def test_errors_are_deviations_over_images_by_the_root_of_their_number() -> None:
    """Seven images, five strata, in two batches of which the second is filled up."""
    config = tiny_config(model={"attention_in_mid": False})
    pixels = images(config, 7)
    pixels[3:] //= 3  # the images differ
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: np.float32(p + 0.1 * rng.standard_normal(p.shape)), init_params(config)
    )
    one = Devices(jax.devices()[:1])
    nll = evaluate_nll(
        config,
        one.replicate(params),
        ArraySource(pixels),
        one,
        protocol=Protocol(num_timesteps=5, seed=3),
        batch_size=4,
    )
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), LIKELIHOOD), 0)
    keys = jnp.stack([jax.random.fold_in(key, image) for image in range(7)])
    x0, process = jnp.asarray(pixels / 127.5 - 1, jnp.float32), build_process(config)
    strata = [jnp.asarray(part) for part in (nll.strata.first, nll.strata.size)]
    assert nll.strata.size.sum() == 20 and nll.strata.size[0] == 1
    columns = jax.jit(
        lambda params: bound_terms(
            process, denoiser(config)(params, None), x0, keys, *strata, clip=True, cdf="tanh"
        )
    )(params)
    term = np.asarray(columns["term"], np.float64)
    prior = np.asarray(prior_term(process.schedule, x0), np.float64)
    sums = term * nll.strata.size
    parts = {"prior": prior, "decoder": sums[:, 0], "middle": sums[:, 1:].sum(axis=1)}
    parts["total"] = sum(parts.values())
    for name, values in parts.items():
        part = getattr(nll, name)
        deviation = np.sqrt(np.sum((values - values.mean()) ** 2) / 6)
        np.testing.assert_allclose(part.mean, values.mean(), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(
            part.standard_error, deviation / np.sqrt(7), rtol=1e-3, err_msg=name
        )
    np.testing.assert_allclose(nll.term, term.mean(axis=0), rtol=1e-5)
    deviations = np.sqrt(np.sum((term - term.mean(axis=0)) ** 2, axis=0) / 6)
    np.testing.assert_allclose(nll.term_error, deviations / np.sqrt(7), rtol=1e-3)
    error = np.asarray(columns["squared_error"], np.float64).mean(axis=0)
    np.testing.assert_allclose(nll.curve.rmse[::-1], 127.5 * np.sqrt(error), rtol=1e-5)
    # The timesteps above t have been paid for: those of the strata above, and of its own a share.
    share = term * (np.asarray(columns["t"]) - nll.strata.first)
    above = np.append(np.cumsum(sums[:, :0:-1], axis=1)[:, ::-1], np.zeros((7, 1)), axis=1)
    rate = (prior[:, None] + above + share).mean(axis=0)
    np.testing.assert_allclose(nll.curve.rate[::-1], rate, rtol=1e-5)
    assert share.max() > 0
