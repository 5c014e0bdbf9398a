"""Windows from anywhere in whole recordings, against the recordings themselves."""

import numpy as np
import pytest
import scipy.signal

from ralenet_jax import input_pipeline, main, recordings
from ralenet_jax.errors import UserError

N = 1000


@pytest.fixture
def two():
    """Two recordings of 1,000 samples, laid end to end: sample i holds i and −i; beats at 100, 300, 310, 980, 1010."""
    count = np.arange(2 * N, dtype=np.float32)
    start = np.array([0, 256, N, N + 256])
    level = np.array([1, 1, 2, 2], np.float32)
    signal = np.stack([count, -count], 1)
    return recordings.Recordings(signal, signal / 10, np.array([100, 300, 310, 980, 1010]), start, level)


def test_windows_hold_the_samples_from_their_start_on(two):
    batch = two.batch(np.array([1, 2]), np.array([7, 255]))
    for window, first in zip(batch["clean"], (263, N + 255), strict=True):
        np.testing.assert_array_equal(window[:, 0], np.arange(first, first + 256))
        np.testing.assert_array_equal(window[:, 1], -window[:, 0])
    np.testing.assert_array_equal(batch["drift"], batch["clean"] / 10)
    assert batch["id"].tolist() == [263, N + 255] and batch["level"].tolist() == [1, 2]
    np.testing.assert_array_equal(two.batch(np.array([1]))["clean"][0, :, 0], np.arange(256, 512))
    assert len(two) == 4 and two.shape == (256, 2)


def test_r_peaks_in_reach_are_told_from_the_windows_start(two):
    batch = two.batch(np.array([0, 0, 1, 3]), np.array([0, 45, 0, 0]))
    told = [peaks[mask].tolist() for peaks, mask in zip(batch["r_peak"], batch["r_mask"], strict=True)]
    # 16 samples outside still count: from 45 to 301 lie 100, 300 and 310.
    assert told == [[100], [55, 255, 265], [44, 54], []]
    assert batch["r_peak"].dtype == np.int32 and batch["r_peak"].shape == (4, recordings.MOST_PEAKS)


def config(data_dir, *more):
    return main.load_config("blind", [f"data.dir={str(data_dir)!r}", *more])


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_prepared_recordings_are_centred_and_hold_the_beat_windows(data_dir, split):
    whole = input_pipeline.read_split(config(data_dir), split)
    beats = input_pipeline.read_split(main.load_config("honest", [f"data.dir={str(data_dir)!r}"]), split)
    clean = beats.millivolts()[0]
    # The window around the first beat, of which every second sample is here, but for its recording's mean level.
    peak = whole.peaks[whole.peaks >= 64][0]
    found = whole.signal[peak - 64 : peak + 64][10:-10]
    ways = [scipy.signal.resample_poly(np.roll(clean, -odd, 0), 1, 2)[10:-10] for odd in (-1, 0, 1)]
    assert min(np.abs(found - way - (found - way).mean(0)).max() for way in ways) < 0.02
    np.testing.assert_allclose(whole.drift.mean(0), 0, atol=0.05)
    assert whole.drift.std() < whole.signal.std()
    of_first = whole.start[whole.level == whole.level[0]]
    end = of_first[-1] + 2 * recordings.WINDOW
    level = np.sqrt(np.mean(np.square(whole.signal[:end])))
    assert whole.level[0] == pytest.approx(level, rel=0.05)
    assert len(whole) == len(whole.start) > 4


def test_no_window_reaches_into_the_next_recording(data_dir):
    whole = input_pipeline.read_split(config(data_dir), "train")
    borders = np.flatnonzero(np.diff(whole.start) > recordings.WINDOW)
    assert len(borders) >= 1
    for border in borders:
        assert whole.start[border] + 2 * recordings.WINDOW <= whole.start[border + 1]


def test_a_window_begins_elsewhere_in_every_epoch(two):
    indices = np.array([[0, 1], [2, 3]])
    first, same, other = (input_pipeline.train_block(two, indices, 2, seed=1, epoch=epoch)["id"] for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    assert np.all((first.swapaxes(0, 1).reshape(4) - two.start[[0, 1, 2, 3]]) < 256)


def test_recordings_are_never_split_at_random(data_dir):
    with pytest.raises(UserError, match="mitdb_recordings are split by record; set protocol='honest', not 'paper'"):
        input_pipeline.read_split(config(data_dir, "protocol='paper'"), "train")


def test_recordings_are_never_streamed(data_dir):
    with pytest.raises(UserError, match="mitdb_recordings are held whole in memory; set data.stream=False"):
        input_pipeline.open_split(config(data_dir, "data.stream=True"), "train")
