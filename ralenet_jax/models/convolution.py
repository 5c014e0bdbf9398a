"""Convolutions along the samples and their transpose, as PyTorch defines them.

Features are `[C, B, L]`. A convolution is one product over taps and channels: with so few channels that beats the
convolution of the library. It is computed in the dtype of its input.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ralenet_jax.models.initializers import parameter, uniform
from ralenet_jax.models.product import product


def _convolve(x, kernel, bias, stride=1):
    """`[C, B, L]` and a kernel `[width, C, features]` → `[features, B, (L − width)//stride + 1]`."""
    width, channels, features = kernel.shape
    last = (x.shape[2] - width) // stride * stride
    taps = jnp.concatenate([jax.lax.slice_in_dim(x, i, i + last + 1, stride, axis=2) for i in range(width)])
    y = product(kernel.reshape(width * channels, features), taps.reshape(width * channels, -1))
    return y.reshape(features, *taps.shape[1:]) + bias.astype(x.dtype)[:, None, None]


class Conv(nn.Module):
    """Convolution with `padding` zeros beyond both edges."""

    features: int
    width: int
    stride: int = 1
    padding: int = 0

    @nn.compact
    def __call__(self, x):
        """`[C, B, L]` → `[features, B, (L + 2·padding − width)//stride + 1]`."""
        fan_in = self.width * x.shape[0]
        kernel = parameter(self, "kernel", uniform(fan_in), (self.width, x.shape[0], self.features))
        bias = parameter(self, "bias", uniform(fan_in), (self.features,))
        padded = jnp.pad(x, [(0, 0), (0, 0), (self.padding, self.padding)])
        return _convolve(padded, kernel, bias, self.stride)


class ConvTranspose(nn.Module):
    """Transposed convolution, whose output has `padding` samples cut from both ends.

    The kernel `[width, C, features]` is that of a convolution of the input with `stride − 1` zeros between its samples:
    PyTorch's, flipped along the width. `padding + stride` may not exceed `width`.
    """

    features: int
    width: int
    stride: int = 1
    padding: int = 0

    @nn.compact
    def __call__(self, x):
        """`[C, B, L]` → `[features, B, (L − 1)·stride + width − 2·padding]`."""
        fan_in = self.width * self.features  # as PyTorch counts it
        kernel = parameter(self, "kernel", uniform(fan_in), (self.width, x.shape[0], self.features))
        bias = parameter(self, "bias", uniform(fan_in), (self.features,))
        # Zeros after every sample, then at the edges: jax2onnx cannot convert the one `jax.lax.pad` that does both.
        spread = jnp.pad(x[..., None], [(0, 0), (0, 0), (0, 0), (0, self.stride - 1)])
        spread = spread.reshape(*x.shape[:2], x.shape[2] * self.stride)
        edge = self.width - 1 - self.padding
        padded = jnp.pad(spread, [(0, 0), (0, 0), (edge, edge - self.stride + 1)])
        return _convolve(padded, kernel, bias)
