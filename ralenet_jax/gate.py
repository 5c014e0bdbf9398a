"""How much of what the model would remove from a lead is to go: all of a noisy lead's noise, nothing of a clean one's.

What would be removed is slow drift and the rest; of each a part goes. A recording's own drift cannot be told from added
wander in one window, but in a minute it can: it comes in bursts and goes on below 0.06 Hz, the wander of electrodes is
steady and does not; where the rest is noisy, drift is likely noise too; and what changes of a sudden is no lead's own.
So a small recurrent network looks at powers now and over the last 2.5, 10 and 60 seconds. `benchmarks/gate.py` trains
it on DS1, and `weights/gate.safetensors` holds it.

At R peaks less of the rest goes, and none in faint noise: the model makes R waves lower. What is fast there is judged
by itself: muscle noise is fast, and so are QRS complexes; electrodes' noise is not.
"""

import functools
import importlib.resources

import numpy as np
import safetensors.numpy
import scipy.signal
from scipy import ndimage

from ralenet_jax import streaming

SECONDS = (2.5, 10.0, 60.0)  # what is longer ago counts less than 1/e
BLOCKS = 6  # means in a hop: what the bands are taken from
_EDGES_HZ = (0.05, 0.1, 0.2, 0.4, 0.8, 2.0)  # of bands of what would be removed; the first band lies below
_SIGNALS = 3 + len(_EDGES_HZ)  # heartbeats, drift, rest, and the bands
FEATURES = 2 * (len(SECONDS) + 1) * (_SIGNALS - 1) + _SIGNALS + 2
_REST_10_S = (_SIGNALS - 1) * SECONDS.index(10.0) + 1  # among the features
_LEAST_DB = -50.0  # of the heartbeats' power: fainter noise than that makes no difference
_RANGE_DB = (-20.0, 40.0)  # ratios beyond count as its ends: few such were trained on
_SILENT = 1e-6  # of the strongest lead's power: a lead that is none
_SHUT = 0.05
# At R peaks, which the model makes lower, so much of the rest below 30 Hz is spared, by heartbeats over the rest in ten
# seconds, and so much of that above 30 Hz, by heartbeats over it.
_SLOW = scipy.signal.firwin(15, 30, fs=streaming.RATE).astype(np.float32)
_SPARED_SLOW = (-6.0, 2.0), (0.4, 1.0)  # dB
_SPARED_FAST = (8.0, 14.0), (0.0, 1.0)  # dB
_TINY = 1e-30


