import numpy as np
import pytest
import wfdb

from ralenet_jax import heartbeats
from ralenet_jax.errors import UserError


@pytest.fixture(scope="module")
def recordings_dir(data_dir):
    return data_dir.parent / "simulated" / "mitdb" / "1.0.0"


def test_windows_cover_the_recording_and_stand_on_the_peaks():
    peaks = np.array([50, 400, 460, 1500, 1999])
    starts = heartbeats.window_starts(peaks, 2000, 256)
    assert starts[0] == 0 and starts[-1] == 2000 - 256
    assert np.all(np.diff(starts) <= 128)
    assert {400 - 128, 460 - 128, 1500 - 128} <= set(starts.tolist())


@pytest.mark.parametrize("peaks", [np.array([], int), np.array([300, 640, 1001])])
def test_cross_fade_gives_back_what_the_windows_agree_on(peaks):
    # Every window of 256 samples holds whole periods, so its mean is zero and nothing is taken away.
    time = np.arange(1700)
    clean = np.stack([np.sin(2 * np.pi * time / 64), 3 * np.cos(2 * np.pi * time / 32)], 1)
    np.testing.assert_allclose(heartbeats.clean_recording(lambda windows: windows, clean, peaks, 256), clean, atol=1e-5)


def test_windows_reach_the_denoiser_normalised_and_in_full_batches():
    seen = []

    def denoise(windows):
        seen.append(windows)
        return windows

    noisy = np.random.default_rng(0).normal(5, 3, (40_000, 2))
    heartbeats.clean_recording(denoise, noisy, np.array([], int), 256)
    windows = np.concatenate(seen)
    assert {batch.shape for batch in seen} == {(256, 256, 2)}
    np.testing.assert_allclose(windows.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(np.mean(np.square(windows), (1, 2)), 1, rtol=1e-5)


def test_noise_has_one_scale_for_the_recording_and_is_laid_end_to_end():
    rng = np.random.default_rng(1)
    clean, recordings = rng.normal(2, 1, (1000, 2)), rng.normal(0, 1, (3, 500, 2))
    centred, noisy = heartbeats.add_noise(clean, recordings, "emb", -6.0)
    np.testing.assert_allclose(centred.mean(0), 0, atol=1e-12)
    added = noisy - centred
    np.testing.assert_allclose(10 * np.log10(np.mean(centred**2) / np.mean(added**2)), -6, atol=1e-9)
    np.testing.assert_allclose(added[:500], added[500:], atol=1e-12)
    expected = recordings.sum(0) - recordings.sum(0).mean(0)
    np.testing.assert_allclose(added[:500] / expected, np.full((500, 2), added[0, 0] / expected[0, 0]), rtol=1e-6)
    np.testing.assert_array_equal(heartbeats.add_noise(clean, recordings, "none", 0.0)[1], centred)


def test_matches_are_counted_within_150_ms():
    # 54 samples at 360 Hz: 140 matches 100, 1060 does not match 1000, 2000 is missed, 3000 was not there.
    matches = heartbeats.count_matches(np.array([100, 1000, 2000]), np.array([140, 1060, 3000]), 360)
    np.testing.assert_array_equal(matches, [1, 3, 3])
    assert heartbeats.f1(matches) == pytest.approx(1 / 3)
    np.testing.assert_array_equal(heartbeats.count_matches(np.array([100]), np.array([], int), 360), [0, 1, 0])


def test_reads_beats_and_millivolts(recordings_dir):
    leads, beats, rate = heartbeats.read_recording(recordings_dir, "100")
    annotation = wfdb.rdann(str(recordings_dir / "100"), "atr")
    assert rate == 360 and leads.shape[1] == 2
    np.testing.assert_array_equal(
        beats, [s for s, c in zip(annotation.sample, annotation.symbol, strict=True) if c in "NV"]
    )


def test_missing_recording_is_named(tmp_path):
    with pytest.raises(UserError, match="100 is not readable"):
        heartbeats.read_recording(tmp_path, "100")


def test_strong_noise_costs_heartbeats_and_none_does_not(recordings_dir):
    clean = heartbeats.read_recording(recordings_dir, "100")[0]
    noise = np.random.default_rng(2).normal(0, 1, (3, len(clean), 2))
    seen = []
    found = heartbeats.evaluate_recordings(
        lambda windows: windows, recordings_dir, ["100"], noise, [("ma", -10.0), ("none", 0.0)], 256, seen.append
    )
    assert set(found) == {"ma@-10", "none@0"} and len(seen) == 1
    assert found["none@0"]["noisy"] == found["none@0"]["clean"] > 0.9
    assert found["ma@-10"]["noisy"] < found["ma@-10"]["clean"] - 0.05
    assert found["none@0"]["denoised"] > 0.9
