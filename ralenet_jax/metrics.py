"""Measures of a denoised window against its clean one, per window, over all leads.

Shapes are `[B, L, C]`. Units are those of the windows (mV under the honest protocol, z-scored units under the paper's);
SNR is in dB, PRD in percent. Definitions are the field's usual ones (SNR, RMSE, PRD, SSD, MAD, cosine similarity); QRS
amplitude and ST level are read at common clinical points relative to the R peak, which is at sample L/2.
"""

import jax
import jax.numpy as jnp

# A perfect or an empty window must give a large finite figure, not an infinite one.
_TINY = 1e-20
# In samples at 360 Hz from the R peak: QRS within 50 ms, ST level 100 ms after, isoelectric (PR) level 80 ms before.
_QRS_HALF_WIDTH = 18
_ST_OFFSET, _PR_OFFSET, _LEVEL_HALF_WIDTH = 36, -29, 4


def _check(*windows: jax.Array) -> None:
    shapes = {window.shape for window in windows}
    if len(shapes) != 1 or windows[0].ndim != 3:
        raise ValueError(f"windows must share one shape [B, L, C], got {[window.shape for window in windows]}")


def squared_error(target: jax.Array, output: jax.Array, weight: jax.Array | float = 1.0) -> jax.Array:
    """Mean squared error, a scalar, of `[B, L, C]` against `[B, L, C]`; `weight` is what each error counts."""
    _check(target, output)
    return jnp.mean(weight * jnp.square(target - output))


def snr_db(clean: jax.Array, output: jax.Array) -> jax.Array:
    """Power of the clean window over power of the error, in dB: `[B, L, C]` → `[B]`."""
    _check(clean, output)
    signal = jnp.sum(jnp.square(clean), (1, 2))
    error = jnp.sum(jnp.square(clean - output), (1, 2))
    return 10 * jnp.log10(jnp.maximum(signal, _TINY) / jnp.maximum(error, _TINY))


def _level(window: jax.Array, centre: int) -> jax.Array:
    return jnp.mean(window[:, centre - _LEVEL_HALF_WIDTH : centre + _LEVEL_HALF_WIDTH + 1], axis=1)


def qrs_amplitude(window: jax.Array) -> jax.Array:
    """Peak-to-peak amplitude within 50 ms of the central R peak: `[B, L, C]` → `[B, C]`."""
    r_peak = window.shape[1] // 2
    qrs = window[:, r_peak - _QRS_HALF_WIDTH : r_peak + _QRS_HALF_WIDTH + 1]
    return jnp.max(qrs, axis=1) - jnp.min(qrs, axis=1)


def st_level(window: jax.Array) -> jax.Array:
    """ST level (100 ms after the central R peak) above the PR level (80 ms before): `[B, L, C]` → `[B, C]`."""
    r_peak = window.shape[1] // 2
    return _level(window, r_peak + _ST_OFFSET) - _level(window, r_peak + _PR_OFFSET)


def window_metrics(clean: jax.Array, noisy: jax.Array, output: jax.Array) -> dict[str, jax.Array]:
    """All measures of `output` against `clean`; `noisy` is what the denoiser was given. Each `[B, L, C]` → `[B]`.

    `signal_energy` and `error_energy` are the sums that the pooled SNR is made of.

    Raises:
        ValueError: if the three do not share one shape `[B, L, C]`.
    """
    _check(clean, noisy, output)
    axes = (1, 2)
    error = output - clean
    signal_energy = jnp.sum(jnp.square(clean), axes)
    error_energy = jnp.sum(jnp.square(error), axes)
    snr = snr_db(clean, output)
    norms = jnp.sqrt(signal_energy * jnp.sum(jnp.square(output), axes))
    return {
        "snr_db": snr,
        "snr_improvement_db": snr - snr_db(clean, noisy),
        "rmse": jnp.sqrt(jnp.mean(jnp.square(error), axes)),
        "prd": 100 * jnp.sqrt(error_energy / jnp.maximum(signal_energy, _TINY)),
        "ssd": error_energy,
        "mad": jnp.max(jnp.abs(error), axes),
        "cosine": jnp.sum(clean * output, axes) / jnp.maximum(norms, _TINY),
        "qrs_amplitude_error": jnp.mean(jnp.abs(qrs_amplitude(output) - qrs_amplitude(clean)), -1),
        "st_level_error": jnp.mean(jnp.abs(st_level(output) - st_level(clean)), -1),
        "signal_energy": signal_energy,
        "error_energy": error_energy,
    }
