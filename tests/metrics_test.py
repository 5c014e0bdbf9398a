import numpy as np
import pytest

from ralenet_jax import metrics


@pytest.fixture(scope="module")
def windows():
    """Clean, noisy and denoised windows `[5, 256, 2]`; leads of unlike size, and an offset in what was denoised."""
    rng = np.random.default_rng(0)
    clean = rng.standard_normal((5, 256, 2)) * [1.5, 0.4]
    noisy = clean + rng.standard_normal(clean.shape)
    denoised = 0.9 * clean + 0.1 * rng.standard_normal(clean.shape) + 0.05
    return [window.astype(np.float32) for window in (clean, noisy, denoised)]


def definitions(y, given, y_hat):
    """The published definitions for one window `[L, C]`, in float64, with the sums written out."""
    y, given, y_hat = (window.astype(np.float64).ravel() for window in (y, given, y_hat))
    snr_out = 10 * np.log10(y @ y / ((y - y_hat) @ (y - y_hat)))
    snr_in = 10 * np.log10(y @ y / ((y - given) @ (y - given)))
    return {
        "snr_db": snr_out,
        "snr_improvement_db": snr_out - snr_in,
        "rmse": np.sqrt(np.mean((y - y_hat) ** 2)),
        "prd": 100 * np.linalg.norm(y - y_hat) / np.linalg.norm(y),
        "ssd": np.linalg.norm(y - y_hat) ** 2,
        "mad": np.abs(y - y_hat).max(),
        "cosine": np.dot(y, y_hat) / (np.linalg.norm(y) * np.linalg.norm(y_hat)),
        "signal_energy": y @ y,
        "error_energy": (y - y_hat) @ (y - y_hat),
    }


def test_measures_are_the_published_ones(windows):
    found = metrics.window_metrics(*windows)
    expected = [definitions(*window) for window in zip(*windows, strict=True)]
    for name in expected[0]:
        values = [one[name] for one in expected]
        assert found[name].shape == (5,)
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_window_worked_by_hand():
    clean, noisy, denoised = (np.zeros((1, 256, 2), np.float32) for _ in range(3))
    clean[0, 100], noisy[0, 100], denoised[0, 100] = (3, 4), (3, 0), (3, 4)  # power 25; error of the noisy window 16
    denoised[0, 7, 1] = -0.5  # error 0.25
    found = {name: float(value[0]) for name, value in metrics.window_metrics(clean, noisy, denoised).items()}
    assert found["snr_db"] == pytest.approx(20)  # 25 / 0.25
    assert found["snr_improvement_db"] == pytest.approx(20 - 10 * np.log10(25 / 16), abs=1e-5)
    assert found["rmse"] == pytest.approx(np.sqrt(0.25 / 512))
    assert found["prd"] == pytest.approx(10)
    assert found["ssd"] == found["error_energy"] == 0.25
    assert found["mad"] == 0.5
    assert found["cosine"] == pytest.approx(25 / np.sqrt(25 * 25.25))


def test_perfect_output_and_empty_window_give_finite_figures(windows):
    clean, noisy, _ = windows
    found = metrics.window_metrics(clean, noisy, clean)
    assert np.all(np.asarray(found["snr_db"]) > 150)
    np.testing.assert_allclose(found["cosine"], 1, rtol=1e-6)
    for name in ("rmse", "prd", "ssd", "mad", "qrs_amplitude_error", "st_level_error"):
        np.testing.assert_array_equal(found[name], 0, err_msg=name)
    empty = np.zeros_like(clean)
    for name, value in metrics.window_metrics(empty, noisy, empty).items():
        assert np.isfinite(value).all(), name


def test_qrs_amplitude_is_that_of_the_central_beat():
    clean = np.zeros((1, 256, 2), np.float32)
    clean[0, 128], clean[0, 134] = (1.0, 0.5), (-0.2, -0.1)  # R, and S 17 ms after it
    smaller = clean * [0.7, 1.0]
    smaller[0, 20] = 5.0  # what is far from the beat does not count, nor does an offset
    found = metrics.window_metrics(clean, clean, np.float32(smaller + 0.3))
    assert float(found["qrs_amplitude_error"][0]) == pytest.approx((1.2 * 0.3 + 0) / 2, abs=1e-6)


def test_st_level_is_measured_against_the_level_before_the_beat():
    clean = np.zeros((1, 256, 2), np.float32)
    clean[0, 128] = 1.0
    raised = clean.copy()
    raised[0, 150:190] = (0.2, -0.1)  # 60 to 170 ms after the R peak
    found = metrics.window_metrics(clean, clean, raised + np.float32(0.3))
    assert float(found["st_level_error"][0]) == pytest.approx((0.2 + 0.1) / 2, abs=1e-6)


def test_loss_is_the_mean_square(windows):
    clean, _, denoised = windows
    expected = np.mean((clean.astype(np.float64) - denoised) ** 2)
    np.testing.assert_allclose(metrics.squared_error(clean, denoised), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 256, 1), (1, 256, 2), (5, 255, 2), (256, 2)])
def test_unlike_shapes_are_refused(windows, shape):
    clean, noisy, _ = windows
    other = np.zeros(shape, np.float32)
    for given in ((clean, noisy, other), (clean, other, noisy), (other, clean, noisy)):
        with pytest.raises(ValueError, match=r"one shape \[B, L, C\]"):
            metrics.window_metrics(*given)
    for measure in (metrics.snr_db, metrics.squared_error):
        with pytest.raises(ValueError, match="shape"):
            measure(clean, other)


def test_windows_without_a_batch_axis_are_refused():
    window = np.zeros((256, 2), np.float32)
    with pytest.raises(ValueError, match="shape"):
        metrics.snr_db(window, window)
