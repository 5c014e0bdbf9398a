"""Recordings by hand, for the tests of the readers, and what the readers make of them."""

import datetime
import warnings
import wave

import numpy as np
import pytest
import wfdb

from ralenet_jax import readers
from ralenet_jax.errors import UserError

WAVE = np.round(np.sin(np.arange(500) / 9) * 900).astype(np.int64)  # digital values


def written(recording, out, change=0.25, channel=0):
    """Writes a recording with one channel higher by a constant; returns it read again."""
    signal = recording.signal.copy()
    signal[:, channel] += change
    files = readers.write(recording, signal, out)
    assert sorted(files) == sorted(file for file in out.parent.iterdir() if file.stem == out.stem)
    return readers.read(out, recording.sampling_rate)


def refusal(folder, files, rate=None):
    """Writes files by name, reads the first; what the user is told."""
    for file, data in files.items():
        (folder / file).write_bytes(data)
    first = next(iter(files))
    with warnings.catch_warnings(), pytest.raises(UserError) as caught:
        warnings.simplefilter("ignore")  # as in a command
        readers.read(folder / first, rate)
    told = str(caught.value)
    assert "\n" not in told and first in told
    return told


def text_header(folder, text, *signals):
    """A WFDB record by hand: its header, and signal files of bytes."""
    (folder / "r.hea").write_text(text)
    for name, data in signals:
        (folder / name).write_bytes(data)
    return folder / "r.hea"


def other_channels(folder):
    signal = np.stack([WAVE / 1000, WAVE / 10 + 80, WAVE / 500], 1)
    described = {"fmt": ["16"] * 3, "adc_gain": [1000.0, 20.0, 500.0], "baseline": [3, -100, 7]}
    when = {"base_time": datetime.time(11, 12, 13), "base_date": datetime.date(2020, 3, 4), "comments": ["of ours"]}
    names, units = ["II", "ABP", "RESP"], ["mV", "mmHg", "mV"]
    wfdb.wrsamp("r", 250.5, units, names, signal, write_dir=str(folder), **described, **when)
    return folder / "r.hea"


def wav_file(path, width, values, rate=300):
    with wave.open(str(path), "wb") as file:
        file.setparams((2, width, rate, 0, "NONE", ""))
        file.writeframes(values)
