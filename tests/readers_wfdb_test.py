"""Records of PhysioNet, by hand and by its library: digital values, header, annotations, segments; what is refused."""

import math
import re

import numpy as np
import pytest
import wfdb
from made_recordings import WAVE, other_channels, refusal, text_header, written

from ralenet_jax import readers
from ralenet_jax.errors import UserError


def decode_212(data):
    first, second, third = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(int).T
    values = np.stack([first | (second & 15) << 8, third | (second >> 4) << 8], 1).reshape(-1)
    return values - 4096 * (values > 2047)


def decode_24(data):
    padded = np.pad(np.frombuffer(data, np.uint8).reshape(-1, 3), ((0, 0), (1, 0)))
    return padded.copy().view("<i4").reshape(-1) >> 8


def test_mitdb_record_keeps_header_annotations_and_the_other_lead(physionet, tmp_path):
    folder = physionet / "mitdb/1.0.0"
    recording = readers.read(folder / "100")
    digital = decode_212((folder / "100.dat").read_bytes()).reshape(-1, 2)
    np.testing.assert_allclose(recording.signal, (digital - 1024) / 200, atol=1e-12)
    assert (recording.names, recording.units, recording.leads) == (("MLII", "V5"), ("mV", "mV"), (0, 1))
    assert (recording.sampling_rate, recording.format) == (360, "wfdb")
    written(recording, tmp_path / "new.hea")
    np.testing.assert_array_equal(decode_212((tmp_path / "new.dat").read_bytes()).reshape(-1, 2), digital + [50, 0])
    assert (tmp_path / "new.atr").read_bytes() == (folder / "100.atr").read_bytes()
    lines = (tmp_path / "new.hea").read_text().splitlines()
    checksum = (digital[:, 1].sum() + 32768) % 65536 - 32768
    assert lines[0] == "new 2 360 650000"
    assert lines[2].split() == ["new.dat", "212", "200.0(1024)/mV", "11", "1024", "1011", str(checksum), "0", "V5"]
    assert lines[3:] == ["# 69 M 1085 1629 x1", "# Aldomet, Inderal"]


def test_ludb_record_keeps_digital_values_and_all_its_annotations(physionet, tmp_path):
    folder = physionet / "ludb/1.0.1/data"
    recording = readers.read(folder / "1.dat")
    digital = np.fromfile(folder / "1.dat", "<i2").reshape(-1, 12)
    np.testing.assert_allclose(recording.signal[:, 0], (digital[:, 0] - 6) / 1716)
    assert recording.leads == tuple(range(12))
    files = readers.write(recording, recording.signal, tmp_path / "new")
    assert files[-1].name == "new.hea"
    np.testing.assert_array_equal(np.fromfile(tmp_path / "new.dat", "<i2").reshape(-1, 12), digital)
    names = ("i", "ii", "iii", "avr", "avl", "avf", "v1", "v2", "v3", "v4", "v5", "v6")
    assert {file.name for file in files} == {f"new.{name}" for name in (*names, "dat", "hea")}
    assert wfdb.rdann(str(tmp_path / "new"), "avr").sample.size
    assert "# <age>: 51" in (tmp_path / "new.hea").read_text()


def test_wfdb_leads_are_told_by_unit_and_name_and_the_time_is_kept(tmp_path):
    recording = readers.read(other_channels(tmp_path))
    assert (recording.leads, recording.units) == ((0,), ("mV", "mmHg", "mV"))
    written(recording, tmp_path / "new.hea")
    before, after = (np.fromfile(tmp_path / name, "<i2").reshape(-1, 3) for name in ("r.dat", "new.dat"))
    np.testing.assert_array_equal(after, before + [250, 0, 0])
    record = wfdb.rdheader(str(tmp_path / "new"))
    assert (record.fs, str(record.base_time), str(record.base_date)) == (250.5, "11:12:13", "2020-03-04")
    assert (record.adc_gain, record.baseline, record.comments) == ([1000, 20, 500], [3, -100, 7], ["of ours"])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("fmt", ["80", "212", "16", "24", "32"])
