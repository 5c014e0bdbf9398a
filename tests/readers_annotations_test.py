"""Annotations by hand and by wfdb; files that wfdb does not come back from."""

import struct

import numpy as np
import pytest
import wfdb

from ralenet_jax import heartbeats, readers_annotations
from ralenet_jax.errors import UserError


def pairs(*values):
    """Pairs of bytes, each from what it says and its time or length."""
    return struct.pack(f"<{len(values)}H", *(code << 10 | value for code, value in values))


def read(folder, data):
    (folder / "r.atr").write_bytes(data)
    return readers_annotations.read(folder / "r.atr")


def test_times_add_up_over_fields_texts_and_skips(tmp_path):
    text = b"(AFIB\0"
    data = pairs((28, 5), (63, 5)) + text + pairs((1, 1000), (61, 3), (60, 1), (62, 1), (59, 0))
    data += struct.pack("<HH", 1, 2) + pairs((5, 7), (59, 0)) + struct.pack("<HH", 0xFFFF, 0xFFFF)
    data += pairs((55, 0), (0, 0))
    found = read(tmp_path, data)
    np.testing.assert_array_equal(found.sample, [5, 1005, 1005 + 65538 + 7, 1005 + 65538 + 7 - 1])
    np.testing.assert_array_equal(found.code, [28, 1, 5, 55])
    assert found.symbol == ["+", "N", "V", ""]


def test_they_are_what_wfdb_reads_and_writes(tmp_path):
    samples = np.cumsum(np.random.default_rng(0).integers(1, 3000, 500))
    symbols = np.random.default_rng(1).choice(list("NVAL+~|"), 500).tolist()
    notes = ["(N" if symbol == "+" else "" for symbol in symbols]
    wfdb.wrann("r", "atr", samples, symbols, aux_note=notes, fs=360, write_dir=str(tmp_path))
    found = readers_annotations.read(tmp_path / "r.atr")
    np.testing.assert_array_equal(found.sample, samples)
    assert found.symbol == symbols


def test_real_annotations_are_what_wfdb_reads(physionet):
    for path in sorted(physionet.glob("mitdb/1.0.0/*.atr"))[::7]:
        found, expected = readers_annotations.read(path), wfdb.rdann(str(path.with_suffix("")), "atr")
        np.testing.assert_array_equal(found.sample, expected.sample)
        assert found.symbol == list(expected.symbol)


def test_notes_that_wfdb_does_not_come_back_from(tmp_path):
    data = pairs((22, 0), (63, 8)) + b"## mine " + pairs((1, 9), (0, 0))
    np.testing.assert_array_equal(read(tmp_path, data).sample, [9])


BAD = {
    "odd": b"123",
    "empty": b"",
    "cut skip": pairs((1, 5), (59, 0), (0, 0)),
    "before the start": pairs((59, 0)) + struct.pack("<HH", 0xFFFF, 0) + pairs((1, 0), (0, 0)),
    "long": bytes(2**24 + 2),
    "far": (pairs((59, 0)) + struct.pack("<HH", 0x7FFF, 0xFFFF)) * 2 + pairs((1, 0), (0, 0)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_annotations(tmp_path, name):
    with pytest.raises(ValueError):
        read(tmp_path, BAD[name])


def test_recordings_with_bad_annotations_or_headers_are_one_line(tmp_path):
    samples = np.arange(400, dtype="<i2")
    (tmp_path / "r.dat").write_bytes(samples.tobytes())
    (tmp_path / "r.hea").write_text("r 1 250 400\nr.dat 16 100\n")
    (tmp_path / "r.atr").write_bytes(pairs((1, 9), (22, 7), (55, 3), (0, 0)))
    leads, beats, rate = heartbeats.read_recording(tmp_path, "r")
    np.testing.assert_allclose(leads[:, 0], samples / 100, rtol=1e-6)
    assert (beats.tolist(), rate) == ([9], 250)
    for name, data in (("r.atr", b"123"), ("r.hea", b"r 1 250 400\n../r.dat 16 100\n"), ("r.hea", b"r 9999999 250\n")):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="^recording .*r is not readable[^\n]*$"):
            heartbeats.read_recording(tmp_path, "r")
        (tmp_path / name).write_bytes(before)
