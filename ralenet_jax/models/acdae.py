"""ACDAE, a rival of RA-LENet: a convolutional autoencoder with skip connections and efficient channel attention.

Windows are `[B, L, C]` outside; features are `[C, B, L]` inside.
"""

import flax.linen as nn
import jax.numpy as jnp

from ralenet_jax.models.convolution import Conv, ConvTranspose
from ralenet_jax.models.inputs import DTYPES, check_windows
from ralenet_jax.models.ralenet import EfficientChannelAttention

CHANNELS = (16, 32, 64, 128)  # of the encoder's levels
WIDTHS = (13, 7, 7, 7)  # of the convolutions between a level and the one above, both ways


def halve(x):
    """The larger of every two samples: `[C, B, L]` → `[C, B, L/2]`."""
    return x.reshape(*x.shape[:2], -1, 2).max(3)


def double(x):
    """Linear interpolation at a quarter sample before and after every sample: `[C, B, L]` → `[C, B, 2L]`."""
    # The first and last sample are their own neighbours; jax2onnx converts no padding with edges.
    before = jnp.concatenate([x[..., :1], x[..., :-1]], 2)
    after = jnp.concatenate([x[..., 1:], x[..., -1:]], 2)
    return jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], 3).reshape(*x.shape[:2], -1)


class ACDAE(nn.Module):
    """The denoised window from the noisy one.

    Attributes:
        axis_name: not used: nothing here is normalised over the batch.
        dtype: what products and activations are computed in, see `inputs.DTYPES`.
    """

    CHOICES = {"dtype": DTYPES}

    axis_name: str | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, r_peak=None, train=False, r_mask=None):
        """Denoises windows.

        Args:
            x: `[B, L, leads]`, L divisible by 16.
            r_peak, r_mask: ignored; this model has no use for the place of the R peaks.
            train: ignored; training and evaluation are the same.

        Returns:
            `[B, L, leads]`.

        Raises:
            UserError: for an x of another shape.
        """
        check_windows(x, 2 ** len(CHANNELS))
        y = x.transpose(2, 0, 1).astype(self.dtype)
        skips = []
        for level, (channels, width) in enumerate(zip(CHANNELS, WIDTHS, strict=True)):
            y = nn.leaky_relu(halve(Conv(channels, width, padding=width // 2, name=f"encoder{level}")(y)))
            skips.append(y)
        y = skips.pop()
        for level, channels in reversed(list(enumerate((x.shape[2], *CHANNELS[:-1])))):
            width = WIDTHS[level]
            y = ConvTranspose(channels, width, padding=width // 2, name=f"decoder{level}")(y)
            y = EfficientChannelAttention(name=f"decoder{level}_attention")(nn.leaky_relu(double(y)))
            if level:
                y += skips.pop()
        return y.transpose(1, 2, 0).astype(jnp.float32)
