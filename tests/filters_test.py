"""The filters against the same computed one coefficient after another, and cases worked by hand."""

import cmath
import math

import numpy as np
import pytest
import pywt

from ralenet_jax.errors import UserError
from ralenet_jax.filters import FILTERS, dwt, fft

WINDOWS = np.random.default_rng(0).standard_normal((5, 256, 2)).cumsum(1)


def dwt_of_lead(lead, level):
    coefficients = pywt.wavedec(lead, "db8", "symmetric", level)
    for band in coefficients[1:]:
        threshold = 0.04 * max(band)
        band[:] = [math.copysign(max(abs(value) - threshold, 0), value) for value in band]
    return pywt.waverec(coefficients, "db8", "symmetric")


@pytest.mark.parametrize(("length", "level"), [(256, 4), (128, 3), (255, 4), (239, 3), (14, 0)])
def test_wavelet_thresholds_stand_for_each_window_and_lead_and_band(length, level):
    # 15·2^level samples are needed for a level: the wavelet's filter has 16 coefficients.
    windows = WINDOWS[:, :length]
    expected = [[dwt_of_lead(window[:, lead], level)[:length] for lead in range(2)] for window in windows]
    np.testing.assert_allclose(dwt(windows), np.transpose(expected, (0, 2, 1)), rtol=1e-9, atol=1e-9)


def test_the_largest_wavelet_coefficient_is_the_largest_by_sign():
    # A spike upwards has another largest coefficient than the same spike downwards, so other thresholds.
    spike = np.zeros((1, 256, 1))
    spike[0, 128] = 1.0
    bands = pywt.wavedec(spike[0, :, 0], "db8", "symmetric", 4)[1:]
    assert all(abs(band.max() + band.min()) > 0.1 * band.max() for band in bands)
    assert np.abs(dwt(-spike) + dwt(spike)).max() > 1e-3


def test_the_approximation_is_kept():
    # A constant has no details.
    constant = np.array([5.0, -3.0]) * np.ones((1, 256, 1))
    np.testing.assert_allclose(dwt(constant), constant, rtol=1e-12)


def cosines(*amplitudes_and_bins):
    time = np.arange(256) / 256
    return sum(amplitude * np.cos(2 * np.pi * number * time) for amplitude, number in amplitudes_and_bins)


def test_weak_frequencies_are_left_out_by_hand():
    # 0.039 of the strongest goes and 0.041 stays, also in the lead without the strongest.
    leads = cosines((1.0, 4), (0.039, 30), (0.041, 50)), cosines((0.039, 7), (0.041, 9))
    expected = cosines((1.0, 4), (0.041, 50)), cosines((0.041, 9))
    np.testing.assert_allclose(fft(np.stack(leads, 1)[None])[0], np.stack(expected, 1), atol=1e-12)


@pytest.mark.parametrize("length", [32, 33])
def test_spectrum_against_the_sums_of_its_definition(length):
    window = WINDOWS[0, :length]
    turn = [cmath.exp(-2j * cmath.pi * i / length) for i in range(length)]
    matrix = np.array([[turn[i * k % length] for i in range(length)] for k in range(length)])
    spectrum = matrix @ window
    spectrum[np.abs(spectrum) < 0.04 * np.abs(spectrum).max()] = 0
    assert 0 < np.count_nonzero(spectrum) < spectrum.size
    np.testing.assert_allclose(fft(window[None])[0], (matrix.conj().T @ spectrum).real / length, atol=1e-9)


@pytest.mark.parametrize("name", FILTERS)
def test_windows_stand_for_themselves_at_any_scale(name):
    denoise = FILTERS[name]
    whole = denoise(WINDOWS)
    assert np.abs(whole - WINDOWS).max() > 1e-2
    scale = np.array([1e-3, 1.0, 7.0, 1e3, 1e6])[:, None, None]
    np.testing.assert_allclose(denoise(WINDOWS * scale), whole * scale, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(denoise(WINDOWS[2:3, :, ::-1])[0], whole[2, :, ::-1], rtol=1e-9, atol=1e-9)


def test_leads_share_the_threshold_of_the_spectrum_alone():
    louder = WINDOWS * np.array([1.0, 100.0])
    np.testing.assert_allclose(dwt(louder)[..., 0], dwt(WINDOWS)[..., 0], rtol=1e-9, atol=1e-9)
    assert np.abs(fft(louder)[..., 0] - fft(WINDOWS)[..., 0]).max() > 1e-2


@pytest.mark.parametrize("name", FILTERS)
def test_precision_is_kept_and_the_input_left_alone(name):
    given = WINDOWS.astype(np.float32)
    copy = given.copy()
    denoised = FILTERS[name](given)
    assert denoised.dtype == np.float32
    np.testing.assert_array_equal(given, copy)
    np.testing.assert_allclose(denoised, FILTERS[name](WINDOWS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FILTERS)
def test_a_lead_that_is_off_stays_so(name):
    np.testing.assert_array_equal(FILTERS[name](np.zeros((2, 256, 2))), 0)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("windows", [np.zeros((256, 2)), np.zeros((1, 0, 2)), np.zeros((1, 256, 2), int)])
def test_what_is_no_window_is_refused(name, windows):
    with pytest.raises(UserError, match=r"expected float \[B, L, C\]"):
        FILTERS[name](windows)
