import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from made_models import Identity, Zeros
from ml_collections import ConfigDict

from ralenet_jax import denoise, export, gate, heartbeats, streaming
from ralenet_jax.denoise import Denoiser
from ralenet_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("model_alone")
RATES = [100, 128, 250, 360, 500, 1000]
ALL, NONE = 20.0, -20.0  # scores of the gate that let all go, or nothing


class Smoother(nn.Module):
    """Weights 1/4, 1/2, 1/4."""

    def __call__(self, x, r_peak=None, r_mask=None):
        wide = jnp.pad(x, [(0, 0), (1, 1), (0, 0)], mode="edge")
        return (wide[:, :-2] + 2 * x + wide[:, 2:]) / 4


class Marker(nn.Module):
    """Adds 1 at the R peaks that it is told."""

    def __call__(self, x, r_peak=None, r_mask=None):
        at = (jnp.arange(x.shape[1])[None, None] == r_peak[..., None]) & r_mask[..., None]
        return x + at.sum(1)[..., None]


class SmoothMarker(nn.Module):
    """Both of them."""

    @nn.compact
    def __call__(self, x, r_peak=None, r_mask=None):
        return Marker()(Smoother()(x), r_peak, r_mask)


class FirstLead(nn.Module):
    """Both leads become the first: tells which lead was paired with which."""

    def __call__(self, x, r_peak=None, r_mask=None):
        return jnp.broadcast_to(x[..., :1], x.shape)


def denoiser(model, **options):
    return Denoiser(model, {}, **({"gate": False} | options))


def set_gate(monkeypatch, *scores):
    """Gives the gate a network that always has these scores for drift and rest."""
    count = gate.FEATURES + 1
    network = {"hidden": np.zeros((count, 1)), "out": np.zeros((1, 2)), "direct": np.zeros((count, 2))}
    network |= {"input": np.zeros((count, 3)), "recurrent": np.zeros((1, 3)), "output": np.zeros((1, 2))}
    network["direct"][-1] = scores
    monkeypatch.setattr(gate, "load_network", lambda: network)


def beats(seconds, first=0.5, every=0.83):
    return np.arange(first, seconds - 0.3, every)


def ecg(seconds, rate, leads=2, seed=0, noise=0.0):
    """An ECG in mV `[L, leads]` about a level of its own for each lead; its R peaks are at `beats(seconds)`."""
    time = np.arange(round(seconds * rate))[:, None] / rate
    gain = np.array([1.0, -0.6, 0.4, 0.8, 1.2])[:leads]
    wave = sum(np.exp(-(((time - beat) / 0.02) ** 2)) for beat in beats(seconds))
    wave = wave + 0.25 * sum(np.exp(-(((time - beat - 0.25) / 0.05) ** 2)) for beat in beats(seconds))
    drawn = np.random.default_rng(seed).normal(0, noise, (len(time), leads)) if noise else 0.0
    return wave * gain + drawn + np.array([0.3, -2.0, 0.0, 5.0, 1.0])[:leads]


@pytest.mark.parametrize("rate", [50, *RATES, 333.3, 5000])
def test_what_is_not_touched_comes_out_as_it_went_in(rate):
    noisy = ecg(7, rate, noise=0.1)
    cleaned = denoiser(Identity())(noisy, rate)
    assert cleaned.dtype == np.float64
    np.testing.assert_allclose(cleaned, noisy, atol=1e-6)


@pytest.mark.parametrize("rate", RATES)
def test_what_is_removed_lies_where_it_was(rate):
    # The model says that nothing is signal: all below 90 Hz is removed, but for each lead's median.
    clean = ecg(9, rate) + np.cos(np.arange(9 * rate) / rate)[:, None]
    removed = clean - denoiser(Zeros())(clean, rate)
    expected = clean - np.median(clean, 0)
    assert removed.shape == clean.shape
    lags = scipy.signal.correlation_lags(len(clean), len(clean))
    for lead in range(2):
        assert lags[np.argmax(scipy.signal.correlate(removed[:, lead], expected[:, lead]))] == 0
    # The QRS complex reaches a little into the filter's edge.
    np.testing.assert_allclose(removed, expected, atol=0.02)