class _Mean:
    """The mean of what came so far, the last seconds counting most."""

    def __init__(self, forget: float):
        self._forget = forget
        self._sum, self._weight = 0.0, 0.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The next values `[W, n]` → the mean after each."""

        def summed(new, old):
            state = np.broadcast_to(self._forget * old, new[:1].shape)
            return scipy.signal.lfilter([1], [1, -self._forget], new, 0, zi=state)[0]

        sums, weights = summed(values, self._sum), summed(np.ones((len(values), 1)), self._weight)
        self._sum, self._weight = sums[-1], weights[-1]
        return sums / weights


class _Bands:
    """Powers of a slow signal in bands, block by block."""

    def __init__(self, rate: float):
        bands = zip(_EDGES_HZ, _EDGES_HZ[1:], strict=False)
        self._filters = [scipy.signal.butter(2, _EDGES_HZ[0], fs=rate, output="sos")]
        self._filters += [scipy.signal.butter(1, band, "band", fs=rate, output="sos") for band in bands]
        self._states: list[np.ndarray] = []

    def __call__(self, means: np.ndarray) -> np.ndarray:
        """The next block means `[W, BLOCKS, C]` → powers `[bands, W, C]`."""
        values = means.reshape(-1, means.shape[2])
        if not self._states:
            self._states = [scipy.signal.sosfilt_zi(sos)[:, :, None] * values[0] for sos in self._filters]
        powers = []
        for number, sos in enumerate(self._filters):
            found, self._states[number] = scipy.signal.sosfilt(sos, values, 0, zi=self._states[number])
            powers.append(np.square(found).reshape(means.shape).mean(1))
        return np.stack(powers)


class Gate:
    """The gate of one signal, which remembers what it saw.

    Args:
        grid: the windows'.
        network: as `load_network` gives it, the default.
    """

    def __init__(self, grid: streaming.Grid, network: dict[str, np.ndarray] | None = None):
        self._network = load_network() if network is None else network
        hop_s = grid.hop / streaming.RATE
        self._new = slice(-grid.used, grid.hop - grid.used)  # of a window
        self._starts = np.arange(BLOCKS) * grid.hop // BLOCKS
        self._lengths = np.diff(self._starts, append=grid.hop)[:, None]
        self._bands = _Bands(BLOCKS / hop_s)
        self._means = [_Mean(np.exp(-hop_s / seconds)) for seconds in SECONDS]
        self._steady = _Mean(np.exp(-hop_s / SECONDS[-1]))
        self._ten_s = _Mean(np.exp(-hop_s / 10))
        self._hop_s, self._seen = hop_s, 0
        self._state: np.ndarray | None = None

    def __call__(self, beats: np.ndarray, drift: np.ndarray, rest: np.ndarray, at_peaks: np.ndarray):
        """What is to go from the next windows.

        Args:
            beats, drift, rest: `[W, L, C]`.
            at_peaks: as `streaming.around_peaks` gives it, `[W, L, 1]`.

        Returns:
            What goes, `[W, L, C]`; and the part of the rest that goes beside R peaks, `[W, 1, C]`, 0 to 1.
        """
        features = self.features(*self.measure(beats, drift, rest))
        scores, self._state = score(features, self._network, self._state)
        of_drift, of_rest = np.moveaxis(part(scores), -1, 0)[:, :, None].astype(np.float32)
        slow = ndimage.convolve1d(rest, _SLOW, axis=1, mode="nearest")
        fast = rest - slow
        over_fast = self._over_fast(beats, fast)
        spared_slow = np.interp(10 * features[..., _REST_10_S], *_SPARED_SLOW)[:, None].astype(np.float32)
        spared_fast = np.interp(over_fast, *_SPARED_FAST)[:, None].astype(np.float32)
        spared = at_peaks * (spared_slow * slow + spared_fast * fast)
        return of_drift * drift + of_rest * (rest - spared), of_rest

    def _over_fast(self, beats: np.ndarray, fast: np.ndarray) -> np.ndarray:
        """Heartbeats over what is fast in the rest, in ten seconds, dB: `[W, C]`."""
        powers = np.concatenate([_variance(beats), _variance(fast)], 1)
        strong, weak = np.split(self._ten_s(powers), 2, 1)
        return _decibels(strong) - _decibels(weak)

    def measure(self, beats: np.ndarray, drift: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of windows `[W, L, C]` what `features` takes.

        Returns:
            Powers of the three, of heartbeats and rest about their means, `[3, W, C]`; and means of what would be
            removed over the parts of each hop, `[W, BLOCKS, C]`; both float64.
        """
        powers = _variance(beats), _mean(np.square(drift, dtype=np.float64)), _variance(rest)
        slow = np.add.reduceat((drift + rest)[:, self._new].astype(np.float64), self._starts, 1) / self._lengths
        return np.stack(powers), slow

    def features(self, powers: np.ndarray, slow: np.ndarray) -> np.ndarray:
        """What the gate goes by, after each of the next windows: `[W, C, FEATURES]`.

        Heartbeats over drift, rest and bands in each run of seconds and now, in tens of dB; the same as a mean over all
        leads; how bursty each of them and the heartbeats are; the heartbeats of a minute over those of now; how much
        has been seen, of a minute.
        """
        power = np.concatenate([powers, self._bands(slow)])
        count, leads = power.shape[1:]

        def averaged(mean, values):
            flat = mean(values.transpose(1, 0, 2).reshape(count, -1))
            return flat.reshape(count, _SIGNALS, leads).transpose(1, 0, 2)

        means = [averaged(mean, power) for mean in self._means]
        faintest = means[-1][0] * 10 ** (_LEAST_DB / 10)
        now, *strengths = [_decibels(np.maximum(mean, faintest)) for mean in [power, *means]]
        steady = averaged(self._steady, now)
        now = (strengths[-1][:1] - now).clip(*_RANGE_DB)
        runs = [(strength[:1] - strength[1:]).clip(*_RANGE_DB) for strength in strengths]
        ratios = np.concatenate([*runs, now[1:]])
        bursts = (strengths[-1] - steady).clip(*_RANGE_DB)
        there = means[-1][0] > _SILENT * means[-1][0].max(1, keepdims=True)
        of_all = (ratios * there).sum(2, keepdims=True) / np.maximum(there.sum(1), 1)[:, None]
        seen = np.minimum((self._seen + np.arange(count)) * self._hop_s / SECONDS[-1], 1.0)
        self._seen += count
        same = np.ones_like(ratios[:1])
        found = [ratios / 10, of_all / 10 * same, bursts / 10, now[:1] / 10, seen[:, None] * same]
        return np.concatenate(found).transpose(1, 2, 0)


