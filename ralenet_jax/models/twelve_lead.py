"""RA-LENet for twelve leads: convolutions around a trained RA-LENet for two (DOI 10.1109/IJCNN60899.2024.10650979)."""

import flax.linen as nn
import jax.numpy as jnp

from ralenet_jax.errors import UserError
from ralenet_jax.models.convolution import Conv
from ralenet_jax.models.inputs import DTYPES, check_windows
from ralenet_jax.models.ralenet import LEVELS, RALENet

LEADS = 12
INNER_LEADS = 6  # between twelve leads and two
WIDTH = 13


class TwelveLead(nn.Module):
    """The denoised window of twelve leads from the noisy one.

    Attributes:
        axis_name: pmapped axis over which BatchNorm takes its statistics, None for one device.
        dtype: what products and activations are computed in, see `inputs.DTYPES`.
    """

    CHOICES = {"dtype": DTYPES}
    FROZEN = "base"  # the submodule whose parameters do not train; its running statistics move as in training
    BASE_LEADS = 2

    axis_name: str | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, r_peak=None, train=False, r_mask=None):
        """Denoises windows.

        Args:
            x: `[B, L, 12]`, L divisible by 16.
            r_peak, r_mask: as for RA-LENet.
            train: whether BatchNorm uses the statistics of the batch and updates the running ones.

        Returns:
            `[B, L, 12]`.

        Raises:
            UserError: for an x or r_peak of another shape.
        """
        check_windows(x, 2 ** (LEVELS - 1))
        if x.shape[2] != LEADS:
            raise UserError(
                f"x has shape {x.shape}; ralenet_12lead expects [B, L, {LEADS}]: use data of {LEADS} leads "
                "(data.database=ludb), or ralenet for other numbers of leads"
            )

        def conv(features, name):
            return Conv(features, WIDTH, padding=WIDTH // 2, name=name)

        y = nn.leaky_relu(conv(INNER_LEADS, "reduce0")(x.transpose(2, 0, 1).astype(self.dtype)), 0.01)
        y = nn.leaky_relu(conv(self.BASE_LEADS, "reduce1")(y), 0.01)
        y = RALENet(self.axis_name, dtype=self.dtype, name=self.FROZEN)(y.transpose(1, 2, 0), r_peak, train, r_mask)
        y = nn.leaky_relu(conv(INNER_LEADS, "expand0")(y.transpose(2, 0, 1).astype(self.dtype)), 0.01)
        return conv(LEADS, "expand1")(y.astype(jnp.float32)).transpose(1, 2, 0)