@pytest.mark.parametrize("rate", [250, 360, 1000])
def test_what_the_model_does_not_see_goes_with_the_noise(rate, outside, monkeypatch):
    clean = ecg(12, rate)
    hiss = 0.2 * np.sin(2 * np.pi * 0.45 * np.arange(len(clean)))[:, None]  # from 112 Hz on
    left = denoiser(Identity())(clean + hiss, rate)
    faster = left - scipy.signal.sosfiltfilt(scipy.signal.butter(4, 20, fs=rate, output="sos"), left, axis=0)
    of_clean = clean - scipy.signal.sosfiltfilt(scipy.signal.butter(4, 20, fs=rate, output="sos"), clean, axis=0)
    np.testing.assert_allclose(faster[rate:-rate], of_clean[rate:-rate], atol=0.02)
    # And stays with what the gate holds back.
    set_gate(monkeypatch, ALL, NONE)
    slower = clean + hiss - denoiser(Identity(), gate=True)(clean + hiss, rate)
    assert slower.std() > 0.01
    np.testing.assert_allclose(np.diff(slower, axis=0), 0, atol=0.01)


def test_windows_have_no_seams():
    noisy = ecg(40, 180, noise=0.2)
    cleaned = denoiser(Smoother())(noisy, 180)
    expected = scipy.signal.convolve(noisy, np.array([[0.25], [0.5], [0.25]]), mode="same")
    # The last sample of a window knows no neighbour; it weighs 0.0008.
    np.testing.assert_allclose(cleaned[1:-1], expected[1:-1], atol=3e-4)
    assert np.abs(noisy - expected).max() > 0.2


@pytest.mark.parametrize("rate", [250, 360])
@pytest.mark.parametrize("r_peaks", [None, [400, 900, 5000]])
def test_blocks_make_no_difference(monkeypatch, rate, r_peaks):
    noisy = ecg(60, rate, leads=3, noise=0.2)
    noisy[2000:5200, 1] = np.nan  # longer than a block, across several
    noisy[:300, 2] = np.nan
    noisy[-700:, 0] = np.inf
    noisy[1008:1090, 2] = noisy[1468:1550, 2] = 0.3  # flat from shortly before a block ends, at 250 and at 360 Hz
    whole = denoiser(SmoothMarker())(noisy, rate, r_peaks)
    monkeypatch.setattr(denoise, "_BLOCK_S", 5)
    monkeypatch.setattr(denoise, "_CPU_BATCH", 2)
    windows = []
    monkeypatch.setattr(denoise, "_pairs", lambda x, pairs=denoise._pairs: windows.append(len(x)) or pairs(x))
    np.testing.assert_allclose(denoiser(SmoothMarker())(noisy, rate, r_peaks), whole, atol=1e-6)
    assert len(windows) > 10
    assert np.nanmax(np.abs(whole - noisy)) > 0.1


def test_it_tells_how_many_samples_are_done(monkeypatch):
    monkeypatch.setattr(denoise, "_BLOCK_S", 5)
    monkeypatch.setattr(denoise, "_CPU_BATCH", 2)
    done = []
    denoiser(Identity())(ecg(60, 250), 250, report=done.append)
    assert len(done) > 10 and min(done) >= 0 and sum(done) == 60 * 250


def test_two_blocks_are_under_way_and_no_more(monkeypatch):
    monkeypatch.setattr(denoise, "_BLOCK_S", 5)
    monkeypatch.setattr(denoise, "_CPU_BATCH", 2)
    runner, events = denoise._Runner, []
    send, receive = runner.send, runner.receive
    monkeypatch.setattr(runner, "send", lambda *given: events.append(1) or send(*given))
    monkeypatch.setattr(runner, "receive", staticmethod(lambda *given: events.append(-1) or receive(*given)))
    denoiser(Identity())(ecg(60, 360), 360)
    assert len(events) > 20 and max(np.cumsum(events)) == 2


