"""Models whose work is easily told, for the tests of the denoiser."""

import flax.linen as nn
import jax.numpy as jnp


class Identity(nn.Module):
    def __call__(self, x, r_peak=None, r_mask=None):
        return x


class Zeros(nn.Module):
    def __call__(self, x, r_peak=None, r_mask=None):
        return jnp.zeros_like(x)
