"""U-Net of convolutions, a rival of RA-LENet: a strided convolution down and a transposed one up at every level.

Windows are `[B, L, C]` outside; features are `[C, B, L]` inside.
"""

import flax.linen as nn
import jax.numpy as jnp

from ralenet_jax.models.batch_norm import BatchNorm
from ralenet_jax.models.convolution import Conv, ConvTranspose
from ralenet_jax.models.inputs import DTYPES, check_windows

CHANNELS = (4, 8, 16, 32)  # of the encoder's levels


class UNet(nn.Module):
    """The denoised window from the noisy one.

    Attributes:
        axis_name: pmapped axis over which BatchNorm takes its statistics, None for one device.
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
            train: whether BatchNorm uses the statistics of the batch and updates the running ones.

        Returns:
            `[B, L, leads]`.

        Raises:
            UserError: for an x of another shape.
        """
        check_windows(x, 2 ** len(CHANNELS))

        def norm(name, y):
            return BatchNorm(self.axis_name, channel_axis=0, name=name)(y, train)

        y = x.transpose(2, 0, 1).astype(self.dtype)
        skips = []
        for level, channels in enumerate(CHANNELS):
            y = Conv(channels, 3, stride=2, padding=1, name=f"encoder{level}")(y)
            y = nn.leaky_relu(norm(f"encoder{level}_norm", y))
            skips.append(y)
        for i, width in enumerate((1, 3)):
            y = Conv(CHANNELS[-1], width, padding=width // 2, name=f"bottleneck{i}")(y)
            y = norm(f"bottleneck{i}_norm", nn.leaky_relu(y))
        y = Conv(CHANNELS[-1], 1, name="bottleneck2")(y) + skips.pop()
        for level, channels in reversed(list(enumerate((x.shape[2], *CHANNELS[:-1])))):
            y = ConvTranspose(channels, 4, stride=2, padding=1, name=f"decoder{level}")(y)
            y = norm(f"decoder{level}_norm", y)
            if level:
                y = nn.leaky_relu(y) + skips.pop()
        return y.transpose(1, 2, 0).astype(jnp.float32)
