"""NPY, NPZ and WAV: shapes, types of number and the arrays beside; what is refused."""

import io
import re
import wave
import zipfile

import numpy as np
import pytest
from made_recordings import WAVE, refusal, wav_file, written
from scipy.io import wavfile

from ralenet_jax import readers

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("dtype", ["f2", "<f4", ">f8", "u1", "i2", ">i4", "i8"])
@pytest.mark.parametrize("shape", [(500,), (500, 3), (3, 500)])
def test_arrays_keep_shape_and_type(tmp_path, dtype, shape):
    array = np.resize(WAVE % 100, shape).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    recording = readers.read(tmp_path / "a.npy", 250)
    upright = array.reshape(500, 1) if array.ndim == 1 else array.T if shape[0] == 3 else array
    np.testing.assert_array_equal(recording.signal, upright.astype(float))
    signal = recording.signal.copy()
    signal[:3, 0] = 2.6, 1e30, np.nan
    readers.write(recording, signal, tmp_path / "b.npy")
    expected = upright.copy()
    is_float = expected.dtype.kind == "f"
    top = np.finfo(dtype).max if is_float else np.iinfo(dtype).max
    expected[:3, 0] = np.array([2.6, min(1e30, float(top)), np.nan]) if is_float else [3, top, upright[2, 0]]
    found = np.load(tmp_path / "b.npy")
    assert (found.dtype, found.shape) == (array.dtype, shape)
    result = found.reshape(500, 1) if array.ndim == 1 else found.T if shape[0] == 3 else found
    if dtype == "i8":  # the largest that a float can be
        assert result[1, 0] > 2**63 - 2**12
        expected[1, 0] = result[1, 0]
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_keeps_the_other_arrays(tmp_path, save):
    others = {"fs": np.array(360.0), "labels": np.array(["N", "V"]), "peaks": np.arange(7)}
    save(tmp_path / "a.npz", ECG=np.stack([WAVE, WAVE], 1).astype(np.float32), **others)
    recording = readers.read(tmp_path / "a.npz")
    assert (recording.sampling_rate, recording.signal.shape) == (360, (500, 2))
    readers.write(recording, recording.signal + [2, 0], tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as file:
        assert sorted(file.files) == sorted(["ECG", *others])
        np.testing.assert_array_equal(file["ECG"], np.stack([WAVE + 2, WAVE], 1))
        assert file["ECG"].dtype == np.float32
        for name, array in others.items():
            np.testing.assert_array_equal(file[name], array)
    packings = [{m.compress_type for m in zipfile.ZipFile(tmp_path / name).infolist()} for name in ("a.npz", "b.npz")]
    assert packings[0] == packings[1]


def test_npz_takes_the_only_array_and_a_rate(tmp_path):
    np.savez(tmp_path / "a.npz", lead_ii=WAVE, subject=np.array("x"))
    np.testing.assert_array_equal(readers.read(tmp_path / "a.npz", 128).signal[:, 0], WAVE)


def test_names_and_units_of_an_npz_tell_its_leads(tmp_path):
    np.savez(
        tmp_path / "a.npz", data=np.stack([WAVE] * 3, 1), rate=250, names=["II", "PLETH", "X"], units=["mV", "", "mmHg"]
    )
    assert readers.read(tmp_path / "a.npz").leads == (0,)


@pytest.mark.parametrize("width, dtype", [(1, "u1"), (2, "<i2"), (4, "<i4")])
def test_wav_keeps_type_and_clips(tmp_path, width, dtype):
    limits = np.iinfo(dtype)
    values = np.stack([WAVE % 90, WAVE % 80], 1).astype(dtype)
    wav_file(tmp_path / "a.wav", width, values.tobytes())
    recording = readers.read(tmp_path / "a.wav")
    assert recording.sampling_rate == 300
    np.testing.assert_array_equal(recording.signal, values)
    signal = recording.signal.copy()
    signal[:3, 1] = 1e12, -1e12, 5.4
    readers.write(recording, signal, tmp_path / "b.wav")
    expected = values.copy()
    expected[:3, 1] = limits.max, limits.min, 5
    with wave.open(str(tmp_path / "b.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, width, 300)
        assert file.readframes(1000) == expected.tobytes()


def test_wav_of_24_bits_and_of_floats(tmp_path):
    wav_file(tmp_path / "a.wav", 3, (np.repeat(WAVE, 2).astype("<i4") * 256).view("u1").reshape(-1, 4)[:, 1:].tobytes())
    recording = readers.read(tmp_path / "a.wav")
    np.testing.assert_array_equal(recording.signal[:, 0], WAVE * 256)  # as SciPy has it: in the upper bytes of four
    wavfile.write(tmp_path / "f.wav", 300, (WAVE / 1000).astype(np.float32))
    again = written(readers.read(tmp_path / "f.wav"), tmp_path / "g.wav", change=2)
    np.testing.assert_allclose(again.signal[:, 0], WAVE / 1000 + 2, atol=1e-6)
    assert wavfile.read(tmp_path / "g.wav")[1].dtype == np.float32


def truncated_wav():
    file = io.BytesIO()
    wavfile.write(file, 300, WAVE.astype(np.int16))
    return file.getvalue()[:-100]


def npy(array, cut=0):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()[: len(file.getvalue()) - cut]


def claim(dtype, shape):
    """An array's header with 1,000 bytes behind."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(1000)


def npz(**arrays):
    """Members of arrays or of bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        for name, array in arrays.items():
            members.writestr(f"{name}.npy", array if isinstance(array, bytes) else npy(array))
    return file.getvalue()


def packed(array):
    file = io.BytesIO()
    np.savez_compressed(file, x=array)
    return file.getvalue()


BAD = {  # files, the first of which is read; what is told
    **{f"empty {suffix}": ({f"a.{suffix}": b""}, "is empty") for suffix in ("npy", "npz", "wav")},
    **{f"no {suffix}": ({f"a.{suffix}": b"\x07 of nothing " * 99}, "cannot read") for suffix in ("npy", "npz", "wav")},
    "objects": ({"a.npy": npy(np.array([{}, []], object))}, "allow_pickle"),
    "objects beside": ({"a.npz": npz(signal=WAVE, x=np.array([{}], object))}, "allow_pickle"),
    "complex": ({"a.npy": npy(np.ones(9, complex))}, "complex128"),
    "cube": ({"a.npy": npy(np.ones((9, 9, 9)))}, r"\[9, 9, 9\]"),
    "truncated npy": ({"a.npy": npy(WAVE, 80)}, "cannot read"),
    "a large shape": ({"a.npy": claim("<i8", (10**10,))}, r"\[10000000000\] in 1128 bytes"),
    "a shape beyond numbers": ({"a.npy": claim("<i8", (2**62, 2**62, 4))}, "in 1128 bytes"),
    "a negative shape": ({"a.npy": claim("<i8", (-1,))}, r"\[-1\] in 1128 bytes"),
    "a wide type": ({"a.npy": claim("V2000000000", (2,))}, "in 1128 bytes"),
    "a bomb": (
        {"a.npz": packed(np.zeros(2**18))},
        "would take 2 MB of memory; expected four times its 0.0 MB and 1 at",
    ),
    "a bomb of many": ({"a.npz": npz(**{f"a{index}": np.zeros(1) for index in range(1100)})}, "1100 arrays"),
    "a large directory": ({"a.npz": npz(**{f"{index:0>1000}": b"" for index in range(1030)})}, "a directory of 1"),
    "a large shape in npz": ({"a.npz": npz(x=claim("<i8", (10**10,)))}, r"\[10000000000\] in 1128 bytes"),
    "truncated npz": ({"a.npz": npz(x=WAVE)[:-300]}, "cannot read"),
    "two arrays": ({"a.npz": npz(a=WAVE, b=WAVE)}, "holds a, b"),
    "truncated wav": ({"a.wav": truncated_wav()}, "cannot read"),
}


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_one_line_for_the_user(tmp_path, name):
    files, told = BAD[name]
    assert re.search(told, refusal(tmp_path, files, 250))