def test_wfdb_formats_come_back_with_their_gaps(tmp_path, fmt):
    signal = np.stack([WAVE / 1000, WAVE / 900], 1)
    signal[7, 1] = np.nan
    digits = {"fmt": [fmt] * 2, "adc_gain": [100.0, 100.0], "baseline": [0, 0]}
    wfdb.wrsamp("r", 250, ["mV"] * 2, ["I", "II"], signal, write_dir=str(tmp_path), **digits)
    recording = readers.read(tmp_path / "r")
    again = written(recording, tmp_path / "new.hea", change=0.1)
    assert wfdb.rdheader(str(tmp_path / "new")).fmt == [fmt] * 2
    np.testing.assert_allclose(again.signal[:, 0], np.round(signal[:, 0] * 100) / 100 + 0.1)
    np.testing.assert_array_equal(again.signal[:, 1], recording.signal[:, 1])
    assert np.isnan(again.signal[7, 1]) and np.isnan(again.signal).sum() == 1


@pytest.mark.parametrize(
    "fmt, encode", [("61", lambda x: x.astype(">i2")), ("160", lambda x: (x + 32768).astype("<u2"))]
)
def test_wfdb_formats_that_are_not_written_become_16(tmp_path, fmt, encode):
    header = text_header(tmp_path, f"r 1 250\nr.dat {fmt} 100\n", ("r.dat", encode(WAVE).tobytes()))
    recording = readers.read(header)
    np.testing.assert_allclose(recording.signal[:, 0], WAVE / 100)
    written(recording, tmp_path / "new.hea", change=1)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "new.dat", "<i2"), WAVE + 100)


@pytest.mark.usefixtures("small_blocks")
def test_wfdb_values_that_do_not_fit_widen_the_format(tmp_path):
    packed = np.stack([WAVE, WAVE - 100], 1).astype("<i2")
    packed[3, 1] = -(2**15)  # a gap
    text = "r 2 250 500\nr.dat 16 100 12 0 0 0 0 I\nr.dat 16 100 12 0 0 0 0 II\n"
    recording = readers.read(text_header(tmp_path, text, ("r.dat", packed.tobytes())))
    signal = recording.signal.copy()
    signal[:3, 0] = 400, np.nan, -400
    readers.write(recording, signal, tmp_path / "new.hea")
    digital = decode_24((tmp_path / "new.dat").read_bytes()).reshape(-1, 2)
    expected = packed.astype(int)
    expected[:3, 0] = 40_000, -(2**23), -40_000
    expected[3, 1] = -(2**23)
    np.testing.assert_array_equal(digital, expected)
    assert "24 100.0(0)/mV 12" in (tmp_path / "new.hea").read_text()


@pytest.mark.usefixtures("small_blocks")
def test_wfdb_offset_skew_and_frames_are_resolved(tmp_path):
    frames = np.stack([WAVE, WAVE + 4, WAVE * 2], 1).astype("<i2")  # two samples a frame, one a frame
    text = "r 2 250 500\nr.dat 16x2+8 100\nr.dat 16+8 100\n"
    recording = readers.read(text_header(tmp_path, text, ("r.dat", b"prologue" + frames.tobytes())))
    np.testing.assert_allclose(recording.signal, np.stack([WAVE + 2, WAVE * 2], 1) / 100)
    again = written(recording, tmp_path / "new.hea", change=0)
    np.testing.assert_array_equal(again.signal, recording.signal)
    text = "r 2 250 500\nr.dat 16 100\nr.dat 16:3 100\n"
    skewed = readers.read(text_header(tmp_path, text, ("r.dat", np.stack([WAVE, WAVE], 1).astype("<i2").tobytes())))
    np.testing.assert_allclose(skewed.signal[:-3, 1], WAVE[3:] / 100)
    again = written(skewed, tmp_path / "more.hea", change=0)
    np.testing.assert_array_equal(again.signal, skewed.signal)


