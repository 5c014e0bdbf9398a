import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from made_models import Identity, Zeros

from ralenet_jax import streaming
from ralenet_jax.denoise import Denoiser
from ralenet_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("model_alone")
RATES = [50, 100, 128, 250, 360, 500, 1000, 333.3]
CHUNKS = [1, 7, 256, 1000, "random"]


class Peaky(nn.Module):
    """Depends on all it is given: neighbours, both leads, the level, and R peaks, around which it adds a bump."""

    def __call__(self, x, r_peak=None, r_mask=None):
        wide = jnp.pad(x, [(0, 0), (1, 1), (0, 0)], mode="edge")
        smooth = (wide[:, :-2] + 2 * x + wide[:, 2:]) / 4
        distance = jnp.arange(x.shape[1])[None, None] - r_peak[..., None]
        bump = (r_mask[..., None] * jnp.exp(-0.01 * jnp.square(distance.astype(jnp.float32)))).sum(1)
        return smooth * 0.8 + 0.1 * x[..., ::-1] + 0.2 * bump[..., None]


@functools.cache
def denoiser(model=Peaky, gate=True):
    return Denoiser(model(), {}, gate=gate)


def beats(seconds):
    return np.arange(0.5, seconds - 0.3, 0.83)


def ecg(seconds, rate, leads=2, noise=0.1):
    time = np.arange(round(seconds * rate))[:, None] / rate
    wave = sum(np.exp(-(((time - beat) / 0.02) ** 2)) for beat in beats(seconds))
    drawn = np.random.default_rng(0).normal(0, noise, (len(time), leads))
    return wave * np.linspace(1, -0.5, leads) + drawn + np.linspace(-1, 2, leads)


def streamed(stream, signal, chunk):
    """All that comes out, and the largest number of samples that had gone in and not come out."""
    sizes = np.random.default_rng(1).integers(0, 700, len(signal)) if chunk == "random" else np.full(len(signal), chunk)
    parts, start, out, waiting = [], 0, 0, 0
    for size in sizes:
        parts.append(stream.push(signal[start : start + size]))
        start = min(start + size, len(signal))
        out += len(parts[-1])
        waiting = max(waiting, start - out)
        if start == len(signal):
            break
    return np.concatenate([*parts, stream.flush()]), waiting


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("rate", [250, 360])
def test_is_what_the_batch_gives(rate, chunk, outside):
    noisy = ecg(12, rate, leads=3)
    noisy[1000:1100, 1] = 0.3  # flat
    peaks = np.round(beats(12) * rate).astype(int)
    whole = denoiser()(noisy, rate, peaks)
    stream = denoiser().stream(rate, 3, level=np.median(noisy, 0), r_peaks=peaks)
    found, _ = streamed(stream, noisy, chunk)
    np.testing.assert_allclose(found, whole, atol=1e-5)
    assert np.abs(whole - noisy).max() > 0.1 and found.dtype == np.float64


@pytest.mark.parametrize("rate", RATES)
def test_is_what_the_batch_gives_at_all_rates(rate, outside):
    noisy = ecg(6, rate)
    peaks = np.round(beats(6) * rate).astype(int)
    stream = denoiser().stream(rate, 2, np.median(noisy, 0), peaks)
    np.testing.assert_allclose(streamed(stream, noisy, 100)[0], denoiser()(noisy, rate, peaks), atol=1e-5)


def gappy():
    noisy = ecg(15, 250)
    noisy[:200, 0] = np.nan
    noisy[1000:1900, 1] = np.inf
    noisy[2500:2502] = np.nan
    return noisy


@pytest.mark.parametrize("chunk", [1, 7, 1000, "random", 10_000])
def test_chunks_make_no_difference_to_what_the_stream_finds_itself(chunk):
    noisy = gappy()
    expected, _ = streamed(denoiser().stream(250, 2), noisy, 256)
    np.testing.assert_allclose(streamed(denoiser().stream(250, 2), noisy, chunk)[0], expected, atol=1e-6)
    np.testing.assert_array_equal(np.isnan(expected), ~np.isfinite(noisy))
    # R peaks and level are nearly those of the batch where the signal is whole.
    whole = denoiser()(noisy, 250)
    assert np.nanpercentile(np.abs(expected - whole), 90) < 0.05


def test_finds_the_r_peaks_itself():
    class Marker(nn.Module):
        def __call__(self, x, r_peak=None, r_mask=None):
            at = (jnp.arange(x.shape[1])[None, None] == r_peak[..., None]) & r_mask[..., None]
            return x + at.sum(1)[..., None]

    noisy = ecg(20, 360, noise=0.05)
    found, _ = streamed(Denoiser(Marker(), {}, gate=False).stream(360, 2), noisy, 50)
    added = np.abs(found - noisy).max(1)
    expected = beats(20) * 360
    near = [added[max(int(beat) - 3, 0) : int(beat) + 4].max() > 0.05 for beat in expected]
    # A peak in the last 0.1 s of a window may be seen by the next one only.
    assert np.mean(near) > 0.9
    far = np.abs(np.flatnonzero(added > 0.05)[:, None] - expected).min(1) > 10
    assert far.sum() <= 3


def test_follows_a_level_that_it_is_not_told():
    noisy = ecg(20, 180) + 50.0
    found, _ = streamed(denoiser(Zeros, False).stream(180, 2), noisy, 100)
    # All is removed but the level.
    np.testing.assert_allclose(found, np.broadcast_to(np.median(noisy, 0), found.shape), atol=0.1)


