"""The network again, from the paper's description: NumPy, float64, loops, no code shared with ddpm_jax.

Slow and plain on purpose: a convolution is a sum over taps, attention a loop over heads, a sinusoid a `math.sin`.
"""

from __future__ import annotations

import math

import numpy as np


def unet(
    params: dict, x: np.ndarray, t: np.ndarray, config, labels=None, skip_first: bool = False
) -> np.ndarray:
    """x [b, h, w, c], t [b] -> [b, h, w, out]; skip_first has up blocks see [skip, h], a known mistake."""
    p = params
    n, blocks = len(config.channel_mult), config.blocks_per_level

    temb = np.array([sinusoids(float(time) * config.timestep_scale, config) for time in t])
    temb = linear(swish(linear(temb, p["time_embedding_0"])), p["time_embedding_1"])
    if labels is not None:
        for row, label in enumerate(labels):
            if label < config.num_classes:
                temb[row] += p["label_embedding"][label]

    def attend(h, name):
        return attention(h, p[name], config)

    h = conv(x.astype(np.float64), p["conv_in"])
    stack = [h]
    for level in range(n):
        for j in range(blocks):
            h = residual(h, temb, p[f"down_{level}_block_{j}"], config)
            if h.shape[1] in config.attention_resolutions:
                h = attend(h, f"down_{level}_attn_{j}")
            stack.append(h)
        if level != n - 1:
            weights = p.get(f"down_{level}_downsample")
            if config.resampling == "residual":
                h = residual(h, temb, weights, config, resize=shrink)
            elif config.resampling == "pool":
                h = shrink(h)
            else:
                h = conv(
                    h, weights, stride=2, before=1 if config.down_padding == "symmetric" else 0
                )
            stack.append(h)

    h = residual(h, temb, p["mid_block_1"], config)
    if config.attention_in_mid:
        h = attend(h, "mid_attn")
    h = residual(h, temb, p["mid_block_2"], config)

    for level in range(n - 1, -1, -1):
        for j in range(blocks + 1):
            pair = [stack.pop(), h] if skip_first else [h, stack.pop()]
            h = residual(np.concatenate(pair, axis=3), temb, p[f"up_{level}_block_{j}"], config)
            if h.shape[1] in config.attention_resolutions:
                if config.attention_placement == "block" or j == blocks:
                    h = attend(h, f"up_{level}_attn_{j}")
        if level != 0:
            weights = p.get(f"up_{level}_upsample")
            if config.resampling == "residual":
                h = residual(h, temb, weights, config, resize=enlarge)
            else:
                h = enlarge(h)
                if config.resampling == "conv":
                    h = conv(h, weights)
    assert stack == []
    return conv(swish(normalise(h, p["norm_out"], config)), p["conv_out"])


def residual(x, temb, p, config, resize=None):
    h = swish(normalise(x, p["norm1"], config))
    if resize:
        h, x = resize(h), resize(x)
    h = conv(h, p["conv1"])
    signal = linear(swish(temb), p["temb_proj"])
    width = h.shape[3]
    for row in range(len(h)):
        if config.conditioning == "add":
            h[row] += signal[row]
    h = normalise(h, p["norm2"], config)
    for row in range(len(h)):
        if config.conditioning == "scale_shift":
            h[row] = h[row] * (1.0 + signal[row, :width]) + signal[row, width:]
    h = conv(swish(h), p["conv2"])
    if "shortcut" in p:
        x = linear(x, p["shortcut"])
    return (x + h) * config.skip_scale


def attention(x, p, config):
    b, height, width, c = x.shape
    n_heads = c // config.head_channels if config.head_channels > 0 else config.heads
    d = c // n_heads
    h = normalise(x, p["norm"], config).reshape(b, height * width, c)
    if config.qkv_layout == "separate":
        triple = [linear(h, p[name]) for name in ("q", "k", "v")]
        pick = lambda which, head: triple[which][:, :, head * d : (head + 1) * d]  # noqa: E731
    else:
        everything = linear(h, p["qkv"])

        def pick(which, head):
            position = (
                head * 3 + which if config.qkv_layout == "fused_by_head" else which * n_heads + head
            )
            return everything[:, :, position * d : (position + 1) * d]

    out = np.zeros_like(h)
    for row in range(b):
        for head in range(n_heads):
            q, k, v = (pick(which, head)[row] for which in range(3))
            for i in range(height * width):
                scores = np.array([q[i] @ key for key in k]) / math.sqrt(d)
                weights = np.exp(scores - scores.max())
                out[row, i, head * d : (head + 1) * d] = weights @ v / weights.sum()
    return (x + linear(out, p["proj_out"]).reshape(x.shape)) * config.skip_scale


def sinusoids(time, config):
    half = config.base_channels // 2
    last = half - 1 if config.embedding_denominator == "half_minus_one" else half
    angles = [time * math.exp(-math.log(10000.0) * i / last) for i in range(half)]
    sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
    if config.embedding_order == "sin_cos":
        values = sines + cosines
    elif config.embedding_order == "cos_sin":
        values = cosines + sines
    else:
        values = [value for pair in zip(sines, cosines) for value in pair]
    return values + [0.0] * (config.base_channels - len(values))


def conv(x, p, stride=1, before=1):
    """3x3, with `before` rows and columns of zeros above and to the left, 1 below and to the right."""
    b, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    out = np.zeros((b, height // stride, width // stride, p["kernel"].shape[3])) + p["bias"]
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            for i in range(3):
                for j in range(3):
                    out[:, row, column] += (
                        padded[:, row * stride + i, column * stride + j] @ p["kernel"][i, j]
                    )
    return out


def normalise(x, p, config):
    out = np.empty_like(x)
    size = x.shape[3] // config.group_norm_groups
    for row in range(len(x)):
        for first in range(0, x.shape[3], size):
            group = x[row, :, :, first : first + size]
            deviation = np.sqrt(group.var() + config.group_norm_epsilon)
            out[row, :, :, first : first + size] = (group - group.mean()) / deviation
    return out * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def swish(x):
    return x / (1.0 + np.exp(-x))


def shrink(x):
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4.0


def enlarge(x):
    return np.kron(x, np.ones((1, 2, 2, 1)))
