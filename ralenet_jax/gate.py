"""How much of what the model would remove from a lead is to go: all of a noisy lead's noise, nothing of a clean one's.

What would be removed is slow drift and the rest. Of each a part goes that depends on how strong both have been against
the heartbeats in the last seconds, and on how steady: a recording's own drift comes in bursts, added noise stays. And
where the rest is noisy, drift is likely noise too. Logistic functions of these, whose weights `benchmarks/gate.py`
finds on training records.
"""

import numpy as np
import scipy.signal

_LONG_S, _SHORT_S = 60.0, 10.0  # what is longer ago counts less than 1/e
_LEAST_DB = -50.0  # of the heartbeats' power: fainter noise than that makes no difference
_FARTHEST_DB = 20.0  # ratios beyond this, up or down, are taken for it: none such trained the weights
_SHUT = 0.05  # parts below this are none, parts above 1 less this are all
_TINY = 1e-30
# Of what drift goes by, and twice of what the rest goes by, for the rest and for drift: 1; heartbeats over it, dB, in
# the long and in the short run; burstiness of it, dB; heartbeats over the other, dB, in the long run.
WEIGHTS = np.array(
    [[-10.262, -0.653, 0.416, -0.182, 0.685], [9.109, -0.055, -0.729, 0.0, 0.171], [6.134, -0.31, -0.282, 0.0, 0.185]]
)


class _Mean:
    """The mean of what came so far, the last seconds counting most."""

    def __init__(self, forget: float):
        self._forget = forget
        self._sum, self._weight = 0.0, 0.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The next values `[W, C]` → the mean after each."""

        def summed(new, old):
            state = np.broadcast_to(self._forget * old, new[:1].shape)
            return scipy.signal.lfilter([1], [1, -self._forget], new, 0, zi=state)[0]

        sums, weights = summed(values, self._sum), summed(np.ones((len(values), 1)), self._weight)
        self._sum, self._weight = sums[-1], weights[-1]
        return sums / weights


class Gate:
    """The gate of one signal, which remembers what it saw.

    Args:
        hop_s: seconds between windows.
        weights: `[3, 5]`; by default `WEIGHTS`.
    """

    def __init__(self, hop_s: float, weights: np.ndarray | None = None):
        self._weights = WEIGHTS if weights is None else weights
        long, short = np.exp(-hop_s / np.array([_LONG_S, _SHORT_S]))
        self._long = [_Mean(long) for _ in range(5)]
        self._short = [_Mean(short) for _ in range(3)]

    def __call__(self, beats: np.ndarray, drift: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """The next windows `[W, L, C]` → the parts of drift and rest that are to go, 0 to 1: float32 `[2, W, 1, C]`."""
        return parts(self.features(powers(beats, drift, rest)), self._weights)[:, :, None].astype(np.float32)

    def features(self, power: np.ndarray) -> np.ndarray:
        """What the gate goes by, after each of the next windows: `powers` `[3, W, C]` → `[2, W, C, 5]`."""
        long = [mean(values) for mean, values in zip(self._long[:3], power, strict=True)]
        short = [_decibels(mean(values)) for mean, values in zip(self._short, power, strict=True)]
        faintest = long[0] * 10 ** (_LEAST_DB / 10)
        long = [_decibels(np.maximum(values, faintest)) for values in long]
        of_noise = [_decibels(np.maximum(values, faintest)) for values in power[1:]]
        steady = [mean(values) for mean, values in zip(self._long[3:], of_noise, strict=True)]
        over = [long[0] - values for values in steady]
        found = [
            np.stack([over[i], short[0] - short[i + 1], long[i + 1] - steady[i], over[1 - i]], -1).clip(
                -_FARTHEST_DB, _FARTHEST_DB
            )
            for i in (0, 1)
        ]
        return np.pad(np.stack(found), [(0, 0)] * 3 + [(1, 0)], constant_values=1.0)


def powers(beats: np.ndarray, drift: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Powers of windows `[W, L, C]`, of heartbeats and rest about their means: float64 `[3, W, C]`."""
    slow = np.square(drift, dtype=np.float64).mean(1)
    return np.stack([beats.var(1, dtype=np.float64), slow, rest.var(1, dtype=np.float64)])


def parts(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The parts to go, `[2, …]`, by features `[2, …, 5]` and weights `[3, 5]`."""
    score = np.stack([features[i] @ weight for i, weight in zip((0, 1, 1), weights, strict=True)])
    drift, rest, both = (1 + np.tanh(score / 2)) / 2
    part = np.stack([1 - (1 - drift) * (1 - both), rest])
    return np.clip((part - _SHUT) / (1 - 2 * _SHUT), 0, 1)


def _decibels(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power, _TINY))
