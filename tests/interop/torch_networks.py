"""The networks of the other code bases, from the description of their checkpoints: PyTorch functions of (variables, x, t).

Variables make themselves up when first used, at random, under the name and in the shape that the code base gives them: so a run
of the function is at once the checkpoint and the reference. Nothing here is shared with ddpm_jax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

STEMS = ("conv_in", "head", "in_conv", "input_blocks.0.0")


@dataclass
class Spec:
    ch: int = 64
    mult: tuple[int, ...] = (1, 1)
    blocks: int = 2
    attention: tuple[int, ...] = (0, 1)  # levels
    channels: int = 3
    out: int = 3
    heads: int = 1
    head_channels: int = 0
    new_order: bool = False
    scale_shift: bool = False
    updown: bool = False
    classes: int = 0
    timesteps: int = 1000
    rescale: bool = False


class Variables(dict):
    """A checkpoint in the making. The first convolution is faint, so that the epsilon of the norm behind it can be seen."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, *shape: int, fan_in: int = 0, mean: float = 0.0) -> torch.Tensor:
        if name not in self:
            scale = (fan_in**-0.5 if fan_in else 0.2) * (
                0.003 if any(stem in name for stem in STEMS) else 1
            )
            self[name] = mean + scale * torch.randn(shape, generator=self.random)
        assert self[name].shape == shape, (name, shape)
        return self[name]


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


# ---------------------------------------------------------------------------------------------- layers, PyTorch's way


def conv(v, name, x, out, size=3, stride=1, padding=None):
    weight = v(f"{name}.weight", out, x.shape[1], size, size, fan_in=x.shape[1] * size**2)
    return F.conv2d(
        x, weight, v(f"{name}.bias", out), stride, size // 2 if padding is None else padding
    )


def linear(v, name, x, out):
    return F.linear(
        x, v(f"{name}.weight", out, x.shape[-1], fan_in=x.shape[-1]), v(f"{name}.bias", out)
    )


def norm(v, name, x, eps):
    return F.group_norm(
        x, 32, v(f"{name}.weight", x.shape[1], mean=1), v(f"{name}.bias", x.shape[1]), eps
    )


def conv1d(v, name, x, out):
    return F.conv1d(
        x, v(f"{name}.weight", out, x.shape[1], 1, fan_in=x.shape[1]), v(f"{name}.bias", out)
    )


def stacked_residual(v, prefix, x, emb, out, eps, names):
    norm1, conv1, projection, norm2, conv2, shortcut = names
    h = conv(v, prefix + conv1, swish(norm(v, prefix + norm1, x, eps)), out)
    h = h + linear(v, prefix + projection, swish(emb), out)[:, :, None, None]
    h = conv(v, prefix + conv2, swish(norm(v, prefix + norm2, h, eps)), out)
    return h + (conv(v, prefix + shortcut, x, out, size=1) if x.shape[1] != out else x)


def one_head(q, k, v):
    """Attention over the positions of [b, c, h, w] maps."""
    b, c, h, w = q.shape
    q, k, v = (part.reshape(b, c, h * w) for part in (q, k, v))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(c), dim=-1)
    return torch.einsum("bij,bcj->bci", weights, v).reshape(b, c, h, w)


def separate_attention(v, prefix, x, eps, names):
    first, q, k, value, last = names
    h, c = norm(v, prefix + first, x, eps), x.shape[1]
    parts = [conv(v, prefix + name, h, c, size=1) for name in (q, k, value)]
    return x + conv(v, prefix + last, one_head(*parts), c, size=1)


