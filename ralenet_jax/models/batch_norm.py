"""Batch normalisation as PyTorch computes it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ralenet_jax.errors import UserError
from ralenet_jax.models.initializers import parameter


class BatchNorm(nn.Module):
    """Normalises every channel over the global batch (Ioffe and Szegedy 2015), as `torch.nn.BatchNorm1d` does.

    Unlike `flax.linen.BatchNorm` the variance takes two passes (the mean first, then the squared deviations from it),
    `momentum` is the weight of the new statistics, and the running variance is the unbiased one. All is computed
    in float32, whatever the dtype of its input and output.

    Attributes:
        axis_name: pmapped axis over which the statistics are taken, None for one device.
        channel_axis: the axis of x that holds the channels.
        momentum: weight of a new batch in the running statistics.
        epsilon: added to the variance.
    """

    axis_name: str | None = None
    channel_axis: int = -1
    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, train=False):
        """Any shape → the same shape; with `train` the collection "batch_stats" has to be mutable.

        Raises:
            UserError: if `train` meets one value for each channel, over all devices.
        """
        x, dtype = x.astype(jnp.float32), x.dtype
        channel_axis = self.channel_axis % x.ndim
        axes = tuple(axis for axis in range(x.ndim) if axis != channel_axis)
        channels = (x.shape[channel_axis],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = parameter(self, "scale", nn.initializers.ones, channels)
        bias = parameter(self, "bias", nn.initializers.zeros, channels)

        def spread(statistic):
            return jnp.expand_dims(statistic, axes)

        if train:
            mean = self._mean_over_devices(x.mean(axes))
            var = self._mean_over_devices(jnp.square(x - spread(mean)).mean(axes))
            if not self.is_initializing():
                count = x.size // channels[0] * self._devices()
                if count == 1:
                    raise UserError("one value for each channel has no variance; train on batches of 2 windows or more")
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (var * (count / (count - 1)) - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        y = (x - spread(mean)) * spread(scale * jax.lax.rsqrt(var + self.epsilon)) + spread(bias)
        return y.astype(dtype)

    def _mean_over_devices(self, statistic):
        # There is no pmapped axis while the variables are being made.
        if self.axis_name is None or self.is_initializing():
            return statistic
        return jax.lax.pmean(statistic, self.axis_name)

    def _devices(self):
        return 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)
