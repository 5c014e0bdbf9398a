"""PyTorch's layers from their definitions, in NumPy: `[B, C, L]`, weights as they stand in a state dict."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ralenet_jax import torch_weights
from ralenet_jax.models import build_model


def conv(x, weight, bias=0.0, stride=1, padding=0):
    """`[B, C, L]` and a weight `[out, in, width]` → `[B, out, (L + 2·padding − width)//stride + 1]`."""
    padded = np.pad(x, [(0, 0), (0, 0), (padding, padding)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2], axis=2)[:, :, ::stride]
    return np.einsum("bclw,ocw->bol", windows, weight) + np.reshape(bias, (-1, 1))


def conv_transpose(x, weight, bias, stride=1, padding=0):
    """Every sample adds the kernel, `stride` apart: weight `[in, out, width]` → `[B, out, …]`, cut by the padding."""
    width, length = weight.shape[2], x.shape[2]
    y = np.zeros((x.shape[0], weight.shape[1], (length - 1) * stride + width))
    for i in range(length):
        y[:, :, i * stride : i * stride + width] += np.einsum("bc,cow->bow", x[:, :, i], weight)
    return y[:, :, padding : y.shape[2] - padding] + bias[:, None]


def leaky_relu(x, slope=0.01):
    return np.where(x > 0, x, slope * x)


class Weights:
    """A state dict whose layers are called by their keys."""

    def __init__(self, state_dict):
        self.arrays = {key: np.asarray(array, np.float64) for key, array in state_dict.items()}

    def conv(self, key, x, stride=1, padding=0):
        return conv(x, self.arrays[f"{key}.weight"], self.arrays.get(f"{key}.bias", 0.0), stride, padding)

    def conv_transpose(self, key, x, stride=1, padding=0):
        return conv_transpose(x, self.arrays[f"{key}.weight"], self.arrays[f"{key}.bias"], stride, padding)

    def dense(self, key, x):
        """`[B, in]` → `[B, out]`."""
        return x @ self.arrays[f"{key}.weight"].T + self.arrays[f"{key}.bias"]

    def batch_norm(self, key, x):
        """With the running statistics; `[B, C]` or `[B, C, L]` → the same shape."""
        scale, bias, mean, var = (
            self.arrays[f"{key}.{name}"].reshape(-1, *[1] * (x.ndim - 2))
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def random_variables(name, leads=2):
    """Variables of a model that keep the size of what goes through, by shape."""
    shapes = jax.eval_shape(build_model(name).init, jax.random.key(0), jnp.zeros((1, 64, leads)))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("var", "scale"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        bound = (3 / max(math.prod(leaf.shape[:-1]), 12)) ** 0.5
        return random.uniform(-bound, bound, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def run_with_random_weights(name):
    """A published state dict with random weights, an input `[B, C, L]`, and our model's output for it."""
    variables = random_variables(name)
    x = np.random.default_rng(1).standard_normal((2, 64, 2)).astype(np.float32)
    y = np.asarray(jax.jit(build_model(name).apply)(variables, x))
    return torch_weights.to_state_dict(name, variables), x.transpose(0, 2, 1), y.transpose(0, 2, 1)