FORMATS_SKEWED = ["61", "80", "160", "16", "212", "24", "32", "310", "311"]  # that the library reads so
FORMATS = ["8", *FORMATS_SKEWED, "508", "516", "524"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("told", ["r 3 250 333", "r 3 250"])
@pytest.mark.parametrize("fmt, skew", [(fmt, "") for fmt in FORMATS] + [(fmt, ":7") for fmt in FORMATS_SKEWED])
def test_wfdb_reads_in_blocks_what_its_library_reads_at_once(tmp_path, fmt, told, skew):
    rows = np.random.default_rng(0).integers(-128, 128, (333, 3))
    if fmt.startswith("5"):
        given = {"fmt": [fmt] * 3, "adc_gain": [1.0] * 3, "baseline": [0] * 3, "write_dir": str(tmp_path)}
        wfdb.wrsamp("r", 250, ["mV"] * 3, ["I", "II", "III"], d_signal=rows, **given)
    else:
        size = {"8": 1, "80": 1, "212": 1.5, "24": 3, "32": 4, "310": 4 / 3, "311": 4 / 3}.get(fmt, 2)
        (tmp_path / "r.dat").write_bytes((rows.astype("i1").tobytes() * 4)[: math.ceil(999 * size)])
        lines = "".join(f"r.dat {fmt}{part} 100 12 0 5\n" for part in ("", skew, ""))
        (tmp_path / "r.hea").write_text(f"{told}\n{lines}")
    np.testing.assert_array_equal(readers.read(tmp_path / "r.hea").signal, wfdb.rdrecord(str(tmp_path / "r")).p_signal)


@pytest.mark.usefixtures("small_blocks")
def test_a_record_of_several_files_and_formats_becomes_one_file(tmp_path):
    text = "r 2 250 500\na.dat 16 100/mV 12 0 0 0 0 I\nb.dat 80 10/mmHg 8 0 0 0 0 ABP\n"
    low = WAVE // 10
    header = text_header(
        tmp_path, text, ("a.dat", WAVE.astype("<i2").tobytes()), ("b.dat", (low + 128).astype("u1").tobytes())
    )
    recording = readers.read(header)
    np.testing.assert_allclose(recording.signal, np.stack([WAVE / 100, low / 10], 1))
    written(recording, tmp_path / "new.hea")
    np.testing.assert_array_equal(
        np.fromfile(tmp_path / "new.dat", "<i2").reshape(-1, 2), np.stack([WAVE + 25, low], 1)
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout", ["", "layout 0\n"])
@pytest.mark.parametrize("gains", [(100, 100), (100, 200)])
def test_wfdb_segments_are_joined_and_listed_once(tmp_path, gains, layout):
    taken = "10:11:12 01/02/2003"
    text_header(tmp_path, f"r/{3 if layout else 2} 1 250 1000 {taken}\n{layout}s1 500\ns2 500\n# a note\n")
    if layout:
        (tmp_path / "layout.hea").write_text("layout 1 250 0\n~ 0 1 12 0 0 0 0 II\n")
    for name, gain in zip(("s1", "s2"), gains, strict=True):
        (tmp_path / f"{name}.hea").write_text(f"{name} 1 250 500\n{name}.dat 16 {gain}/mV 12 0 0 0 0 II\n")
        (tmp_path / f"{name}.dat").write_bytes(WAVE.astype("<i2").tobytes())
    assert readers.find([tmp_path]) == [tmp_path / "r.hea"]
    recording = readers.read(tmp_path / "r")
    assert (recording.names, recording.units, recording.sampling_rate) == (("II",), ("mV",), 250)
    expected = np.concatenate([WAVE / gains[0], WAVE / gains[1]])
    np.testing.assert_allclose(recording.signal[:, 0], expected, rtol=1e-6)
    (tmp_path / "out").mkdir()
    again = written(recording, tmp_path / "out/r.hea")
    np.testing.assert_allclose(again.signal[:, 0], expected + 0.25, atol=0.02 / gains[0])
    text = (tmp_path / "out/r.hea").read_text()
    assert f" {taken}" in text.splitlines()[0] and text.endswith("a note\n")


def test_a_segment_is_the_file_that_the_record_names(tmp_path):
    text_header(tmp_path, "r/2 1 250 1000\ns1 500\ns2 500\n")
    for name, gain in (("s1", 100), ("s2", 200), ("other", 1)):
        told = "other" if name == "s2" else name
        (tmp_path / f"{name}.hea").write_text(f"{told} 1 250 500\n{name}.dat 16 {gain}/mV 12 0 0 0 0 II\n")
        (tmp_path / f"{name}.dat").write_bytes(WAVE.astype("<i2").tobytes())
    expected = np.concatenate([WAVE / 100, WAVE / 200])
    np.testing.assert_allclose(readers.read(tmp_path / "r").signal[:, 0], expected, rtol=1e-6)


def test_segments_that_hold_various_signals_leave_gaps(tmp_path):
    text_header(tmp_path, "r/4 3 250 1100\nlayout 0\ns1 500\n~ 100\ns2 500\n")
    (tmp_path / "layout.hea").write_text(
        "layout 3 250 0\n" + "".join(f"~ 0 1 12 0 0 0 0 {n}\n" for n in ("II", "V", "X"))
    )
    (tmp_path / "s1.hea").write_text("s1 1 250 500\ns1.dat 16 100/mV 12 0 0 0 0 II\n")
    (tmp_path / "s1.dat").write_bytes(WAVE.astype("<i2").tobytes())
    (tmp_path / "s2.hea").write_text("s2 2 250 500\ns2.dat 16 50(9)/mV 12 0 0 0 0 V\ns2.dat 16 200/mV 12 0 0 0 0 II\n")
    (tmp_path / "s2.dat").write_bytes(np.stack([WAVE, -WAVE], 1).astype("<i2").tobytes())
    recording = readers.read(tmp_path / "r")
    assert (recording.names, recording.units) == (("II", "V", "X"), ("mV", "mV", ""))
    gap = np.full(1100, np.nan)
    expected = [[*(WAVE / 100), *gap[:100], *(-WAVE / 200)], [*gap[:600], *((WAVE - 9) / 50)], gap]
    np.testing.assert_allclose(recording.signal, np.transpose(expected), rtol=1e-6)
    (tmp_path / "out").mkdir()
    again = written(recording, tmp_path / "out/r.hea", change=300, channel=1)
    assert (again.names, again.units) == (recording.names, recording.units)
    np.testing.assert_allclose(again.signal, np.transpose(expected) + [0, 300, 0], atol=np.ptp(WAVE) / 50 / 60_000)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("fmt", ["80", "212", "16", "24", "32", "508", "516", "524"])
def test_segments_alike_keep_digits_and_gaps(tmp_path, fmt):
    names, rows = ["II", "V", "X"], np.random.default_rng(0).integers(-99, 100, (500, 2))
    text_header(tmp_path, "r/4 3 250 1100\nlayout 0\ns1 500\n~ 100\ns2 500\n")
    (tmp_path / "layout.hea").write_text("layout 3 250 0\n" + "".join(f"~ 0 1 12 0 0 0 0 {n}\n" for n in names))
    for name, channels in (("s1", [0, 1]), ("s2", [1, 2])):
        told = {"sig_name": [names[channel] for channel in channels], "units": ["mV"] * 2, "baseline": [5] * 2}
        told |= {"fmt": [fmt] * 2, "adc_gain": [100.0] * 2, "write_dir": str(tmp_path)}
        wfdb.wrsamp(name, 250, d_signal=rows, **told)
    recording = readers.read(tmp_path / "r")
    np.testing.assert_array_equal(recording.signal, wfdb.rdrecord(str(tmp_path / "r")).p_signal)
    assert np.isnan(recording.signal).sum(0).tolist() == [600, 100, 600]
    (tmp_path / "out").mkdir()
    again = written(recording, tmp_path / "out/r.hea", change=0)
    np.testing.assert_array_equal(again.signal, recording.signal)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "http://host/r.dat", "..", "-", "a\\b", "s3::x"])