def windows_of(signal, level):
    """The windows that a stream of one lead at 180 Hz sends to the model, `[W, 256]`."""
    seen = []

    def remove(windows, r_peak, r_mask):
        seen.append(windows)
        return np.zeros((len(windows), 178, 2), np.float32)

    stream = streaming.Stream(remove, streaming.build_grid(180, 256), 1, level, np.zeros(0, int))
    streamed(stream, signal, 100)
    return np.concatenate(seen)[..., 0]


def test_its_level_is_the_median_of_the_last_8_seconds():
    ramp = np.arange(7200) / 1000
    # Of window 20, samples 2747 to 3002, the last 178 begin at 20·143 − 35; 8 s are 1440 samples.
    np.testing.assert_allclose(windows_of(ramp, None)[20], ramp[2747:3003] - np.median(ramp[1563:3003]), atol=1e-6)


def test_a_gap_still_open_is_held_at_its_last_value():
    signal = np.sin(np.arange(3000) / 10)
    expected = signal.copy()
    signal[1000:2000] = np.nan
    # Window 8 is samples 1031 to 1286, window 12 samples 1603 to 1858, window 13 samples 1746 to 2001.
    windows = windows_of(signal, np.zeros(1))
    np.testing.assert_allclose(windows[[8, 12]], np.full((2, 256), expected[999]), atol=1e-6)
    # Then the line to the next sample begins where the samples known had ended.
    line = np.interp(np.arange(1859, 2000), [1858, 2000], expected[[999, 2000]])
    np.testing.assert_allclose(windows[13], np.r_[np.full(113, expected[999]), line, expected[2000:2002]], atol=1e-6)


@pytest.mark.parametrize("rate", [50, 75, 100, 128, 250, 360, 500, 5000, 333.3])
def test_latency_is_told_and_bounded(rate):
    noisy = ecg(4, rate)
    stream = denoiser().stream(rate, 2)
    _, waiting = streamed(stream, noisy, 1)
    # Told is a bound, and no loose one: within a sample and the grid's rounding.
    assert waiting / rate <= stream.latency + 1e-9 <= 1.0
    assert waiting / rate > stream.latency - 2 / min(rate, 360)


@pytest.mark.parametrize("rate", [50, 360, 1000])
@pytest.mark.parametrize("length", [0, 1, 2, 10, 111, 112, 113, 500])
def test_as_many_samples_come_out_as_went_in(rate, length):
    noisy = np.random.default_rng(length).normal(0, 1, (length, 2))
    stream = denoiser(Identity).stream(rate, 2)
    found = np.concatenate([stream.push(noisy), stream.flush()])
    assert found.shape == noisy.shape
    np.testing.assert_allclose(found, noisy, atol=1e-6)


def test_a_single_lead_and_precision():
    noisy = ecg(3, 360, 1).astype(np.float32)[:, 0]
    stream = denoiser(Identity).stream(360, 1)
    parts = [stream.push(noisy), stream.push(noisy[:0]), stream.flush()]
    assert [part.dtype for part in parts] == ["float32"] * 3 and parts[1].shape == (0, 1)
    np.testing.assert_allclose(np.concatenate(parts)[:, 0], noisy, atol=1e-6)


def test_a_lead_without_samples_stays_without():
    noisy = ecg(3, 360)
    noisy[:, 1] = np.nan
    found, _ = streamed(denoiser(Zeros, False).stream(360, 2), noisy, 100)
    assert np.isnan(found[:, 1]).all() and np.isfinite(found[:, 0]).all()


def test_memory_is_bounded():
    stream = denoiser(Identity).stream(100, 2)
    noisy = ecg(120, 100)
    sizes = []
    for start in range(0, len(noisy), 100):
        stream.push(noisy[start : start + 100])
        sizes.append(sum(len(value) for value in vars(stream).values() if isinstance(value, np.ndarray)))
    assert max(sizes[60:]) <= max(sizes[:60])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 2), "sampling rate"),
        ((360, 0), "leads is 0"),
        ((360, 1.5), "leads is 1.5"),
        ((360, 2, [1, 2, 3]), "level"),
        ((360, 2, "high"), "level"),
        ((360, 2, np.nan), "level"),
        ((360, 2, None, [-1]), "has -1"),
        ((360, 2, None, [0.5]), "integers"),
    ],
)
def test_a_stream_that_cannot_be_is_told(arguments, message):
    with pytest.raises(UserError, match=message):
        denoiser(Identity).stream(*arguments)


@pytest.mark.parametrize(
    "chunk", [np.zeros((5, 3)), np.zeros(5), np.zeros((1, 5, 2)), np.array([["a", "b"]]), np.zeros((5, 2), complex)]
)
def test_a_chunk_of_another_kind_is_told(chunk):
    with pytest.raises(UserError, match="expected numbers"):
        denoiser(Identity).stream(360, 2).push(chunk)


def test_a_stream_ends_once():
    stream = denoiser(Identity).stream(360, 2)
    stream.flush()
    with pytest.raises(UserError, match="flushed"):
        stream.push(np.zeros((5, 2)))


def test_nearness_to_r_peaks():
    told = np.array([[100, 0, 0, 0], [20, 30, -12, 0]]), np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool)
    near = streaming.around_peaks(*told, 256)
    assert near.shape == (2, 256, 1) and near.dtype == np.float32
    # 30 ms are 5.4 samples.
    np.testing.assert_array_equal(near[0, 95:106], 1)
    expected = np.cos(np.pi / 2 * np.arange(0.6, 5.4) / 5.4) ** 2
    np.testing.assert_allclose(near[0, 106:111, 0], expected, atol=1e-6)
    np.testing.assert_allclose(near[0, 94:89:-1, 0], expected, atol=1e-6)
    assert not near[0, :90].any() and not near[0, 111:].any()
    np.testing.assert_allclose(near[1, 25, 0], 1)
    assert not near[1, 0].any()  # 12 samples after the third