def test_levels_of_long_recordings_follow_them(monkeypatch):
    monkeypatch.setattr(denoise, "_LEVEL_S", 20)
    noisy = ecg(80, 360) + np.linspace(0, 8, 80 * 360)[:, None]
    left = denoiser(Zeros())(noisy, 360)
    # All is removed but the level: a line through the medians of the four parts, 2 mV apart, level beyond the middles.
    assert np.abs(np.diff(left, axis=0)).max() < 0.01
    np.testing.assert_allclose(left[40 * 360] - left[20 * 360], 2, atol=0.05)
    np.testing.assert_allclose(left[0], np.median(noisy[: 20 * 360], 0), atol=0.01)


@pytest.mark.parametrize("length", [2, 3, 60, 255, 256, 257, 500, 1000])
def test_any_length(length):
    noisy = np.random.default_rng(length).normal(1, 1, (length, 2))
    np.testing.assert_allclose(denoiser(Identity())(noisy, 360), noisy, atol=1e-6)
    left = denoiser(Zeros())(noisy, 180)
    np.testing.assert_allclose(left, np.broadcast_to(np.median(noisy, 0), left.shape), atol=1e-5)


@pytest.mark.parametrize("leads", [1, 2, 3, 5])
def test_leads_go_in_pairs_and_a_last_one_alone(leads):
    noisy = ecg(10, 180, leads, noise=0.01)  # without noise parts are flat
    centred = noisy - np.median(noisy, 0)
    cleaned = denoiser(FirstLead())(noisy, 180) - np.median(noisy, 0)
    first = np.arange(leads) // 2 * 2
    # Each has its own scale in the model.
    for lead in range(leads):
        assert np.corrcoef(cleaned[:, lead], centred[:, first[lead]])[0, 1] > 0.99
        np.testing.assert_allclose(cleaned[:, lead].std(), centred[:, lead].std(), rtol=0.1)
    if leads == 1:
        alone = denoiser(FirstLead())(noisy[:, 0], 180)
        assert alone.shape == noisy[:, 0].shape


def test_of_a_lead_given_twice_the_mean_is_taken():
    class OneIsZero(nn.Module):
        def __call__(self, x, r_peak=None, r_mask=None):
            return x * jnp.array([1.0, 0.0])[None, None]

    noisy = ecg(5, 180, 1, noise=0.01)
    level = np.median(noisy)
    np.testing.assert_allclose(denoiser(OneIsZero())(noisy, 180) - level, (noisy - level) / 2, atol=1e-6)


@pytest.mark.parametrize(
    "given, expected", [("float32", "float32"), ("float64", "float64"), ("int16", "float64"), ("uint8", "float64")]
)
def test_precision(given, expected):
    signal = np.round(ecg(4, 180) * 20 + 100).astype(given)
    cleaned = denoiser(Identity())(signal, 180)
    assert cleaned.dtype == expected
    np.testing.assert_allclose(cleaned, signal, rtol=1e-6)
    np.testing.assert_allclose(denoiser(Identity())(signal.tolist(), 180), cleaned, rtol=1e-6)


def test_unit_and_level_make_no_difference():
    noisy = ecg(6, 360, noise=0.1)
    cleaned = denoiser(Smoother())(noisy, 360)
    np.testing.assert_allclose((denoiser(Smoother())(1024 + 200 * noisy, 360) - 1024) / 200, cleaned, atol=1e-5)


