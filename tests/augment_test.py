"""What windows of recordings meet in training, measured on many of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ralenet_jax import augment, noise

B, L = 2000, 256
LEVEL = 0.5


@pytest.fixture
def steady(monkeypatch):
    """Windows keep their slow course."""
    monkeypatch.setattr(augment, "wander", jnp.zeros_like)


@pytest.fixture(scope="module")
def recordings():
    random = np.random.default_rng(0)
    scale = np.array([0.2, 1.0, 3.0])[:, None, None]
    return (random.standard_normal((3, 4000, 2)) * scale + 5 * scale).astype(np.float32)


def batch():
    time = np.arange(L)
    clean = np.stack([np.sin(time / 9), 0.3 + 0.2 * np.cos(time / 5)], 1).astype(np.float32)
    peaks = np.tile(np.array([60, 200, 0, 0], np.int32), (B, 1))
    return {
        "clean": np.tile(clean, (B, 1, 1)),
        "drift": np.zeros((B, L, 2), np.float32),
        "level": np.full(B, LEVEL, np.float32),
        "r_peak": peaks,
        "r_mask": np.tile(np.array([True, True, False, False]), (B, 1)),
    }


def mixed(recordings, kind, low, high=None, span=(0, 2000), **changed):
    recordings, chosen = augment.unit_noise(jnp.asarray(recordings), noise.condition(kind, low, high, span))
    keys = jax.random.split(jax.random.key(0), B)
    mix = jax.jit(lambda *given: augment.mix(*given))  # a trace of its own, whatever is patched
    return jax.device_get(mix(recordings, chosen, batch() | changed, keys))


@pytest.mark.parametrize("kind", ["bw", "em", "emb"])
def test_noise_has_the_power_of_the_ratio_to_the_recording(recordings, kind, steady):
    scaled, chosen = augment.unit_noise(jnp.asarray(recordings), noise.condition(kind, 6.0, None, (0, 2000)))
    assert jnp.abs(scaled[:, :2000].mean((1,))).max() < 1e-5
    np.testing.assert_allclose(jnp.square(scaled[:, :2000]).mean((1, 2)), 1, rtol=1e-5)
    mixture, _ = mixed(recordings, kind, 6.0)
    power = np.mean(np.square((mixture.noisy - mixture.clean) * mixture.scale), (1, 2))
    # Most windows have no hum and no white noise on top: their median is the ratio's.
    assert np.median(power) == pytest.approx(LEVEL**2 / 10**0.6, rel=0.06)


def test_half_of_the_windows_are_in_the_lowest_quarter_of_the_range(recordings, steady):
    mixture, _ = mixed(recordings, "bw", -6.0, 24.0)
    power = np.mean(np.square((mixture.noisy - mixture.clean) * mixture.scale), (1, 2))
    ratio_db = 10 * np.log10(LEVEL**2 / power)
    # Hum and white noise shift some of them.
    assert np.mean(ratio_db < 1.5) == pytest.approx(0.5, abs=0.08)
    assert -10 < ratio_db.min() and 10 < ratio_db.max() < 26


def test_emb_keeps_the_proportions_of_its_parts(recordings):
    chosen = augment.unit_noise(jnp.asarray(recordings), noise.condition("emb", 0.0, None, (0, 4000)))[1]
    weights = np.asarray(chosen.weights)[0]
    np.testing.assert_allclose(weights / weights[1], [0.2, 1, 3], rtol=0.05)
    assert np.sum(weights**2) == pytest.approx(1)


def test_some_windows_have_no_noise_at_all_and_some_hum_and_white_noise(recordings, steady):
    mixture, _ = mixed(recordings, "none", 0.0)
    added = (mixture.noisy - mixture.clean) * mixture.scale
    silent = np.max(np.abs(added), (1, 2)) < 1e-6
    assert np.mean(silent) == pytest.approx((1 - augment._HUM) * (1 - augment._WHITE), abs=0.04)
    spectrum = np.abs(np.fft.rfft(added[~silent], axis=1)).sum(2)
    strongest = np.fft.rfftfreq(L, 1 / 180)[spectrum.argmax(1)]
    at_mains = np.minimum(abs(strongest - 50), abs(strongest - 60)) < 1
    assert 0.3 < np.mean(at_mains) < 0.7
    assert 0.3 < np.mean(abs(strongest[at_mains] - 50) < 1) < 0.7
    rms = np.sqrt(np.mean(np.square(added[~silent]), (1, 2))) / LEVEL
    assert rms.min() > 10 ** (-31 / 20) and rms.max() < 2


def test_leads_change_order_gain_and_polarity_and_some_are_single(recordings, steady):
    mixture, _ = mixed(recordings, "none", 0.0)
    clean = mixture.clean * mixture.scale
    given = batch()["clean"][0]
    single = np.all(clean[..., 0] == clean[..., 1], 1)
    assert np.mean(single) == pytest.approx(augment._SINGLE, abs=0.04)
    # Each lead is one of the two, times its gain.
    gains = np.einsum("bl,lc->bc", clean[..., 0], given) / np.square(given).sum(0)
    which = np.argmin([np.abs(clean[..., 0] - gains[:, [c]] * given[:, c]).max(1) for c in (0, 1)], 0)
    gain = gains[np.arange(B), which]
    assert np.abs(clean[..., 0] - gain[:, None] * given[:, which].T).max() < 1e-5
    assert np.mean(which) == pytest.approx(0.5, abs=0.05) and np.mean(gain < 0) == pytest.approx(0.5, abs=0.05)
    assert np.abs(gain).min() >= 0.5 - 1e-6 and np.abs(gain).max() <= 2 + 1e-5 and np.abs(gain).std() > 0.3
    np.testing.assert_array_equal(mixture.noisy[single][..., 0], mixture.noisy[single][..., 1])


def parabolas():
    time = np.linspace(-1, 1, L)
    return np.stack([3 + 2 * time - time**2, 0.5 - time], 1)


def test_a_slow_course_is_the_nearest_parabola():
    wave = np.random.default_rng(0).standard_normal((5, L, 2))
    time = np.arange(L)
    for window, course in zip(wave, augment.wander(wave), strict=True):
        nearest = np.polynomial.polynomial.polyfit(time, window, 2)
        np.testing.assert_allclose(course, np.polynomial.polynomial.polyval(time, nearest).T, atol=1e-5)
    np.testing.assert_allclose(augment.wander(parabolas()), parabolas(), atol=1e-5)
    np.testing.assert_allclose(augment.wander(jnp.asarray(wave, jnp.float32)), augment.wander(wave), atol=1e-5)


def test_the_model_gets_leads_less_their_slow_course_at_unit_scale(recordings):
    mixture, _ = mixed(recordings, "em", -6.0, 24.0)
    np.testing.assert_allclose(np.mean(np.square(mixture.noisy), 1), 1, rtol=1e-3)
    assert np.abs(augment.wander(mixture.noisy)).max() < 1e-4
    assert np.all(mixture.offset == 0) and mixture.scale.shape == (B, 1, 2)
    np.testing.assert_allclose(augment.standardise(mixture.noisy * 7 + parabolas())[0], mixture.noisy, atol=1e-4)


def test_the_target_is_the_window_without_its_recordings_drift(recordings, steady):
    drift = np.broadcast_to(parabolas(), (B, L, 2)).astype(np.float32)
    beats = batch()["clean"]
    mixture, _ = mixed(recordings, "none", 0.0, clean=beats + drift, drift=drift)
    target = mixture.clean * mixture.scale
    # Of one lead and its gain: what is left of the target beside the lead without drift.
    for lead in range(2):
        share = np.einsum("blc,ld->bcd", target, beats[0]) / np.square(beats[0]).sum(0)
        left = np.min([np.abs(target - share[:, None, :, d] * beats[0][:, d, None]).max(1) for d in (0, 1)], 0)
        assert left[:, lead].max() < 1e-4


def test_errors_count_by_the_strength_of_the_window(recordings):
    mixture, _ = mixed(recordings, "em", -6.0, 24.0)
    np.testing.assert_allclose(mixture.weight, np.clip(mixture.scale / LEVEL, 0.5, 2), rtol=1e-5)
    assert mixture.weight.min() < 0.8 and mixture.weight.max() == 2


def test_r_peaks_are_told_as_a_detector_would(recordings):
    _, peaks = mixed(recordings, "none", 0.0)
    told, there = peaks["r_peak"] - batch()["r_peak"], peaks["r_mask"]
    assert not there[:, 2:].any() and np.mean(~there[:, :2]) == pytest.approx(augment._MISSED, abs=0.02)
    near = np.abs(told[:, :2]) <= augment._JITTER
    assert np.mean(near) == pytest.approx(1 - augment._MOVED * (1 - 7 / 101), abs=0.02)
    assert np.abs(told[:, :2]).max() > 25