@pytest.mark.parametrize("text", ["r 1 250 500\n{} 16 100\n", "r/2 1 250 500\n{} 250\ns 250\n"])
def test_a_header_that_leads_out_of_its_folder_is_refused(tmp_path, monkeypatch, name, text):
    header = text_header(tmp_path, text.format(name), ("r.dat", WAVE.astype("<i2").tobytes()))
    (tmp_path / "s.hea").write_text("s 1 250 250\nr.dat 16 100\n")
    monkeypatch.setattr(wfdb, "rdrecord", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(UserError, match="its own folder"):
        readers.read(header)


SAMPLES = WAVE.astype("<i2").tobytes()
HEADER = b"r 1 250 500\nr.dat 16 100\n"
BAD = {  # files, the first of which is read; what is told
    "empty": ({"a.hea": b""}, "is empty"),
    "truncated dat": ({"r.hea": HEADER, "r.dat": WAVE.astype("<i2").tobytes()[:-10]}, "cannot read"),
    "truncated 212": ({"r.hea": HEADER.replace(b"16", b"212"), "r.dat": bytes(700)}, "cannot read"),
    "no dat": ({"r.hea": HEADER}, "names r.dat, which is not beside it"),
    "no header": ({"r.dat": b"12345678"}, "no header r.hea"),
    "no signals": ({"r.hea": b"r 0 250 500\n"}, "0 channels"),
    "rate 0": ({"r.hea": b"r 1 0 500\nr.dat 16 100\n", "r.dat": WAVE.astype("<i2").tobytes()}, "r.hea"),
    "itself": ({"r.hea": b"r/1 1 250 500\nr 500\n"}, "a second time"),
    "comments": ({"r.hea": b"# nothing\n"}, "cannot read"),
    # What wfdb would take memory or time for.
    "samples": ({"r.hea": HEADER.replace(b"500", b"9" * 12), "r.dat": SAMPLES}, "9{12} samples, more than r.dat holds"),
    "frames": ({"r.hea": HEADER.replace(b"16", b"16x99999999"), "r.dat": SAMPLES}, "more than r.dat holds"),
    "frames of another file": (
        {"r.hea": b"r 2 250\nr.dat 16\ns.dat 16x99999999\n", "r.dat": SAMPLES, "s.dat": SAMPLES},
        "500 samples, more than s.dat holds",
    ),
    "no samples in a frame": ({"r.hea": HEADER.replace(b"16", b"16x0"), "r.dat": SAMPLES}, "0 samples a frame"),
    "skew": (
        {"r.hea": HEADER.replace(b"16", b"16:999999999"), "r.dat": SAMPLES},
        "MB of memory; expected four times its",
    ),
    "FLAC": (
        {"r.hea": b"r 1 250 9999999999\nr.dat 516 100\n", "r.dat": SAMPLES},
        "MB of memory; expected four times its",
    ),
    "signals": ({"r.hea": HEADER.replace(b"r 1", b"r 999999999"), "r.dat": SAMPLES}, "999999999 signals, 1 lines"),
    "signals of segments": ({"r.hea": b"r/1 999999999 250 500\ns 500\n"}, "999999999 signals"),
    "segments": ({"r.hea": b"r/999999999 1 250 500\ns 500\n"}, "999999999 expected"),
    "too many segments": ({"r.hea": b"r/20000 1 250 20000\n" + b"~ 1\n" * 20_000}, "20000 lines"),
    "gap": ({"r.hea": b"r/1 1 250 9999999999\n~ 9999999999\n"}, "MB of memory; expected four times its"),
    "segments of several units": (
        {
            "r.hea": b"r/2 1 250 1000\ns 500\nt 500\n",
            "s.hea": b"s 1 250 500\ns.dat 16 100/mV\n",
            "t.hea": b"t 1 250 500\nt.dat 16 100/uV\n",
            **{"s.dat": SAMPLES, "t.dat": SAMPLES},
        },
        "in mV and in uV",
    ),
    "segments of segments": (
        {"r.hea": b"r/1 1 250 500\ns 500\n", "s.hea": b"s/1 1 250 500\nt 500\n"},
        "s.hea is itself of segments",
    ),
    "two formats": ({"r.hea": b"r 2 250 9\nr.dat 16\nr.dat 212\n", "r.dat": SAMPLES}, "format 16, 212"),
    "long header": ({"r.hea": b"#\n" * 2**20 + HEADER, "r.dat": SAMPLES}, "a WFDB header of 2097177 bytes"),
    "long line": ({"r.hea": b"1" * 50_000, "r.dat": SAMPLES}, "a line of 50000 characters"),
}


def test_letters_that_wfdb_leaves_out_do_not_hide_segments(tmp_path):
    text_header(tmp_path, "µ r/1 1 250 500\ns 500\n", ("s", b"taken for the signal"))
    (tmp_path / "s.hea").write_text("s 1 250 500\n../outside.dat 16 100\n")
    with pytest.raises(UserError, match="its own folder"):
        readers.read(tmp_path / "r.hea")


def test_a_damaged_header_does_not_keep_a_folder_from_being_listed(tmp_path):
    text_header(tmp_path, "r/1 1 250 500\n../s 500\n")
    (tmp_path / "a.csv").write_text("1\n2\n")
    assert readers.find([tmp_path]) == [tmp_path / "a.csv", tmp_path / "r.hea"]


def test_a_counter_that_begins_at_0_is_no_obstacle(tmp_path):
    recording = readers.read(text_header(tmp_path, "r 1 250/1(0) 500\nr.dat 16 100\n", ("r.dat", SAMPLES)))
    written(recording, tmp_path / "new.hea")


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_one_line_for_the_user(tmp_path, name):
    files, told = BAD[name]
    assert re.search(told, refusal(tmp_path, files))
