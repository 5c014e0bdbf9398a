"""What every model asks of its input, and what it may be computed in."""

from ralenet_jax.errors import UserError

# Of products and activations. Parameters, statistics, input and output are float32 in any case.
DTYPES = ("float32", "bfloat16")


def check_windows(x, unit):
    """Raises a `UserError` unless x is `[B, L, leads]` with L a multiple of `unit` samples."""
    if x.ndim != 3 or x.shape[1] % unit or not x.shape[1]:
        raise UserError(f"x has shape {x.shape}; expected [B, L, leads] with L divisible by {unit}: pad or cut it")