@functools.cache
def load_network() -> dict[str, np.ndarray]:
    """The trained network.

    Without memory "hidden" `[FEATURES + 1, H]`, "out" `[H, 2]` and "direct" `[FEATURES + 1, 2]`; and of the gated
    recurrent unit "input" `[FEATURES + 1, 3·Z]`, "recurrent" `[Z, 3·Z]` and "output" `[Z, 2]`.
    """
    weights = importlib.resources.files("ralenet_jax") / "weights" / "gate.safetensors"
    return safetensors.numpy.load(weights.read_bytes())


def score(features: np.ndarray, network: dict, state: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Scores for drift and rest, `[W, C, 2]`, by features of the next windows `[W, C, FEATURES]`.

    Args:
        state: of the memory before them, `[C, Z]`; None at the beginning.

    Returns:
        The scores, and the state after them.
    """
    size, given = len(network["recurrent"]), affine(features, network["input"])
    states = np.empty((*features.shape[:2], size))
    state = np.zeros(size) if state is None else state
    for window, of_window in enumerate(given):
        states[window] = state = remember(state, of_window, network["recurrent"])
    return momentary(features, network) + states @ network["output"], state


def momentary(features, network: dict, tanh=np.tanh):
    """The part of the scores `[…, 2]` without a memory: one hidden layer, and a way around it."""
    inner = tanh(affine(features, network["hidden"]))
    return inner @ network["out"] + affine(features, network["direct"])


def affine(features, weights):
    """Features `[…, F]` times weights `[F + 1, n]`, of which the last are offsets."""
    return features @ weights[:-1] + weights[-1]


def remember(state, given, recurrent, tanh=np.tanh):
    """The next state `[…, Z]` of a gated recurrent unit (Cho et al. 2014), given `[…, 3·Z]`: keep, reset and new."""
    size, of_state = state.shape[-1], state @ recurrent
    # Keep and reset as one: of arrays as small as these each operation takes the same time.
    both = (1 + tanh((given[..., : 2 * size] + of_state[..., : 2 * size]) / 2)) / 2
    keep, reset = both[..., :size], both[..., size:]
    return keep * state + (1 - keep) * tanh(given[..., 2 * size :] + reset * of_state[..., 2 * size :])


def part(scores, tanh=np.tanh, shut=_SHUT):
    """The parts that are to go, 0 to 1, by their scores.

    Parts below `shut` are none, parts above 1 less it are all. Arrays are NumPy's, or JAX's with its `tanh`.
    """
    return (((1 + tanh(scores / 2)) / 2 - shut) / (1 - 2 * shut)).clip(0, 1)


def _variance(windows) -> np.ndarray:
    values = windows.astype(np.float64)
    return np.maximum(_mean(np.square(values)) - np.square(_mean(values)), 0)


def _mean(values) -> np.ndarray:
    """Over the samples of windows `[W, L, C]`; as a product it takes a tenth of NumPy's time."""
    return np.full(values.shape[1], 1 / values.shape[1]) @ values


def _decibels(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power, _TINY))
