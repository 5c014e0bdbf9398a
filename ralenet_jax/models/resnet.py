"""The downstream beat classifier: a residual network over windows, normal against ventricular.

Windows are `[B, L, C]` outside; features are `[C, B, L]` inside. The residual block is that of He et al. (2016,
doi:10.1109/CVPR.2016.90), in one dimension.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ralenet_jax.errors import UserError
from ralenet_jax.models.batch_norm import BatchNorm
from ralenet_jax.models.initializers import parameter, uniform

WIDTH = 32  # channels of the first stage; they double from stage to stage
BLOCKS = (2, 3, 3, 3)  # of each stage
HIDDEN = 512
CLASSES = 2


class Conv(nn.Module):
    """Convolution along the samples, without bias, with half its width of zeros beyond both edges."""

    features: int
    width: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        """`[C, B, L]` → `[features, B, (L − 1)//stride + 1]`, width odd."""
        fan_in, half = self.width * x.shape[0], self.width // 2
        kernel = parameter(self, "kernel", uniform(fan_in), (self.width, x.shape[0], self.features))
        # One product over taps and channels: in a loop on CPU, XLA's own convolution takes ten times as long.
        padded, last = jnp.pad(x, [(0, 0), (0, 0), (half, half)]), x.shape[2] - 1
        last -= last % self.stride
        taps = [jax.lax.slice_in_dim(padded, i, i + last + 1, self.stride, axis=2) for i in range(self.width)]
        taps = jnp.concatenate(taps)
        y = kernel.reshape(fan_in, self.features).T @ taps.reshape(fan_in, -1)
        return y.reshape(self.features, *taps.shape[1:])


class Bottleneck(nn.Module):
    """Residual block that works at a quarter of the channels."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        """`[C, B, L]` → the same shape."""
        channels = x.shape[0]

        def normal(y, name):
            return BatchNorm(self.axis_name, channel_axis=0, name=name)(y, train)

        y = nn.relu(normal(Conv(channels // 4, name="reduce")(x), "reduce_norm"))
        y = nn.relu(normal(Conv(channels // 4, 3, name="conv")(y), "conv_norm"))
        y = normal(Conv(channels, name="expand")(y), "expand_norm")
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Classifies the beat in the middle of a window.

    Attributes:
        axis_name: pmapped axis over which BatchNorm takes its statistics, None for one device.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        """Logits of the classes.

        Args:
            x: `[B, L, leads]`, any L from 1 on.
            train: whether BatchNorm uses the statistics of the batch and updates the running ones.

        Returns:
            `[B, 2]`.

        Raises:
            UserError: for an x of another shape.
        """
        if x.ndim != 3 or not x.shape[1]:
            raise UserError(f"x has shape {x.shape}; expected [B, L, leads], windows of at least one sample")
        y = Conv(WIDTH, 7, stride=2, name="stem")(x.transpose(2, 0, 1))
        for stage, blocks in enumerate(BLOCKS):
            if stage:
                y = Conv(WIDTH * 2**stage, 3, stride=2, name=f"down{stage}")(y)
            for i in range(blocks):
                y = Bottleneck(self.axis_name, name=f"stage{stage}_{i}")(y, train)
        y = nn.relu(_dense(HIDDEN, y.mean(2).T, "hidden"))
        return _dense(CLASSES, y, "logits")


def _dense(features, x, name):
    init = uniform(x.shape[1])
    return nn.Dense(features, kernel_init=init, bias_init=init, name=name)(x)
