"""EDF+ files by hand: what is kept byte by byte, and what is refused."""

import re
import struct

import edfio
import numpy as np
import pytest
import wfdb
from made_recordings import WAVE, refusal

from ralenet_jax import readers
from ralenet_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("small_blocks")
LABELS = ("ECG I", "SpO2", "Resp", "EDF Annotations")
COUNTS = (100, 1, 100, 30)  # samples in a data record of half a second


def packed(values, width=2):
    return b"".join(int(value).to_bytes(width, "little", signed=True) for value in values)


def edf_bytes(reserved="EDF+C", onsets=(0, 0.5, 1), records=3):
    """An EDF+ file by hand: an ECG of 200 Hz and two other signals, with annotations."""
    fields = [
        *(("0", 8), ("P007 F 01-JAN-1970 Jane_Doe", 80), ("Startdate 02-FEB-2021 X X X", 80), ("02.02.21", 8)),
        *(("10.11.12", 8), (str(256 * 5), 8), (reserved, 44), (str(records), 8), ("0.5", 8), ("4", 4)),
    ]
    columns = [
        *((LABELS, 16), (("AgAgCl", "", "", ""), 80), (("uV", "%", "", ""), 8), (("-3000", "0", "-1", "-1"), 8)),
        *((("3000", "100", "1", "1"), 8), (("-2048", "0", "-32768", "-32768"), 8)),
        *(
            (("2047", "255", "32767", "32767"), 8),
            (("HP:0.1Hz", "", "", ""), 80),
            (map(str, COUNTS), 8),
            ([""] * 4, 32),
        ),
    ]
    fields += [(value, width) for values, width in columns for value in values]
    header = "".join(value.ljust(width) for value, width in fields).encode()
    body = b""
    for index, onset in enumerate(onsets):
        note = f"+{onset:g}\x14\x14\x00" + (f"+{onset + 0.1:g}\x15" + "0.2\x14beat\x14\x00" if index == 1 else "")
        body += (WAVE + 1)[100 * index : 100 * index + 100].astype("<i2").tobytes() + struct.pack("<h", 200 + index)
        body += (WAVE * 3)[100 * index : 100 * index + 100].astype("<i2").tobytes() + note.encode().ljust(60, b"\0")
    return header + body


def test_edf_changes_nothing_but_the_samples_of_the_lead(tmp_path):
    (tmp_path / "a.edf").write_bytes(edf_bytes())
    recording = readers.read(tmp_path / "a.edf")
    assert (recording.names, recording.units, recording.leads) == (("ECG I", "Resp"), ("uV", ""), (0,))
    assert recording.sampling_rate == 200
    gain = 6000 / 4095
    np.testing.assert_allclose(recording.signal[:, 0], (WAVE[:300] + 1 + 2048) * gain - 3000)
    readers.write(recording, recording.signal, tmp_path / "same.edf")
    assert (tmp_path / "same.edf").read_bytes() == edf_bytes()
    signal = recording.signal.copy()
    signal[:, 0] += 5 * gain
    signal[:2, 0] = 9000, np.nan  # beyond the range of the header; a gap
    assert readers.write(recording, signal, tmp_path / "new.edf") == [tmp_path / "new.edf"]
    expected = bytearray(edf_bytes())
    for record in range(3):
        values = WAVE[100 * record : 100 * record + 100] + 6
        if record == 0:
            values[:2] = 2047, WAVE[1] + 1
        start = 256 * 5 + record * 2 * sum(COUNTS)
        expected[start : start + 200] = values.astype("<i2").tobytes()
    assert (tmp_path / "new.edf").read_bytes() == bytes(expected)


def bdf_bytes():
    """A BDF file by hand: an ECG of 150 Hz and a status, in three data records of a second."""
    columns = [
        *((("ECG", "Status"), 16), (("", "Triggers"), 80), (("uV", "Boolean"), 8), (("-262144", "-8388608"), 8)),
        *((("262144", "8388607"), 8), (("-8388608", "-8388608"), 8), (("8388607", "8388607"), 8), (("", ""), 80)),
        *((("150", "150"), 8), (("", ""), 32)),
    ]
    head = b"\xffBIOSEMI" + b"X".ljust(80) + b"X".ljust(80) + b"02.02.2110.11.12768     24BIT".ljust(68)
    head += b"3       1       2   " + "".join(value.ljust(width) for row, width in columns for value in row).encode()
    parts = (packed(values[150 * record :][:150], 3) for record in range(3) for values in (WAVE * 4001, WAVE % 7 - 9))
    return head + b"".join(parts)


