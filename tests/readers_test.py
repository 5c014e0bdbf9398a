"""What recordings of all formats share: finding, rates, other formats, names of outputs, and what is refused."""

import io
import re
import subprocess
import sys
from pathlib import Path

import edfio
import numpy as np
import pytest
import wfdb
from made_recordings import WAVE, other_channels, refusal, text_header, wav_file, written

from ralenet_jax import readers
from ralenet_jax.errors import UserError


@pytest.mark.parametrize(
    "suffix, precision",
    [("hea", 1e-4), ("edf", 1e-4), ("bdf", 1e-6), ("csv", 1e-6), ("npz", 0), ("npy", 0), ("wav", 1e-6)],
)
@pytest.mark.parametrize("length", [450, 499])
def test_a_recording_is_written_in_another_format(tmp_path, suffix, precision, length):
    signal = np.stack([WAVE, WAVE / 2], 1)[:length] / 1000
    np.savez(tmp_path / "a.npz", signal=signal, fs=360, names=["II", "V1"], units=["mV", "mV"])
    np.savetxt(
        tmp_path / "a.csv",
        np.column_stack([np.arange(length) / 360, signal]),
        header="time,II (mV),V1 (mV)",
        comments="",
        delimiter=",",
    )
    recording = readers.read(tmp_path / ("a.csv" if suffix == "npz" else "a.npz"))
    assert (recording.names, recording.sampling_rate) == (("II", "V1"), 360)
    (tmp_path / "out").mkdir()
    again = written(recording, tmp_path / f"out/b.{suffix}")
    np.testing.assert_allclose(again.signal, signal + [0.25, 0], atol=precision, rtol=1e-12)
    assert again.sampling_rate == 360
    if suffix not in ("npy", "wav"):
        assert (again.names, again.units) == (("II", "V1"), ("mV", "mV"))


def test_the_leads_alone_are_given(tmp_path):
    recording = readers.read(other_channels(tmp_path))
    readers.write(recording, recording.channels([2, 0]) + [0, 0.25], tmp_path / "new.hea", [2, 0])
    readers.write(recording, recording.channels([2, 0]) + [0, 0.25], tmp_path / "new.npy", [2, 0])
    before, after = (np.fromfile(tmp_path / name, "<i2").reshape(-1, 3) for name in ("r.dat", "new.dat"))
    np.testing.assert_array_equal(after, before + [250, 0, 0])
    np.testing.assert_array_equal(np.load(tmp_path / "new.npy"), recording.signal + [0.25, 0, 0])
    with pytest.raises(ValueError, match="shape"):
        readers.write(recording, recording.signal, tmp_path / "more.hea", [0])


DIGITS = np.random.default_rng(0).permutation(np.arange(-32767, 32768))[:, None]


def write_digits(folder, kind, offset, gain=250):
    """Every integer of 16 bits but the least; WFDB and EDF have an offset, and are in steps of 1/gain and 1/4."""
    path = folder / f"digits.{kind}"
    if kind == "hea":
        told = {"adc_gain": [gain], "baseline": [offset], "fmt": ["16"], "units": ["mV"], "sig_name": ["II"]}
        wfdb.wrsamp("digits", 360, d_signal=DIGITS, write_dir=folder, **told)
    elif kind == "edf":
        limits = {"physical_range": ((-32768 + offset) / 4, (32767 + offset) / 4), "digital_range": (-32768, 32767)}
        signal = edfio.EdfSignal.from_digital(DIGITS[:, 0].astype(np.int16), 5, label="II", **limits)
        edfio.Edf([signal]).write(path)
    else:
        np.save(path, DIGITS.astype(offset))
    return path


@pytest.mark.parametrize(
    "kind, offset, dtype",
    [
        *(("hea", 0, np.float32), ("hea", 2**19, np.float32), ("hea", 2**20, np.float64)),
        *(("edf", 0, np.float32), ("edf", 9_000_000, np.float64)),
        *(("npy", np.int16, np.float32), ("npy", np.float32, np.float32), ("npy", np.int32, np.float64)),
    ],
)
def test_half_of_the_memory_is_taken_where_that_tells_all_digits(tmp_path, kind, offset, dtype):
    recording = readers.read(write_digits(tmp_path, kind, offset), 5 if kind == "npy" else None)
    whole = recording.channels([0], recording.dtype)
    assert whole.dtype == dtype
    assert not readers._changed(recording, whole, [0])  # nothing to write anew
    readers.write(recording, whole, tmp_path / f"same.{kind}")
    suffix = "dat" if kind == "hea" else kind
    assert (tmp_path / f"same.{suffix}").read_bytes() == (tmp_path / f"digits.{suffix}").read_bytes()
    step = np.median(np.diff(np.sort(recording.signal[:, 0])))
    whole[1::2] += dtype(0.4 * step)  # too little for another digit
    whole[0, 0] = whole[2, 0]
    readers.write(recording, whole, tmp_path / f"other.{kind}")
    after = readers.read(tmp_path / f"other.{kind}", 5 if kind == "npy" else None).signal
    assert after[0] == after[2]
    if recording.format != "npy" or np.issubdtype(offset, np.integer):
        np.testing.assert_array_equal(after[1:], recording.signal[1:])