def sin_cos(t, width):
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - 1))
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def enlarge(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


# ---------------------------------------------------------------------------------------------- the networks


def pesser(v: Variables, x, t, s: Spec):
    names = ("norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut")
    attention = ("norm", "q", "k", "v", "proj_out")
    emb = linear(
        v, "temb.dense.1", swish(linear(v, "temb.dense.0", sin_cos(t, s.ch), 4 * s.ch)), 4 * s.ch
    )
    stack = [conv(v, "conv_in", x, s.ch)]
    last = len(s.mult) - 1
    for i, mult in enumerate(s.mult):
        for j in range(s.blocks):
            h = stacked_residual(
                v, f"down.{i}.block.{j}.", stack[-1], emb, s.ch * mult, 1e-6, names
            )
            if i in s.attention:
                h = separate_attention(v, f"down.{i}.attn.{j}.", h, 1e-6, attention)
            stack.append(h)
        if i < last:
            padded = F.pad(stack[-1], (0, 1, 0, 1))
            stack.append(
                conv(v, f"down.{i}.downsample.conv", padded, s.ch * mult, stride=2, padding=0)
            )
    h = stack[-1]
    h = stacked_residual(v, "mid.block_1.", h, emb, h.shape[1], 1e-6, names)
    h = separate_attention(v, "mid.attn_1.", h, 1e-6, attention)
    h = stacked_residual(v, "mid.block_2.", h, emb, h.shape[1], 1e-6, names)
    for i in range(last, -1, -1):
        for j in range(s.blocks + 1):
            both = torch.cat([h, stack.pop()], dim=1)
            h = stacked_residual(v, f"up.{i}.block.{j}.", both, emb, s.ch * s.mult[i], 1e-6, names)
            if i in s.attention:
                h = separate_attention(v, f"up.{i}.attn.{j}.", h, 1e-6, attention)
        if i:
            h = conv(v, f"up.{i}.upsample.conv", enlarge(h), h.shape[1])
    return conv(v, "conv_out", swish(norm(v, "norm_out", h, 1e-6)), s.out)


def w86763777(v: Variables, x, t, s: Spec):
    names = ("block1.0", "block1.2", "temb_proj.1", "block2.0", "block2.3", "shortcut")
    attention = ("group_norm", "proj_q", "proj_k", "proj_v", "proj")
    rates = torch.exp(-math.log(10000) * torch.arange(0, s.ch, 2) / s.ch)
    angles = torch.arange(s.timesteps)[:, None] * rates[None]
    table = torch.empty(s.timesteps, s.ch)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    v["time_embedding.timembedding.0.weight"] = table
    emb = linear(v, "time_embedding.timembedding.1", table[t], 4 * s.ch)
    emb = linear(v, "time_embedding.timembedding.3", swish(emb), 4 * s.ch)

    def block(prefix, h, width, attend):
        h = stacked_residual(v, prefix, h, emb, width, 1e-5, names)
        return separate_attention(v, f"{prefix}attn.", h, 1e-5, attention) if attend else h

    stack, item = [conv(v, "head", x, s.ch)], 0
    for i, mult in enumerate(s.mult):
        for _ in range(s.blocks):
            stack.append(block(f"downblocks.{item}.", stack[-1], s.ch * mult, i in s.attention))
            item += 1
        if i + 1 < len(s.mult):
            stack.append(
                conv(v, f"downblocks.{item}.main", stack[-1], s.ch * mult, stride=2, padding=1)
            )
            item += 1
    h = block("middleblocks.0.", stack[-1], stack[-1].shape[1], True)
    h = block("middleblocks.1.", h, h.shape[1], False)
    item = 0
    for i in reversed(range(len(s.mult))):
        for _ in range(s.blocks + 1):
            h = block(
                f"upblocks.{item}.",
                torch.cat([h, stack.pop()], dim=1),
                s.ch * s.mult[i],
                i in s.attention,
            )
            item += 1
        if i > 0:
            h = conv(v, f"upblocks.{item}.main", enlarge(h), h.shape[1])
            item += 1
    return conv(v, "tail.2", swish(norm(v, "tail.0", h, 1e-5)), s.out)


def tqch(v: Variables, x, t, s: Spec):
    names = ("norm1", "conv1", "fc", "norm2", "conv2", "skip")
    emb = linear(v, "embed.2", swish(linear(v, "embed.0", sin_cos(t, s.ch), 4 * s.ch)), 4 * s.ch)

    def attend(prefix, h):
        q, k, value = conv(
            v, f"{prefix}.project_in", norm(v, f"{prefix}.norm", h, 1e-6), 3 * h.shape[1], size=1
        ).chunk(3, 1)
        return h + conv(v, f"{prefix}.project_out", one_head(q, k, value), h.shape[1], size=1)

    def block(prefix, h, width, level):
        if level not in s.attention:
            return stacked_residual(v, f"{prefix}.", h, emb, width, 1e-6, names)
        return attend(
            f"{prefix}.1", stacked_residual(v, f"{prefix}.0.", h, emb, width, 1e-6, names)
        )

    stack = [conv(v, "in_conv", x, s.ch)]
    for i, mult in enumerate(s.mult):
        level = f"downsamples.level_{i}"
        for j in range(s.blocks):
            stack.append(block(f"{level}.{j}", stack[-1], s.ch * mult, i))
        if i != len(s.mult) - 1:
            h = F.pad(stack[-1], (0, 1, 0, 1))
            stack.append(conv(v, f"{level}.{s.blocks}.1", h, s.ch * mult, stride=2, padding=0))
    width = stack[-1].shape[1]
    h = stacked_residual(v, "middle.0.", stack[-1], emb, width, 1e-6, names)
    h = stacked_residual(v, "middle.2.", attend("middle.1", h), emb, width, 1e-6, names)
    for i in reversed(range(len(s.mult))):
        level = f"upsamples.level_{i}"
        for j in range(s.blocks + 1):
            h = block(f"{level}.{j}", torch.cat([h, stack.pop()], dim=1), s.ch * s.mult[i], i)
        if i != 0:
            h = conv(v, f"{level}.{s.blocks + 1}.1", enlarge(h), h.shape[1])
    return conv(v, "out_conv.2", swish(norm(v, "out_conv.0", h, 1e-6)), s.out)


def openai(v: Variables, x, t, s: Spec, labels=None):
    half = s.ch // 2
    angles = t.float() * (1000.0 / s.timesteps if s.rescale else 1.0)
    angles = (
        angles[:, None]
        * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)[None]
    )
    emb = torch.cat([angles.cos(), angles.sin()], dim=1)
    emb = linear(v, "time_embed.2", F.silu(linear(v, "time_embed.0", emb, 4 * s.ch)), 4 * s.ch)
    if s.classes:
        emb = emb + v("label_emb.weight", s.classes, 4 * s.ch)[labels]

    def res(prefix, h, width, resize=None):
        skip, h = h, F.silu(norm(v, f"{prefix}.in_layers.0", h, 1e-5))
        if resize:
            skip, h = resize(skip), resize(h)
        h = conv(v, f"{prefix}.in_layers.2", h, width)
        signal = linear(
            v, f"{prefix}.emb_layers.1", F.silu(emb), width * (2 if s.scale_shift else 1)
        )[:, :, None, None]
        if s.scale_shift:
            scale, shift = signal.chunk(2, dim=1)
            h = norm(v, f"{prefix}.out_layers.0", h, 1e-5) * (1 + scale) + shift
        else:
            h = norm(v, f"{prefix}.out_layers.0", h + signal, 1e-5)
        h = conv(v, f"{prefix}.out_layers.3", F.silu(h), width)
        if skip.shape[1] != width:
            skip = conv(v, f"{prefix}.skip_connection", skip, width, size=1)
        return h + skip

    def attend(prefix, x):
        b, c, *space = x.shape
        heads = c // s.head_channels if s.head_channels else s.heads
        flat = x.reshape(b, c, -1)
        qkv = conv1d(v, f"{prefix}.qkv", norm(v, f"{prefix}.norm", flat, 1e-5), 3 * c)
        outputs = []
        for head in range(heads):
            d = c // heads
            if s.new_order:  # all q, all k, all v
                q, k, value = (
                    qkv[:, part * c + head * d : part * c + (head + 1) * d] for part in range(3)
                )
            else:  # head by head
                q, k, value = (
                    qkv[:, (3 * head + part) * d : (3 * head + part + 1) * d] for part in range(3)
                )
            weights = torch.einsum("bci,bcj->bij", q * d**-0.25, k * d**-0.25).softmax(dim=-1)
            outputs.append(torch.einsum("bij,bcj->bci", weights, value))
        return x + conv1d(v, f"{prefix}.proj_out", torch.cat(outputs, dim=1), c).reshape(
            b, c, *space
        )

    stack, item, last = [conv(v, "input_blocks.0.0", x, s.ch * s.mult[0])], 1, len(s.mult) - 1
    for i, mult in enumerate(s.mult):
        for _ in range(s.blocks):
            h = res(f"input_blocks.{item}.0", stack[-1], s.ch * mult)
            stack.append(attend(f"input_blocks.{item}.1", h) if i in s.attention else h)
            item += 1
        if i < last:
            h, width = stack[-1], s.ch * mult
            if s.updown:
                h = res(f"input_blocks.{item}.0", h, width, lambda h: F.avg_pool2d(h, 2))
            else:
                h = conv(v, f"input_blocks.{item}.0.op", h, width, stride=2, padding=1)
            stack.append(h)
            item += 1
    width = stack[-1].shape[1]
    h = res("middle_block.0", stack[-1], width)
    h = res("middle_block.2", attend("middle_block.1", h), width)
    item = 0
    for i in range(last, -1, -1):
        for j in range(s.blocks + 1):
            h = res(f"output_blocks.{item}.0", torch.cat([h, stack.pop()], dim=1), s.ch * s.mult[i])
            place = 1
            if i in s.attention:
                h, place = attend(f"output_blocks.{item}.1", h), 2
            if i and j == s.blocks:
                if s.updown:
                    h = res(f"output_blocks.{item}.{place}", h, h.shape[1], enlarge)
                else:
                    h = conv(v, f"output_blocks.{item}.{place}.conv", enlarge(h), h.shape[1])
            item += 1
    return conv(v, "out.2", F.silu(norm(v, "out.0", h, 1e-5)), s.out)


