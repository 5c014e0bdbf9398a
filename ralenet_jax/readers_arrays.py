"""Recordings that are little but an array: NPY, NPZ and WAV."""

import dataclasses
import math
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from scipy.io import wavfile

from ralenet_jax.errors import UserError
from ralenet_jax.readers_recording import Recording, blocks, check_memory, find_leads, open_archive

_MOST_ARRAYS = 2**10  # of an NPZ


def _read_array(file: BinaryIO, size: int) -> np.ndarray:
    """Reads one array from a file of so many bytes; refuses a header that tells of more, which NumPy makes room for."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of what its header is as Python
        shape, _, dtype = read_header(file)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"{dtype} {list(shape)} in {size} bytes")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def read_npy(path: Path, rate: float | None) -> Recording:
    """Reads one array."""
    with path.open("rb") as file:
        array = _read_array(file, path.stat().st_size)
    return _array_recording(array, rate, path, "npy", array)


def write_npy(recording: Recording, new: dict[int, np.ndarray], path: Path) -> None:
    """Writes an array of the same shape and type."""
    with path.open("wb") as file:  # by name, NumPy would add a suffix
        np.save(file, _with(recording.keep, new), allow_pickle=False)


def convert_npy(recording: Recording, signal: np.ndarray, path: Path) -> None:
    """Writes float64 `[L, channels]`."""
    with path.open("wb") as file:
        np.save(file, signal, allow_pickle=False)


def read_npz(path: Path, rate: float | None) -> Recording:
    """Reads the array named signal, ecg, data or x, or the only one; its rate, names and units where they are."""
    with open_archive(path) as members:
        infos = [member for member in members.infolist() if member.filename.endswith(".npy")]
        if len(infos) > _MOST_ARRAYS:
            raise ValueError(f"{len(infos)} arrays")
        check_memory(path, sum(member.file_size for member in infos), path.stat().st_size)
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in infos)
        arrays = {}
        for member in infos:
            with members.open(member) as file:
                arrays[member.filename.removesuffix(".npy")] = _read_array(file, member.file_size)
    sized = [
        name for name, array in arrays.items() if array.dtype.kind in "iuf" and array.ndim in (1, 2) and array.size > 1
    ]
    named = [name for wanted in ("signal", "ecg", "data", "x") for name in arrays if name.lower() == wanted]
    if not named and len(sized) != 1:
        raise UserError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; expected an array named signal, ecg, data or x"
        )
    key = named[0] if named else sized[0]
    rates = [arrays[name] for name in arrays if name.lower() in ("fs", "sampling_rate", "rate")]
    found = float(rates[0].reshape(-1)[0]) if rates and rates[0].size == 1 else rate
    recording = _array_recording(arrays[key], found, path, "npz", {"arrays": arrays, "key": key, "packed": packed})
    texts = {name: tuple(map(str, arrays[name].reshape(-1))) for name in ("names", "units") if name in arrays}
    if texts.keys() == {"names", "units"} and {len(text) for text in texts.values()} == {len(recording.names)}:
        recording = dataclasses.replace(recording, **texts, leads=find_leads(**texts))
    return recording


def write_npz(recording: Recording, new: dict[int, np.ndarray], path: Path) -> None:
    """Writes the same arrays but for the signal."""
    keep = recording.keep
    arrays = keep["arrays"] | {keep["key"]: _with(keep["arrays"][keep["key"]], new)}
    packing = zipfile.ZIP_DEFLATED if keep["packed"] else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", packing) as members:
        for name, array in arrays.items():
            with members.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def convert_npz(recording: Recording, signal: np.ndarray, path: Path) -> None:
    """Writes the signal with its rate, names and units."""
    texts = {"names": np.array(recording.names), "units": np.array(recording.units)}
    with path.open("wb") as file:
        np.savez(file, signal=signal, fs=recording.sampling_rate, **texts)


def read_wav(path: Path, rate: float | None) -> Recording:
    """Reads integers or floats, in steps of the file's."""
    found, array = wavfile.read(path)
    return _array_recording(array, float(found), path, "wav", array)


def write_wav(recording: Recording, new: dict[int, np.ndarray], path: Path) -> None:
    """Writes the same type of number."""
    wavfile.write(path, int(recording.sampling_rate), _with(recording.keep, new))


def convert_wav(recording: Recording, signal: np.ndarray, path: Path) -> None:
    """Writes floats of 32 bits; refuses a rate that is no integer."""
    if not recording.sampling_rate.is_integer():
        raise UserError(f"{path}: WAV has no rate of {recording.sampling_rate:g} Hz; name an output of another format")
    wavfile.write(path, int(recording.sampling_rate), signal.astype(np.float32))


def _array_recording(array: np.ndarray, rate: float | None, path: Path, kind: str, keep: Any) -> Recording:
    """A recording of an array `[L]`, `[L, channels]` or, with channels < 32 < L, `[channels, L]`."""
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2):
        found = f"{array.dtype} {list(array.shape)}"
        raise UserError(f"{path} holds {found}; expected integers or floats of shape [L] or [L, channels]")
    view = _upright(array)
    leads = tuple(range(view.shape[1]))
    names, units = tuple(f"ch{index}" for index in leads), ("",) * len(leads)
    dtype = np.float32 if array.dtype.itemsize <= (4 if array.dtype.kind == "f" else 2) else np.float64
    return Recording(
        lambda part: view[part].astype(np.float64), len(view), rate or 0.0, names, units, leads, path, kind, keep, dtype
    )


def _upright(array: np.ndarray) -> np.ndarray:
    """`[L, channels]`: a view of the array."""
    if array.ndim == 1:
        return array[:, None]
    return array.T if array.shape[0] < 32 < array.shape[1] else array


def _with(array: np.ndarray, new: dict[int, np.ndarray]) -> np.ndarray:
    array = array.copy()
    view = _upright(array)
    for channel, values in new.items():
        for part in blocks(len(view), 1):
            view[part, channel] = _cast(values[part].astype(np.float64), view[part, channel])
    return array


def _cast(values: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Values as the original's type of number, clipped; where an integer cannot be NaN, the original's."""
    if original.dtype.kind == "f":
        limit = np.finfo(original.dtype).max
        return np.clip(values, -limit, limit).astype(original.dtype)
    limits = np.iinfo(original.dtype)
    highest = float(limits.max) if limits.bits < 64 else float(limits.max - 2**10)
    result = original.copy()
    there = ~np.isnan(values)
    result[there] = np.clip(np.rint(values[there]), float(limits.min), highest).astype(original.dtype)
    return result