def test_the_model_gets_leads_less_their_slow_course_at_unit_scale(outside):
    seen = []

    class Watcher(nn.Module):
        def __call__(self, x, r_peak=None, r_mask=None):
            jax.debug.callback(lambda x: seen.append(np.array(x)), x)
            return x

    noisy = ecg(8, 180, noise=0.1) + np.arange(8 * 180)[:, None] / 100
    denoiser(Watcher(), devices=jax.devices()[:1])(noisy, 180)
    jax.effects_barrier()
    (windows,) = seen
    # Of window 3 the last 178 samples begin at 3·143 − 35.
    time, cut = np.arange(256), noisy[316:572]
    expected = cut - np.polynomial.polynomial.polyval(time, np.polynomial.polynomial.polyfit(time, cut, 2)).T
    np.testing.assert_allclose(windows[3], expected / expected.std(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rate", [250, 360])
def test_gaps_stay_and_do_not_smear(rate):
    whole = ecg(10, rate)
    noisy = whole.copy()
    noisy[500:560, 0] = np.nan
    noisy[1200:1203, 1] = [np.inf, np.nan, -np.inf]
    noisy[:40, 1] = np.nan
    cleaned = denoiser(Smoother())(noisy, rate)
    np.testing.assert_array_equal(np.isnan(cleaned), ~np.isfinite(noisy))
    there = np.isfinite(noisy)
    expected = denoiser(Smoother())(whole, rate)
    # Bridged by lines: what is left of a gap's presence is small, and a second away nothing.
    assert np.abs(cleaned - expected)[there].max() < 0.1
    far = np.r_[900:1000, 1600:2400]
    np.testing.assert_allclose(cleaned[far], expected[far], atol=2e-3)


def test_a_gap_is_bridged_by_a_line():
    noisy = np.full((1000, 1), 2.0)
    noisy[::2] += 1e-3  # not flat
    noisy[600:] += 1.0
    noisy[400:600] = np.nan
    recording = denoise._Recording(noisy, streaming.build_grid(360, 256))
    lead = recording._gaps[0].bridged(noisy[:, 0], 450, 550)
    line = np.interp(np.arange(450, 550), [399, 600], noisy[[399, 600], 0])
    np.testing.assert_allclose(lead, line, atol=1e-12)


def test_flat_and_saturated_stretches_stay_as_they_are():
    noisy = ecg(10, 360, noise=0.1)
    noisy[1000:1072, 0] = 0.7  # 0.2 s
    noisy[2000:2071, 0] = 0.7  # a sample less
    noisy[:, 1] = np.clip(noisy[:, 1], -2.4, None)
    low = np.flatnonzero(noisy[:, 1] == -2.4)
    runs = [run for run in np.split(low, np.flatnonzero(np.diff(low) > 1) + 1) if len(run) > 2]
    assert len(runs) > 5
    kept = np.zeros(noisy.shape, bool)
    kept[1000:1072, 0] = kept[np.concatenate(runs), 1] = True
    cleaned = denoiser(Zeros())(noisy, 360)
    np.testing.assert_array_equal(cleaned[kept], noisy[kept])
    np.testing.assert_array_equal(cleaned == noisy, kept)


def test_a_rounded_top_in_coarse_steps_is_not_saturated():
    steps = np.round(ecg(10, 1000, 1) * 20) / 20
    top = steps == steps.max()
    assert top.sum() > 30 and np.diff(np.flatnonzero(top)).min() == 1
    cleaned = denoiser(Zeros())(steps, 1000)
    assert (cleaned[top] != steps[top]).all()


def test_given_peaks_reach_the_model_where_they_are():
    noisy = ecg(20, 180, noise=0.05)
    # In one window, in two that are faded, at the ends, and two of them close together.
    peaks = np.array([0, 50, 90, 112, 1000, 1100, 3599])
    added = denoiser(Marker())(noisy, 180, peaks) - noisy
    np.testing.assert_array_equal(np.flatnonzero(np.abs(added).max(1) > 1e-3), peaks)
    # At half the rate a peak lies at twice the sample for the model.
    added = denoiser(Marker())(noisy[::2], 90, [700]) - noisy[::2]
    assert np.abs(added).max(1).argmax() == 700
    np.testing.assert_allclose(denoiser(Marker())(noisy, 180, []), noisy, atol=1e-6)


def test_peaks_beside_a_window_count_and_the_first_four():
    r_peak, r_mask = streaming.peaks_of_windows(np.array([83, 84, 110, 200, 300, 371, 372]), np.array([100, 5000]), 256)
    np.testing.assert_array_equal(r_mask, [[True] * 4, [False] * 4])
    np.testing.assert_array_equal(r_peak, [[-16, 10, 100, 200], [0] * 4])
    r_peak, r_mask = streaming.peaks_of_windows(np.array([371, 372]), np.array([100]), 256)
    np.testing.assert_array_equal(np.where(r_mask, r_peak, -1), [[271, -1, -1, -1]])


@pytest.mark.parametrize("sign", [1, -1])
def test_finds_r_peaks(sign):
    found = streaming.detect_peaks(sign * ecg(60, 180, noise=0.1))
    np.testing.assert_allclose(found, beats(60) * 180, atol=2)
    assert not len(streaming.detect_peaks(np.zeros((1000, 2))))


def test_detected_peaks_reach_the_model():
    noisy = ecg(30, 250, noise=0.02)
    added = np.abs(denoiser(Marker())(noisy, 250) - noisy).max(1)
    found = scipy.signal.find_peaks(added, height=0.03, distance=60)[0]
    np.testing.assert_allclose(found, beats(30) * 250, atol=3)


@pytest.mark.parametrize("rate", [250, 360])
def test_tells_the_r_peaks_that_it_finds(monkeypatch, rate):
    noisy = ecg(60, rate, noise=0.1)
    found = denoiser(Identity()).find_r_peaks(noisy, rate)
    np.testing.assert_allclose(found, beats(60) * rate, atol=3)
    monkeypatch.setattr(denoise, "_BLOCK_S", 5)
    np.testing.assert_array_equal(denoiser(Identity()).find_r_peaks(noisy, rate), found)
    assert not len(denoiser(Identity()).find_r_peaks(np.zeros((1000, 2)), rate))


@pytest.mark.parametrize("record", ["101", "106", "119", "203", "208"])
def test_finds_the_annotated_beats(physionet, record):
    leads, annotated, rate = heartbeats.read_recording(physionet / "mitdb" / "1.0.0", record)
    leads, annotated = leads[:108_000], annotated[annotated < 108_000]  # 5 minutes
    found = denoiser(Identity()).find_r_peaks(leads, rate)
    assert heartbeats.f1(heartbeats.count_matches(annotated, found, rate)) > 0.985


@pytest.mark.parametrize("rate", [250, 360])
def test_gate_holds_back_or_lets_go(rate, outside, monkeypatch):
    noisy = ecg(20, rate, noise=0.1) + np.sin(np.arange(20 * rate) / rate)[:, None]
    set_gate(monkeypatch, NONE, NONE)
    np.testing.assert_allclose(denoiser(Smoother(), gate=True)(noisy, rate), noisy, atol=1e-6)
    set_gate(monkeypatch, ALL, ALL)
    everything = denoiser(Smoother())(noisy, rate)
    np.testing.assert_allclose(denoiser(Smoother(), gate=True)(noisy, rate, []), everything, atol=1e-6)
    assert np.abs(everything - noisy).max() > 0.5
    # Drift goes alone.
    set_gate(monkeypatch, ALL, NONE)
    removed = noisy - denoiser(Smoother(), gate=True)(noisy, rate)
    assert removed.std() > 0.3 and np.abs(np.diff(removed, axis=0)).max() < 0.03


def test_r_peaks_keep_their_height(outside, monkeypatch):
    # In next to no noise all that the model would take off the R waves is spared, where they are known.
    clean = ecg(20, 180, noise=0.003)
    peaks = np.rint(beats(20) * 180).astype(int)
    set_gate(monkeypatch, NONE, ALL)
    kept, lowered = (np.abs(denoiser(Smoother(), gate=True)(clean, 180, told) - clean) for told in (peaks, []))
    height = np.ptp(clean, 0)
    assert np.all(lowered[peaks].min(0) > 0.02 * height)
    assert np.all(kept[peaks].max(0) < 0.004 * height)
    away = np.abs(np.arange(len(clean))[:, None] - peaks).min(1) > 0.12 * 180
    np.testing.assert_allclose(kept[away], lowered[away], atol=2e-4)
    assert lowered[away].max() > 0.004


@pytest.mark.parametrize(
    "signal, rate, r_peaks, message",
    [
        (np.zeros((0, 2)), 360, None, "0, 2"),
        (np.zeros(0), 360, None, "expected"),
        (np.zeros(1), 360, None, "one sample"),
        (np.zeros((100, 0)), 360, None, "100, 0"),
        (np.zeros((9, 9, 9)), 360, None, "9, 9, 9"),
        (5.0, 360, None, "expected"),
        (np.array(["a", "b"]), 360, None, "real numbers"),
        (np.zeros(100, complex), 360, None, "complex"),
        (np.array([None, 1]), 360, None, "object"),
        (np.zeros((2, 1000)), 360, None, "transpose"),
        (np.full(1000, np.nan), 360, None, "no samples"),
        (np.stack([np.arange(1000), np.full(1000, np.inf)], 1), 360, None, "no samples"),
        (np.arange(1000), 0, None, "sampling rate"),
        (np.arange(1000), -360, None, "50 to 5000"),
        (np.arange(1000), np.nan, None, "nan"),
        (np.arange(1000), 49, None, "49"),
        (np.arange(1000), 5001, None, "5001"),
        (np.arange(1000), "fast", None, "'fast'"),
        (np.arange(1000), None, None, "None"),
        (np.arange(1000), 360, [1000], "1000; expected 0 to 999"),
        (np.arange(1000), 360, [-1, 5], "has -1"),
        (np.arange(1000), 360, [1.5], "integers"),
        (np.arange(1000), 360, [[1], [2]], "2, 1"),
    ],
)
def test_bad_input_is_told_in_a_line(signal, rate, r_peaks, message):
    with pytest.raises(UserError, match=message) as raised:
        denoiser(Identity())(signal, rate, r_peaks)
    assert "\n" not in str(raised.value)


def test_models_of_other_windows_are_told():
    with pytest.raises(UserError, match="256 samples and 2 leads"):
        denoiser(nn.Dense(3))
    with pytest.raises(UserError, match="sampling rate"):
        denoiser(Identity(), sampling_rate=500.0)


def test_a_model_of_someone_elses_that_was_changed_is_another(model_alone):
    def scaled(factor):
        class Scaled(nn.Module):
            def __call__(self, x, r_peak=None, r_mask=None):
                return factor * x

        return Scaled()

    noisy, found = ecg(4, 360, noise=0.1), []
    for factor in (1.0, 0.5):
        assert repr(scaled(factor)) == repr(scaled(1.0))
        found.append(denoiser(scaled(factor))(noisy, 360))
    np.testing.assert_allclose(found[0], noisy, atol=1e-6)
    assert np.abs(found[1] - noisy).max() > 0.1


def test_weights_from_a_file(monkeypatch, tmp_path):
    from ralenet_jax import state

    config = ConfigDict({"model": {"name": "smoother"}, "data": {"database": "mitdb_recordings"}})
    monkeypatch.setattr(export, "load", lambda path: (config, {}))
    monkeypatch.setattr(state, "model_from_config", lambda config, axis: Smoother())
    noisy = ecg(4, 360, noise=0.1)
    found = Denoiser.from_file(tmp_path / "model.npz", gate=False)(noisy, 360)
    np.testing.assert_array_equal(found, denoiser(Smoother())(noisy, 360))


def test_models_trained_on_other_windows_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "load", lambda path: (ConfigDict({"data": {"database": "mitdb"}}), {}))
    with pytest.raises(UserError, match="trained on mitdb; expected one trained as configs/blind.py has it"):
        Denoiser.from_file(tmp_path / "model.npz")


def test_an_installation_without_weights_is_told(monkeypatch):
    monkeypatch.setattr(denoise, "_WEIGHTS", "weights/none.safetensors")
    with pytest.raises(UserError, match="no weights/none.safetensors"):
        Denoiser.from_pretrained()


def test_a_run_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(UserError, match="no run"):
        Denoiser.from_checkpoint(tmp_path)