def test_bdf_has_24_bits_and_keeps_the_other_channel(tmp_path):
    (tmp_path / "a.bdf").write_bytes(bdf_bytes())
    recording = readers.read(tmp_path / "a.bdf")
    assert (recording.names, recording.units, recording.leads) == (("ECG", "Status"), ("uV", "Boolean"), (0,))
    assert (recording.sampling_rate, recording.format) == (150, "bdf")
    found = [signal.data for signal in edfio.read_bdf(tmp_path / "a.bdf").signals]
    np.testing.assert_array_equal(recording.signal.T, found)
    np.testing.assert_allclose(found[0], WAVE[:450] * 4001 / 32, atol=0.04)
    readers.write(recording, recording.signal, tmp_path / "same.bdf")
    assert (tmp_path / "same.bdf").read_bytes() == bdf_bytes()
    lead = recording.signal[:, :1] + 10 * 524288 / (2**24 - 1)
    lead[7], lead[151] = np.nan, 1e9
    readers.write(recording, lead, tmp_path / "new.bdf", [0])
    expected = bytearray(bdf_bytes())
    values = WAVE[:450] * 4001 + 10
    values[7], values[151] = WAVE[7] * 4001, 2**23 - 1
    for record in range(3):
        expected[768 + 900 * record : 768 + 900 * record + 450] = packed(values[150 * record :][:150], 3)
    assert (tmp_path / "new.bdf").read_bytes() == bytes(expected)


def test_edf_with_interruptions_is_refused_and_without_is_not(tmp_path):
    (tmp_path / "a.edf").write_bytes(edf_bytes("EDF+D"))
    assert readers.read(tmp_path / "a.edf").signal.shape == (300, 2)
    (tmp_path / "b.edf").write_bytes(edf_bytes("EDF+D", (0, 0.5, 7)))
    with pytest.raises(UserError, match="EDF\\+D file with interruptions"):
        readers.read(tmp_path / "b.edf")


BAD = {  # files, the first of which is read; what is told
    "empty": ({"a.edf": b""}, "is empty"),
    "no EDF": ({"a.edf": b"\x07 of nothing " * 99}, "cannot read"),
    "truncated edf": ({"a.edf": edf_bytes()[:-10]}, "cannot read"),
    "whole records lost": ({"a.edf": edf_bytes(records=4)}, "cannot read"),
    "a header that begins elsewhere": ({"a.edf": edf_bytes().replace(b"1280 ", b"256  ", 1)}, "does not fit"),
    "many samples": ({"a.edf": edf_bytes().replace(b"100     1       100 ", b"99999999-9999999100 ")}, "does not fit"),
    "a negative number of samples": (
        {"a.edf": edf_bytes().replace(b"100     1       100 ", b"101     -1      101 ")},
        "does not fit",
    ),
    # Patterns of the library take the fourth power of its length.
    "a time without end": ({"a.edf": edf_bytes().replace(b"+0.5\x14\x14\x00", b"+0.5\x1515")}, "without its time"),
}


def test_a_channel_without_a_name_gets_one_as_wfdb(tmp_path):
    (tmp_path / "a.edf").write_bytes(edf_bytes().replace(b"Resp            ", b" " * 16, 1))
    recording = readers.read(tmp_path / "a.edf")
    assert recording.names == ("ECG I", "")
    readers.write(recording, recording.signal, tmp_path / "a.hea")
    record = wfdb.rdrecord(str(tmp_path / "a"))
    assert record.sig_name == ["ECG I", "ch1"]
    np.testing.assert_allclose(record.p_signal, recording.signal, atol=0.5)


def test_a_long_time_is_no_hang(tmp_path):
    before = edf_bytes()
    width = 60_000
    data = before[: 256 + 4 * 216 + 24] + str(width // 2).encode().ljust(8)
    data += before[len(data) : 256 * 5]
    notes = b"+" + b"1" * (width // 2) + b"\x15" + b"1" * (width // 2 - 2)
    for record in range(3):
        start = 256 * 5 + record * 2 * sum(COUNTS)
        data += before[start : start + 2 * sum(COUNTS[:3])] + notes
    (tmp_path / "a.edf").write_bytes(data)
    with pytest.raises(UserError, match="without its time"):
        readers.read(tmp_path / "a.edf")


def test_names_do_not_steer_the_terminal(tmp_path):
    (tmp_path / "a.edf").write_bytes(edf_bytes().replace(b"ECG I ", b"\x1b[2J\nI"))
    assert readers.read(tmp_path / "a.edf").names == (" [2J I", "Resp")


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_for_the_user(tmp_path, name):
    files, told = BAD[name]
    assert re.search(told, refusal(tmp_path, files, 250))
