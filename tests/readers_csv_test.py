"""Tables by hand: delimiters, headers, times, gaps and decimals; what is kept, and what is refused."""

import csv
import re

import numpy as np
import pytest
from made_recordings import WAVE, refusal

from ralenet_jax import readers

pytestmark = pytest.mark.usefixtures("small_blocks")
LINES = np.round(np.stack([np.sin(np.arange(40) / 5), np.cos(np.arange(40) / 7) * 2], 1), 3)


def table(row, header="", end="\n"):
    return "".join([header, *(row.format(i, *values) + end for i, values in enumerate(LINES))])


TIMES = [round(index / 360, 4) for index in range(40)]
CLOCK = "".join(f"0:{t:07.4f}\t{a:.3f}\t{b:.3f}\n" for t, (a, b) in zip(TIMES, LINES, strict=True))
TABLES = {  # text, rate to give, rate found, names, units
    "plain": (table("{1:.3f},{2:.3f}"), 250, 250, ("ch0", "ch1"), ("", "")),
    "header": (table("{1:.3f};{2:.3f}", "I (mV);SpO2 [%]\r\n", "\r\n"), 250, 250, ("I", "SpO2"), ("mV", "%")),
    "comma": (table("{1:.3f};{2:.3f}").replace(".", ","), 99.5, 99.5, ("ch0", "ch1"), ("", "")),
    "tab": (table("{0}\t{1:.3f}\t{2:.3f}", "sample\tI\tII\n"), 500, 500, ("I", "II"), ("", "")),
    "blanks": (table("{1:.3f} {2:.3f}", "# I II\n"), 250, 250, ("I", "II"), ("", "")),
    "one column": (table("{1:.3f}", "ecg\n"), 250, 250, ("ecg",), ("",)),
    "milliseconds": (table("{0:d}e0,{1:.3f},{2:.3f}", "time_ms,I,II\n"), None, 1000, ("I", "II"), ("", "")),
    "milliseconds by size": (table("{0}4,{1:.3f},{2:.3f}", "t,I,II\n"), None, 100, ("I", "II"), ("", "")),
    "no header": (table("0.{0:02d},{1:.3f},{2:.3f}"), None, 100, ("ch1", "ch2"), ("", "")),
    "physiobank": (
        "'Elapsed time'\t'I'\t'II'\n'h:mm:ss.mmm'\t'mV'\t'mV'\n" + CLOCK,
        None,
        360,
        ("I", "II"),
        ("mV", "mV"),
    ),
    "dates": (
        table("2021-03-04T10:00:00.{0:02d}0,{1:.3f},{2:.3f}", "timestamp,I,II\n"),
        None,
        100,
        ("I", "II"),
        ("", ""),
    ),
    "pandas": (table("{0},{1:.3f},{2:.3f}", ",0,1\n"), 250, 250, ("0", "1"), ("", "")),
    "rate given": (table("0.{0:02d},{1:.3f},{2:.3f}", "time,I,II\n"), 400, 400, ("I", "II"), ("", "")),
    "byte order": (table("{1:.3f},{2:.3f}", "\ufeffµ,II\n"), 250, 250, ("µ", "II"), ("", "")),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_keep_all_but_the_cells_of_the_lead(tmp_path, name):
    text, given, rate, names, units = TABLES[name]
    (tmp_path / "a.csv").write_bytes(text.encode())
    recording = readers.read(tmp_path / "a.csv", given)
    assert (recording.sampling_rate, recording.names, recording.units) == (rate, names, units)
    np.testing.assert_array_equal(recording.signal, LINES[:, : len(names)])
    readers.write(recording, recording.signal, tmp_path / "same.csv")
    assert (tmp_path / "same.csv").read_bytes() == text.encode()
    signal = recording.signal.copy()
    signal[1, 0] = 0.12345
    readers.write(recording, signal, tmp_path / "new.csv")
    row = len(text.splitlines()) - 39
    before = text.splitlines()[row].replace(",", ".") if name == "comma" else text.splitlines()[row]
    after = (tmp_path / "new.csv").read_bytes().decode()
    new = "0,12345" if name == "comma" else "0.12345"
    assert new in after.splitlines()[row]
    old = f"{LINES[1, 0]:.3f}".replace(".", new[1])
    assert before.count(old.replace(",", ".")) == 1
    # six digits: one more where the largest of the column is below 1
    found = after.replace(new + "0", old).replace(new, old)
    assert found == text


@pytest.mark.parametrize("rate", [128, 250, 360, 1000, 97.3])
def test_the_rate_is_found_in_rounded_times(tmp_path, rate):
    lines = [f"{time:.3f} {value}" for time, value in zip(7 + np.arange(500) / rate, WAVE, strict=True)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    recording = readers.read(tmp_path / "a.txt")
    assert recording.sampling_rate == pytest.approx(rate, rel=1e-9 if rate != 97.3 else 1e-3)
    np.testing.assert_array_equal(recording.signal[:, 0], WAVE)


def test_gaps_of_a_table_are_kept_and_made(tmp_path):
    (tmp_path / "a.csv").write_text('I,II\n,5\n1.5,nan\n2.5,7\n"3.5",8\n')
    recording = readers.read(tmp_path / "a.csv", 250)
    np.testing.assert_array_equal(recording.signal, [[np.nan, 5], [1.5, np.nan], [2.5, 7], [3.5, 8]])
    signal = recording.signal + [1, 0]
    signal[3, 1] = np.nan
    readers.write(recording, signal, tmp_path / "new.csv")
    with (tmp_path / "new.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [["I", "II"], ["", "5"], ["2.50000", "nan"], ["3.50000", "7"], ["4.50000", ""]]


def test_a_table_keeps_its_decimals_and_has_six_digits_at_least(tmp_path):
    (tmp_path / "a.csv").write_text("0.12345678,2e-5,3\n" * 3)
    recording = readers.read(tmp_path / "a.csv", 250)
    readers.write(recording, recording.signal * 1.5, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == "0.18518517,0.0000300000,4.50000\n" * 3


def test_a_single_column_keeps_blank_lines_as_gaps(tmp_path):
    (tmp_path / "a.txt").write_text("nan\nnan\n1\n\n3\n\n")
    recording = readers.read(tmp_path / "a.txt", 250)
    np.testing.assert_array_equal(recording.signal[:, 0], [np.nan, np.nan, 1, np.nan, 3])
    readers.write(recording, recording.signal * 2, tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text() == "nan\nnan\n2.00000\n\n6.00000\n\n"


def test_blanks_between_cells_of_lines_without_a_change_are_kept(tmp_path):
    (tmp_path / "a.txt").write_text("1  2\r\n 9\t4\r\n5  6\r\n\r\n")
    recording = readers.read(tmp_path / "a.txt", 250)
    signal = recording.signal
    signal[2, 1] = 7
    readers.write(recording, signal, tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_bytes() == b"1  2\r\n 9\t4\r\n5 7.00000\r\n\r\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings_and_ends_of_lines_are_kept(tmp_path, encoding, newline):
    text = newline.join(["II (µV);Größe", *("1;2" for _ in range(300)), "", ""])
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    recording = readers.read(tmp_path / "a.csv", 250)
    assert (recording.names, recording.signal.shape) == (("II", "Größe"), (300, 2))
    readers.write(recording, recording.signal + [0, 0.5], tmp_path / "b.csv")
    expected = text.replace("1;2", "1;2.50000").encode(encoding)
    assert (tmp_path / "b.csv").read_bytes() == expected


BAD = {  # files, the first of which is read; what is told
    "empty": ({"a.csv": b""}, "is empty"),
    "text": ({"a.txt": b"Dear reader,\nthere is no table\nin here.\n"}, "no table"),
    "short numbers": ({"a.csv": b"1,2\n" * 2 * 10**5}, "MB of memory; expected four times its 0.8 MB"),
    "bytes": ({"a.csv": bytes(range(256)) * 9}, "no text"),
    "word in a table": ({"a.csv": b"1,2\n3,4\n5,six\n"}, "line 3: '5,six'"),
    "word at the top": ({"a.csv": b"1,2\nx,4\n5,6\n7,8\n"}, "none of a table"),
    "short line": ({"a.csv": b"1,2\n3,4\n5\n"}, "line 3: '5'"),
    "no numbers but gaps": ({"a.csv": b"nan\n" * 20_000}, "no table"),
    "wide and long": ({"a.csv": b"1," * 30_000 + b"1\n" + b"1," * 30_000 + b"1\n" + b"1\n" * 300_000}, "line 3: '1'"),
    "long line": ({"a.csv": b"12," * 400_000 + b"12\n"}, "a line of 1200003 characters"),
    "uneven times": ({"a.csv": b"time,I\n0,1\n0.01,1\n0.5,1\n0.51,2\n"}, "not evenly spaced"),
}


def test_a_long_title_is_no_hang(tmp_path):
    (tmp_path / "a.csv").write_text(f"I{' ' * 60_000}x,II (mV)\n1,2\n3,4\n")
    assert readers.read(tmp_path / "a.csv", 250).units == ("", "mV")


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_one_line_for_the_user(tmp_path, name):
    files, told = BAD[name]
    assert re.search(told, refusal(tmp_path, files, 250 if name != "uneven times" else None))