@pytest.mark.parametrize("gain", [1e-32, 1e32])
def test_numbers_too_large_or_small_for_half_of_the_memory_take_all(tmp_path, gain):
    assert readers.read(write_digits(tmp_path, "hea", 0, gain)).dtype == np.float64


def test_a_name_without_suffix_takes_the_format_of_the_recording(tmp_path):
    np.save(tmp_path / "a.npy", WAVE)
    recording = readers.read(tmp_path / "a.npy", 250)
    assert readers.write(recording, recording.signal + 1, tmp_path / "b") == [tmp_path / "b"]
    np.testing.assert_array_equal(np.load(tmp_path / "b"), WAVE + 1)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


BAD = {  # files, the first of which is read; what is told
    "infinite": ({"a.csv": b"1\n2\ninf\n"}, "infinite"),
    "one sample": ({"a.npy": npy(np.ones((1, 3)))}, "3 channels of 1 samples"),
    "all gaps": ({"a.npy": npy(np.full(50, np.nan))}, "nothing but gaps"),
    "0 channels": ({"a.npy": npy(np.ones((50, 0)))}, "0 channels"),
    "unknown": ({"a.xyz": b"123"}, "of no format"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_for_the_user(tmp_path, name):
    files, told = BAD[name]
    assert re.search(told, refusal(tmp_path, files, 250))


@pytest.mark.parametrize("rate", [0, -1, np.nan, np.inf])
def test_rates_must_be_above_zero(tmp_path, rate):
    np.save(tmp_path / "a.npy", WAVE)
    with pytest.raises(UserError, match="above 0"):
        readers.read(tmp_path / "a.npy", rate)


def test_a_rate_is_asked_for_and_must_not_contradict_the_file(tmp_path):
    np.save(tmp_path / "a.npy", WAVE)
    with pytest.raises(UserError, match="pass --rate"):
        readers.read(tmp_path / "a.npy")
    wav_file(tmp_path / "a.wav", 2, bytes(400))
    assert readers.read(tmp_path / "a.wav", 300).sampling_rate == 300
    with pytest.raises(UserError, match="300 Hz, not 250; leave out --rate"):
        readers.read(tmp_path / "a.wav", 250)


def test_find_lists_each_recording_once(tmp_path):
    other_channels(tmp_path)
    (tmp_path / "r.atr").write_bytes(b"1")
    (tmp_path / "below/.hidden.tmp").mkdir(parents=True)
    for name in ("a.csv", "below/b.EDF", "below/.hidden.tmp/c.csv", ".d.csv", "below/e.md", "f.dat"):
        (tmp_path / name).write_text("1\n2\n")
    (tmp_path / "LICENSE.txt").write_text("Some\nwords\n")
    (tmp_path / "subjects.csv").write_text("name,age\na,1\nb,2\n")
    (tmp_path / "table.txt").write_text("1,2\n3,4\n5,6\n")
    expected = [tmp_path / name for name in ("a.csv", "below/b.EDF", "r.hea", "table.txt")]
    assert readers.find([tmp_path]) == expected
    assert readers.find([tmp_path / "r", tmp_path / "r.dat", str(tmp_path / "r.hea"), tmp_path]) == expected
    (tmp_path / "none").mkdir()
    for path, told in (
        ("none", "holds no recording"),
        ("nowhere.csv", "is not there"),
        ("f.dat", "no header"),
        ("below/e.md", "no format"),
    ):
        with pytest.raises(UserError, match=told):
            readers.find([tmp_path / "a.csv", tmp_path / path])


def test_find_leaves_out_what_an_earlier_run_wrote_unless_it_is_named(tmp_path):
    recording = readers.read(other_channels(tmp_path))
    readers.write(recording, recording.signal + 1, readers.output_path(recording, None, True))
    for name in ("a.csv", "a_denoised.csv", "denoised.csv"):
        (tmp_path / name).write_text("1\n2\n")
    expected = [tmp_path / name for name in ("a.csv", "denoised.csv", "r.hea")]
    assert readers.find([tmp_path]) == expected
    output = tmp_path / "r_denoised.hea"
    assert readers.find([tmp_path, output.with_suffix("")]) == [*expected, output]
    (tmp_path / "done").mkdir()
    (tmp_path / "done/a_denoised.csv").write_text("1\n2\n")
    with pytest.raises(UserError, match="holds no recording"):
        readers.find([tmp_path / "done"])
    assert readers.find([tmp_path / "done/a_denoised.csv"]) == [tmp_path / "done/a_denoised.csv"]


def test_find_leaves_out_the_folder_of_outputs_below_the_one_that_is_searched(tmp_path):
    for name in ("a.npy", "sub/b.npy", "sub/clean/a.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, WAVE)
    a, b, done = (tmp_path / name for name in ("a.npy", "sub/b.npy", "sub/clean/a.npy"))
    assert readers.find([tmp_path], tmp_path / "sub/clean") == [a, b]
    assert readers.find([tmp_path, done], tmp_path / "sub/clean") == [a, b, done]
    assert readers.find([tmp_path], tmp_path) == readers.find([tmp_path]) == [a, b, done]
    assert readers.find([tmp_path / "sub"], tmp_path) == [b, done]
    assert readers.find([tmp_path], tmp_path / "new") == [a, b, done]


@pytest.fixture
def record(tmp_path):
    return readers.read(other_channels(tmp_path))


def test_where_the_output_goes(tmp_path, record):
    (tmp_path / "there").mkdir()
    path = readers.output_path
    assert path(record, None, True) == tmp_path / "r_denoised.hea"
    assert path(record, tmp_path / "there", False) == tmp_path / "there/r.hea"
    assert path(record, tmp_path / "new", True) == tmp_path / "new/r.hea"
    assert path(record, f"{tmp_path}/new/", False) == tmp_path / "new/r.hea"
    assert path(record, tmp_path / "new", False) == tmp_path / "new.hea"
    assert path(record, tmp_path / "new.dat", False) == tmp_path / "new.hea"
    assert path(record, tmp_path / "new.csv", False) == tmp_path / "new.csv"
    with pytest.raises(UserError, match="no format that is written"):
        path(record, tmp_path / "new.xyz", False)


@pytest.mark.parametrize("out", ["r.hea", "r", "r.dat", "."])
def test_the_input_is_not_overwritten(tmp_path, record, out):
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match="name another output"):
        readers.output_path(record, tmp_path / out, False)
    with pytest.raises(UserError, match="name another output"):
        readers.write(record, record.signal, tmp_path / ("r.hea" if out == "." else out))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_signal_file_of_the_input_is_not_overwritten_by_another_name(tmp_path):
    header = text_header(tmp_path, "r 1 250 500\nother.dat 16 100\n", ("other.dat", WAVE.astype("<i2").tobytes()))
    with pytest.raises(UserError, match="other.dat is the recording"):
        readers.write(readers.read(header), np.zeros((500, 1)), tmp_path / "other.hea")
    assert (tmp_path / "other.dat").read_bytes() == WAVE.astype("<i2").tobytes()
    assert not (tmp_path / "other.hea").exists()


def test_nothing_is_left_where_writing_fails(tmp_path, record, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        readers.write(record, record.signal, tmp_path / "file/new.hea")
    gap = record.signal.copy()
    gap[3] = np.nan
    for name, told in (("new.edf", "no gaps"), ("new.wav", "no rate of 250.5"), ("a b.hea", "cannot write")):
        with pytest.raises(UserError, match=told):
            readers.write(record, gap, tmp_path / "out" / name)
    replace = Path.replace

    def full(self, target):
        if self.suffix == ".hea":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        readers.write(record, record.signal, tmp_path / "out/new.hea")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_signal_of_another_shape_is_an_error_of_the_caller(tmp_path, record):
    with pytest.raises(ValueError, match="shape"):
        readers.write(record, record.signal[:-1], tmp_path / "new.hea")


@pytest.mark.parametrize("text, chosen", [("ii", (0,)), ("0,2", (0, 2)), ("RESP, 0,resp", (2, 0))])
def test_leads_are_chosen_by_name_or_index(record, text, chosen):
    assert readers.choose_leads(record, text) == chosen


@pytest.mark.parametrize("text", ["", "V9", "3", "-1", "0,,1"])
def test_unknown_leads_are_refused_with_those_there_are(record, text):
    with pytest.raises(UserError, match="0 II, 1 ABP, 2 RESP"):
        readers.choose_leads(record, text)


def test_it_imports_no_jax():
    code = "import sys; import ralenet_jax.readers; print([name for name in sys.modules if name in ('jax', 'flax')])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert found.stdout.strip() == "[]"
