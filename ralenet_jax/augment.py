"""Windows from anywhere in a recording, as a denoiser meets them: every kind of noise, any lead, R peaks as detected.

Noise is scaled to the recording as a whole, so that its bursts stay bursts. The model sees each lead of a window less
the window's own slow course (`wander`) and divided by what is then its rms, and learns the heartbeats about their
baseline: how much of a recording's drift is its own cannot be told from one window, and is decided elsewhere.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ralenet_jax import noise

RATE = 180.0  # Hz, of the windows' samples
WINDOW = 256  # samples of a window
_ORDER = 2  # of the polynomial that is a window's slow course: what is below about 0.7 Hz
_TINY = 1e-12
_GAIN = 2.0  # a lead's gain is between its inverse and this
_SINGLE = 0.25  # of the windows show one lead twice
_HUM, _WHITE = 0.2, 0.3  # of the windows have mains hum and white noise on top
_ADDED_DB = (0.0, 30.0)  # recording to hum, recording to white noise
_LEAST, _MOST = 0.5, 2.0  # an error counts by the window's strength over the recording's, within these
_MISSED, _MOVED = 0.1, 0.1  # of the R peaks are not told, or told in a wrong place
_JITTER = 3  # samples: the others are told so far off, at most
_FAR = 50  # samples: how far off a wrong place may be


def unit_noise(recordings: jax.Array, chosen: noise.Condition) -> tuple[jax.Array, noise.Condition]:
    """Centres each noise recording `[3, N, C]` and makes its power 1 over the condition's span.

    The weights of the condition are changed so that each kind is the sum that it was, with a power of 1 too.
    """
    used = recordings[:, chosen.span[0] : chosen.span[1]]
    recordings = recordings - used.mean(1, keepdims=True)
    rms = jnp.sqrt(jnp.mean(jnp.square(recordings[:, chosen.span[0] : chosen.span[1]]), (1, 2)))
    weights = chosen.weights * rms[None]
    weights /= jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(weights), 1, keepdims=True), _TINY))
    return recordings / rms[:, None, None], chosen._replace(weights=weights)


def mix(
    recordings: jax.Array, chosen: noise.Condition, batch: dict[str, jax.Array], keys: jax.Array
) -> tuple[noise.Mixture, dict[str, Any]]:
    """Makes noisy windows, and tells the model's R peaks.

    Args:
        recordings, chosen: from `unit_noise`; a kind "none" leaves windows without noise.
        batch: "clean" float32 `[B, L, C]` in mV, centred over its recording; "drift" of the same shape, what of it is
            the recording's own slow drift; "level" `[B]`, the recording's rms in mV; "r_peak" int32 `[B, K]` and
            "r_mask" bool `[B, K]`.
        keys: `[B]`, one for each window.

    Returns:
        The mixture: noisy as `standardise` makes it, clean without the drift; and what `model.apply` takes besides.
    """
    draw = jax.vmap(_one_window, (None, None, 0, 0, 0, 0, 0, 0))
    told = (batch[name] for name in ("clean", "drift", "level", "r_peak", "r_mask"))
    noisy, beats, r_peak, r_mask = draw(recordings, chosen, *told, keys)
    standard, scale = standardise(noisy)
    weight = jnp.clip(scale / jnp.maximum(batch["level"][:, None, None], _TINY), _LEAST, _MOST)
    mixture = noise.Mixture(standard, beats / scale, jnp.zeros_like(scale), scale, weight)
    return mixture, {"r_peak": r_peak, "r_mask": r_mask}


@functools.cache
def _slow_courses(length: int) -> np.ndarray:
    """Orthonormal polynomials over a window, float32 `[L, 3]`."""
    powers = np.linspace(-1, 1, length)[:, None] ** np.arange(_ORDER + 1)
    return np.linalg.qr(powers)[0].astype(np.float32)


def wander(windows):
    """The slow course of each lead of windows `[…, L, C]`, NumPy's or JAX's: the nearest polynomial of order 2."""
    courses = _slow_courses(windows.shape[-2])
    return courses @ (courses.T @ windows)


def standardise(noisy):
    """Windows `[…, L, C]` as the model sees them: each lead less its `wander`, divided by its rms; and that rms."""
    fast = noisy - wander(noisy)
    scale = (fast * fast).mean(-2, keepdims=True).clip(_TINY) ** 0.5
    return fast / scale, scale


def _one_window(recordings, chosen, clean, drift, level, r_peak, r_mask, key):
    lead_key, noise_key, added_key, peak_key = jax.random.split(key, 4)
    (clean, beats), single = _leads(jnp.stack([clean, clean - drift]), lead_key)
    drawn, ratio_db = noise.draw(recordings, chosen, noise_key, clean.shape)
    # Strong noise is what a denoiser is for: half of the windows are in the lowest quarter of the range.
    low, high = chosen.snr_db
    ratio_db = low + jnp.square(ratio_db - low) / jnp.maximum(high - low, _TINY)
    noisy = clean + level * (drawn * 10 ** (-ratio_db / 20) + _added(clean.shape, added_key))
    noisy = jnp.where(single, noisy[:, :1], noisy)
    return noisy, beats, *_detected(r_peak, r_mask, peak_key)


def _leads(windows, key):
    """Leads of `[…, L, C]` in any order, gain and polarity, or the first one twice; and whether it is."""
    order_key, gain_key, sign_key, single_key = jax.random.split(key, 4)
    windows = jnp.where(jax.random.bernoulli(order_key), windows[..., ::-1], windows)
    gain = _GAIN ** jax.random.uniform(gain_key, (1,) * (windows.ndim - 1) + windows.shape[-1:], minval=-1.0)
    windows = windows * gain * jnp.where(jax.random.bernoulli(sign_key, shape=gain.shape), 1.0, -1.0)
    single = jax.random.bernoulli(single_key, _SINGLE)
    return jnp.where(single, windows[..., :1], windows), single


def _added(shape, key):
    """Hum of the mains and white noise `[L, C]`, relative to the recording; often neither."""
    hum_key, white_key, strength_key, there_key, phase_key = jax.random.split(key, 5)
    strength = 10 ** (-jax.random.uniform(strength_key, (2,), minval=_ADDED_DB[0], maxval=_ADDED_DB[1]) / 20)
    strength *= jax.random.bernoulli(there_key, jnp.array([_HUM, _WHITE])).astype(jnp.float32)
    hertz = jnp.where(jax.random.bernoulli(hum_key), 50.0, 60.0)
    phase = jax.random.uniform(phase_key, (1, shape[1]), maxval=2 * jnp.pi)
    time = jnp.arange(shape[0])[:, None] / RATE
    hum = 2**0.5 * jnp.sin(2 * jnp.pi * hertz * time + phase)
    return strength[0] * hum + strength[1] * jax.random.normal(white_key, shape)


def _detected(r_peak, r_mask, key):
    """R peaks `[K]` as a detector tells them: a little off, some missed, some in a wrong place."""
    missed_key, moved_key, near_key, far_key = jax.random.split(key, 4)
    near = jax.random.randint(near_key, r_peak.shape, -_JITTER, _JITTER + 1)
    far = jax.random.randint(far_key, r_peak.shape, -_FAR, _FAR + 1)
    moved = jax.random.bernoulli(moved_key, _MOVED, r_peak.shape)
    missed = jax.random.bernoulli(missed_key, _MISSED, r_peak.shape)
    return r_peak + jnp.where(moved, far, near), r_mask & ~missed
