"""Noise from the MIT-BIH Noise Stress Test Database, mixed with clean windows on the device.

The recordings lie on the device whole; a noisy window is made from a clean one, a key and a condition, so fixed noise
(one key for each window) and fresh noise (the step folded into it) are the same function.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ralenet_jax.errors import UserError

RECORDINGS = ("bw", "ma", "em")
# Which recordings a kind of noise is the sum of.
# A denoiser should leave alone what has "none".
KINDS = {"bw": (1, 0, 0), "ma": (0, 1, 0), "em": (0, 0, 1), "emb": (1, 1, 1), "none": (0, 0, 0)}
PROTOCOLS = ("paper", "honest")
# Windows without any power (a lead that is off) stay as they are instead of being divided by zero.
_TINY = 1e-12


class Condition(NamedTuple):
    """What noise is mixed; arrays, so that one compiled step serves all conditions.

    Attributes:
        weights: float32 `[kinds, 3]`, one row of 0 and 1 over `RECORDINGS` for each kind that is drawn from.
        snr_db: float32 `[2]`, lowest and highest signal-to-noise ratio, dB.
        span: int32 `[2]`, first sample and end of the part of the recordings that is used.
    """

    weights: np.ndarray
    snr_db: np.ndarray
    span: np.ndarray


class Mixture(NamedTuple):
    """Windows `[B, L, C]` as the model sees them, and `offset`, `scale` (`[B, 1, 1 or C]`) that undo the normalisation.

    `weight`: what squared errors count in training, `[B, 1, C]` or one for all.
    """

    noisy: jax.Array
    clean: jax.Array
    offset: jax.Array
    scale: jax.Array
    weight: jax.Array | float = 1.0


def parse_kinds(kinds: str) -> tuple[str, ...]:
    """Splits "bw,ma" into names of noises; raises `UserError` naming what exists."""
    names = tuple(name.strip() for name in kinds.split(","))
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise UserError(f"noise kind {unknown[0]!r} is not known; choose from {', '.join(KINDS)} (several with commas)")
    return names


def condition(kinds: str, low_db: float, high_db: float | None, span: tuple[int, int]) -> Condition:
    """Describes noise of `kinds` (with commas) between two ratios in dB (None: exactly the low one) from part of it.

    Raises:
        UserError: for an unknown kind, a ratio that is not finite, or a range that is upside down.
    """
    high_db = low_db if high_db is None else high_db
    if not (np.isfinite(low_db) and np.isfinite(high_db) and low_db <= high_db):
        raise UserError(f"noise SNR from {low_db} to {high_db} dB; expected finite numbers, the lower first")
    weights = np.array([KINDS[name] for name in parse_kinds(kinds)], np.float32)
    return Condition(weights, np.array([low_db, high_db], np.float32), np.array(span, np.int32))


def _noise_window(recordings: jax.Array, weights: jax.Array, span: jax.Array, key: jax.Array, length: int) -> jax.Array:
    """Sum of one independent window from each recording that has weight: `[recordings, N, C]` → `[L, C]`, mV."""
    starts = jax.random.randint(key, (len(RECORDINGS),), span[0], span[1] - length + 1)
    cut = jax.vmap(lambda recording, start: jax.lax.dynamic_slice_in_dim(recording, start, length))
    return jnp.tensordot(weights, cut(recordings, starts), 1)


def _noise_leads(recordings: jax.Array, weights: jax.Array, span: jax.Array, key: jax.Array, length: int, leads: int):
    """As `_noise_window`, but each lead is a channel, drawn at random, of a sum of its own: → `[L, leads]`, mV."""

    def one_lead(key: jax.Array) -> jax.Array:
        start_key, channel_key = jax.random.split(key)
        channel = jax.random.randint(channel_key, (), 0, recordings.shape[2])
        return _noise_window(recordings, weights, span, start_key, length)[:, channel]

    return jax.vmap(one_lead, out_axes=1)(jax.random.split(key, leads))


def draw(
    recordings: jax.Array, chosen: Condition, key: jax.Array, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """The noise `[L, C]` in mV of one window of this shape, and its ratio in dB."""
    kind_key, start_key, snr_key = jax.random.split(key, 3)
    weights = jnp.asarray(chosen.weights)[jax.random.randint(kind_key, (), 0, chosen.weights.shape[0])]
    ratio = jax.random.uniform(snr_key, (), minval=chosen.snr_db[0], maxval=chosen.snr_db[1])
    drawn = (recordings, weights, chosen.span, start_key)
    if shape[1] == recordings.shape[2]:
        return _noise_window(*drawn, shape[0]), ratio
    return _noise_leads(*drawn, *shape), ratio


def _scaled(noise: jax.Array, clean: jax.Array, ratio_db: jax.Array) -> jax.Array:
    """Scales noise, all leads together, so that mean(clean²)/mean(noise²) is the ratio."""
    power = jnp.mean(jnp.square(clean), (1, 2), keepdims=True)
    noise_power = jnp.mean(jnp.square(noise), (1, 2), keepdims=True)
    wanted = power / 10 ** (ratio_db[:, None, None] / 10)
    return noise * jnp.sqrt(wanted / jnp.maximum(noise_power, _TINY))


def mix(protocol: str, recordings: jax.Array, chosen: Condition, clean: jax.Array, keys: jax.Array) -> Mixture:
    """Makes noisy windows.

    Args:
        protocol: "paper" (the clean window is z-scored with one mean and deviation over its leads; the noise is centred
            with one mean) or "honest" (clean and noise are centred per lead; then mean and deviation of the noisy
            window normalise both, since a clean one is not at hand when the model is used).
        recordings: float32 `[3, N, channels]`, mV, in the order of `RECORDINGS`.
        chosen: what noise, how strong, from where.
        clean: float32 `[B, L, C]`, mV. With as many leads as channels, all leads have their noise from the same places;
            otherwise each lead has a channel and places of its own. The scale is one over all leads.
        keys: `[B]` keys, one for each window.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}; expected one of {PROTOCOLS}")
    over = (1, 2) if protocol == "paper" else 1
    clean = clean - jnp.mean(clean, over, keepdims=True)
    if protocol == "paper":
        clean = clean / jnp.sqrt(jnp.maximum(jnp.mean(jnp.square(clean), (1, 2), keepdims=True), _TINY))
    noise, ratio_db = jax.vmap(lambda key: draw(recordings, chosen, key, clean.shape[1:]))(keys)
    noise = noise - jnp.mean(noise, over, keepdims=True)
    noisy = clean + _scaled(noise, clean, ratio_db)
    offset = jnp.zeros((clean.shape[0], 1, 1), clean.dtype)
    if protocol == "paper":
        return Mixture(noisy, clean, offset, offset + 1)
    offset = jnp.mean(noisy, (1, 2), keepdims=True)
    scale = jnp.sqrt(jnp.maximum(jnp.mean(jnp.square(noisy - offset), (1, 2), keepdims=True), _TINY))
    return Mixture((noisy - offset) / scale, (clean - offset) / scale, offset, scale)


def window_keys(key: jax.Array, window_id: jax.Array, step: jax.Array | None) -> jax.Array:
    """One key for each window id (int32 `[B]`): the same at every step (`step` None), or another at each."""
    if step is not None:
        key = jax.random.fold_in(key, step)
    return jax.vmap(lambda identity: jax.random.fold_in(key, identity))(window_id)
