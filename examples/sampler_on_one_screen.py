"""Sample digits by Algorithm 2 of the paper, written out: load, table, scan, picture.

    python examples/sampler_on_one_screen.py digits.png

`ddpm.reverse_chain` is this loop with clipping options, other samplers, parts of a chain, frames,
and a key for each sample, which has the same noise in every batch.
"""

import sys

import jax
import jax.numpy as jnp

import ddpm_jax as ddpm

ddpm.tune_cpu()  # before JAX runs anything
model = ddpm.load("digits")
process, schedule = model.process, model.process.schedule
table = ddpm.ancestral_table(process)  # float64, one row for each step
rows = {name: jnp.float32(getattr(table, name)) for name in ("x0", "x", "z")}
rows["t"] = jnp.asarray(table.timesteps)


def body(x_t, row):
    """x_{t-1} = mean of the posterior at x0_hat (eq. 7) + sigma_t z."""
    t = jnp.full(len(x_t), row["t"])
    eps = model.denoise(x_t, t)
    x0 = jnp.clip(ddpm.predict_x0(schedule, "eps", eps, x_t, t), -1, 1)  # eq. 15, clipped
    z = jax.random.normal(jax.random.fold_in(key, row["t"]), x_t.shape)
    return row["x0"] * x0 + row["x"] * x_t + row["z"] * z, None


key = jax.random.key(0)
x_T = jax.random.normal(key, (64, 8, 8, 1))
x_0, _ = jax.jit(lambda x: jax.lax.scan(body, x, rows))(x_T)
ddpm.save_png(sys.argv[1], ddpm.grid(jnp.uint8(jnp.round(127.5 * (x_0 + 1))), scale=8))
