import numpy as np
import pytest
import wfdb.io.annotation

from data_prep import windows


def test_beat_symbols_are_those_of_wfdb():
    labels = wfdb.io.annotation.ann_labels
    beats = {label.symbol for label in labels if wfdb.io.annotation.is_qrs[label.label_store]}
    assert windows.BEAT_SYMBOLS == beats
    assert len(windows.BEAT_SYMBOLS) == 20


def test_is_beat_leaves_rhythm_noise_and_waves_out():
    found = windows.is_beat(["N", "+", "V", "~", "/", "|", '"', "x", "p", "Q"])
    np.testing.assert_array_equal(found, [True, False, True, False, True, False, False, False, False, True])
    assert windows.is_beat([]).dtype == bool


def test_a_window_may_touch_the_ends_but_not_leave():
    peaks = np.array([0, 127, 128, 500, 872, 873, 999])
    found = windows.has_room(peaks, length=1000)
    np.testing.assert_array_equal(found, [False, False, True, True, True, False, False])
    assert not windows.has_room(np.array([128]), length=255).any()


def test_the_peak_stands_at_sample_128():
    signal = np.stack([np.arange(1000), -np.arange(1000)], axis=1).astype(np.int16)
    found = windows.cut(signal, np.array([128, 300, 872]))
    assert found.shape == (3, 256, 2)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found[:, 128, 0], [128, 300, 872])
    np.testing.assert_array_equal(found[:, 0, 0], [0, 172, 744])
    np.testing.assert_array_equal(found[:, 255, 1], [-255, -427, -999])
    assert windows.cut(signal, np.array([], dtype=int)).shape == (0, 256, 2)


@pytest.mark.parametrize("peak", [127, 873])
def test_a_window_outside_the_record_is_refused(peak):
    with pytest.raises(ValueError, match="128"):
        windows.cut(np.zeros((1000, 2)), np.array([peak]))
