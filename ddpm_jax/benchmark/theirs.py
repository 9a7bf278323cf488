"""Train diffusers' UNet2DModel in PyTorch by the recipe of a config, one step at a time.

PyTorch and diffusers are the extra torch, and imported where they are used.
"""

from __future__ import annotations

from typing import Any

import jax

from ddpm_jax.build import Params
from ddpm_jax.config import Config
from ddpm_jax.weights.layout import read_params, write_tensors
from ddpm_jax.weights.layouts.diffusers_config import layout_of, network_config, scheduler_config

Tensor = Any  # of PyTorch, which is imported where it is used


class DiffusersTraining:
    """A training of diffusers' network: gradient, clip, Adam with warm-up, and the first average.

    What a step is of comes from the caller. The step itself is PyTorch's and diffusers' alone, on a
    GPU where PyTorch sees one.

    Args:
      config: with the fields that `quality.COMPARABLE` names; dtype bfloat16 means autocast.
      network: a UNet2DModel of `network_config(config)`, which is trained in place.
    """

    def __init__(self, config: Config, network: Any) -> None:
        import torch
        from diffusers import DDPMScheduler

        self._config, self._updates = config, 0
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._network = network.train().to(self._device, memory_format=torch.channels_last)
        self._noising = DDPMScheduler.from_config(scheduler_config(config))
        recipe = config.optimizer
        self._adam = torch.optim.Adam(
            network.parameters(), recipe.learning_rate, (recipe.beta1, recipe.beta2), recipe.epsilon
        )
        self._warmup = torch.optim.lr_scheduler.LambdaLR(
            self._adam, lambda n: min(n / recipe.warmup_steps, 1) if recipe.warmup_steps else 1
        )
        self._average = {
            name: tensor.detach().clone() for name, tensor in network.state_dict().items()
        }

    def step(self, x0: Tensor, t: Tensor, eps: Tensor) -> float:
        """Take one step on images [b,c,h,w] in [-1, 1], timesteps [b] and noise; return the loss.

        The loss is that before the step.
        """
        import torch

        train, gradient_clip = self._config.train, self._config.optimizer.gradient_clip
        x0, t, eps = (tensor.to(self._device) for tensor in (x0, t, eps))
        x_t = self._noising.add_noise(x0, eps, t).contiguous(memory_format=torch.channels_last)
        half = self._config.model.dtype == "bfloat16"
        with torch.autocast(self._device, torch.bfloat16, enabled=half):
            predicted = self._network(x_t, t).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), eps)
        self._adam.zero_grad()
        loss.backward()
        if gradient_clip:
            torch.nn.utils.clip_grad_norm_(self._network.parameters(), gradient_clip)
        self._adam.step()
        self._warmup.step()
        n, decay = self._updates, train.ema_decays[0]
        decay = min(decay, (1 + n) / (10 + n)) if train.ema_warmup else decay
        with torch.no_grad():
            for name, tensor in self._network.state_dict().items():
                self._average[name].lerp_(tensor, 1 - decay)
        self._updates += 1
        return loss.item()

    def params(self) -> Params:
        """Return a copy of the parameters by our names."""
        return params_of(self._config, self._network.state_dict())

    def averaged(self) -> Params:
        """Return a copy of their average by our names."""
        return params_of(self._config, self._average)


def params_of(config: Config, tensors: dict[str, Tensor]) -> Params:
    """Return a copy of a state dict of diffusers' network, or of its gradients, by our names."""
    # The copy is made here: an array of NumPy's would change with the tensor that it came from.
    arrays = {
        name: tensor.detach().cpu().contiguous().numpy().copy() for name, tensor in tensors.items()
    }
    return read_params(layout_of(network_config(config)), config, arrays, "diffusers")


def network_from(config: Config, params: Params) -> Any:
    """Build diffusers' network of `config` with `params`, which are by our names."""
    import torch
    from diffusers import UNet2DModel

    settings = network_config(config)
    network = UNet2DModel.from_config(settings)
    tensors = write_tensors(layout_of(settings), config, jax.device_get(params))
    network.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
    return network


def initialise(network: Any) -> None:
    """Initialise diffusers' network as the paper does.

    Weights are uniform with the mean of both fans, which is Xavier's; those of the last layer of
    every branch are almost 0, and biases are 0.
    """
    import torch

    last = ("conv2.weight", "to_out.0.weight", "conv_out.weight")
    for name, weight in network.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.zeros_(weight)
        elif weight.ndim > 1:
            torch.nn.init.xavier_uniform_(weight, gain=1e-5 if name.endswith(last) else 1.0)