# ---------------------------------------------------------------------------------------------- TensorFlow's way


def ho(v: Variables, x, t, s: Spec):
    """NHWC and the padding rule of TensorFlow's SAME; x comes and goes as the others', NCHW."""

    def affine(name, x, out):
        return x @ v(f"{name}/W", x.shape[-1], out, fan_in=x.shape[-1]) + v(f"{name}/b", out)

    def conv2d(name, x, out, stride=1):
        kernel = v(f"{name}/W", 3, 3, x.shape[-1], out, fan_in=9 * x.shape[-1])
        pads = []
        for size in (x.shape[2], x.shape[1]):
            total = max((math.ceil(size / stride) - 1) * stride + 3 - size, 0)
            pads += [total // 2, total - total // 2]
        y = F.conv2d(F.pad(x.permute(0, 3, 1, 2), pads), kernel.permute(3, 2, 0, 1), stride=stride)
        return y.permute(0, 2, 3, 1) + v(f"{name}/b", out)

    def normalize(name, x):
        c = x.shape[-1]
        groups = x.reshape(x.shape[0], -1, 32, c // 32)
        mean, var = (
            groups.mean((1, 3), keepdim=True),
            groups.var((1, 3), unbiased=False, keepdim=True),
        )
        return ((groups - mean) / torch.sqrt(var + 1e-6)).reshape(x.shape) * v(
            f"{name}/gamma", c, mean=1
        ) + v(f"{name}/beta", c)

    def res(name, x, out):
        h = conv2d(f"{name}/conv1", swish(normalize(f"{name}/norm1", x)), out)
        h = h + affine(f"{name}/temb_proj", swish(temb), out)[:, None, None, :]
        h = conv2d(f"{name}/conv2", swish(normalize(f"{name}/norm2", h)), out)
        return h + (affine(f"{name}/nin_shortcut", x, out) if x.shape[-1] != out else x)

    def attend(name, x):
        h, c = normalize(f"{name}/norm", x), x.shape[-1]
        q, k, value = (affine(f"{name}/{part}", h, c) for part in ("q", "k", "v"))
        logits = torch.einsum("bhwc,bHWc->bhwHW", q, k) * c**-0.5
        weights = torch.softmax(logits.reshape(*logits.shape[:3], -1), dim=-1).reshape(logits.shape)
        return x + affine(f"{name}/proj_out", torch.einsum("bhwHW,bHWc->bhwc", weights, value), c)

    temb = affine(
        "model/temb/dense1",
        swish(affine("model/temb/dense0", sin_cos(t, s.ch), 4 * s.ch)),
        4 * s.ch,
    )
    stack = [conv2d("model/conv_in", x.permute(0, 2, 3, 1), s.ch)]
    for level, mult in enumerate(s.mult):
        for block in range(s.blocks):
            h = res(f"model/down_{level}/block_{block}", stack[-1], s.ch * mult)
            stack.append(
                attend(f"model/down_{level}/attn_{block}", h) if level in s.attention else h
            )
        if level != len(s.mult) - 1:
            stack.append(
                conv2d(f"model/down_{level}/downsample/conv", stack[-1], s.ch * mult, stride=2)
            )
    width = stack[-1].shape[-1]
    h = res(
        "model/mid/block_2",
        attend("model/mid/attn_1", res("model/mid/block_1", stack[-1], width)),
        width,
    )
    for level in reversed(range(len(s.mult))):
        for block in range(s.blocks + 1):
            h = res(
                f"model/up_{level}/block_{block}",
                torch.cat([h, stack.pop()], dim=-1),
                s.ch * s.mult[level],
            )
            h = attend(f"model/up_{level}/attn_{block}", h) if level in s.attention else h
        if level:
            h = conv2d(
                f"model/up_{level}/upsample/conv",
                h.repeat_interleave(2, 1).repeat_interleave(2, 2),
                h.shape[-1],
            )
    return conv2d("model/conv_out", swish(normalize("model/norm_out", h)), s.out).permute(
        0, 3, 1, 2
    )
