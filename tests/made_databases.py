"""Tiny databases in PhysioNet's layout, written with wfdb, for the tests of data_prep."""

import hashlib
from pathlib import Path

import numpy as np
import wfdb

PEAKS = {"+": 10, "N": 127, "L": 128, "V": 500, "~": 600, "A": 1872, "/": 1873}  # in 2,000 samples; L, V, A have room


def write_mitdb(root: Path, records=("100", "101", "102"), peaks=None, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes mitdb; returns {record: ADC integers int16 [2000, 2]}."""
    folder = _folder(root, "mitdb/1.0.0")
    peaks = PEAKS if peaks is None else peaks
    signals = {}
    for record in records:
        signals[record] = np.random.default_rng([seed, int(record)]).integers(-2000, 2000, (2000, 2), dtype=np.int16)
        _write_signal(folder, record, signals[record], 360, "212", [200, 100], [1024, 1000], ["MLII", "V5"])
        wfdb.wrann(record, "atr", np.array(list(peaks.values())), list(peaks), write_dir=str(folder))
    write_lists(folder, records)
    return signals


def write_nstdb(root: Path, records=("bw", "em", "ma"), others=("118e00",)) -> dict[str, np.ndarray]:
    """Writes nstdb, whose RECORDS also names ECG records that are not there; returns {record: int16 [1500, 2]}."""
    folder = _folder(root, "nstdb/1.0.0")
    signals = {}
    for seed, record in enumerate(records):
        signals[record] = np.random.default_rng(seed).integers(-2000, 2000, (1500, 2), dtype=np.int16)
        _write_signal(folder, record, signals[record], 360, "212", [200, 200], [0, 0], ["noise1", "noise2"])
    write_lists(folder, [*others, *records])
    return signals


def write_ludb(root: Path, numbers=("1", "5", "10", "12")) -> dict[str, np.ndarray]:
    """Writes ludb, R peaks at samples 177, 178, 1000, 2600 of 2,777; returns {number: ADC integers [2777, 12]}."""
    folder = _folder(root, "ludb/1.0.1")
    (folder / "data").mkdir(exist_ok=True)
    leads = "i ii iii avr avl avf v1 v2 v3 v4 v5 v6".split()
    signals = {}
    for number in numbers:
        steps = np.random.default_rng(int(number)).integers(-40, 41, (2777, 12))
        signals[number] = steps.cumsum(axis=0).astype(np.int16)
        _write_signal(folder / "data", number, signals[number], 500, "16", [1000] * 12, list(range(12)), leads)
        waves, samples = ["(", "N", "N", ")", "N", "p", "N"], np.array([150, 177, 178, 200, 1000, 2500, 2600])
        wfdb.wrann(number, "ii", samples, waves, write_dir=str(folder / "data"))
    write_lists(folder, [f"data/{number}" for number in numbers])
    return signals


def write_lists(folder: Path, records) -> None:
    """Writes RECORDS and SHA256SUMS.txt over what lies in the folder."""
    (folder / "RECORDS").write_text("".join(f"{record}\n" for record in records))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS.txt")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.relative_to(folder)}\n" for path in files]
    (folder / "SHA256SUMS.txt").write_text("".join(lines))


def tree(folder: Path) -> dict[str, bytes]:
    """Reads every file below a folder, {relative path: content}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_signal(folder, record, signal, fs, fmt, gain, baseline, leads) -> None:
    count = len(leads)
    wfdb.wrsamp(
        record,
        fs=fs,
        units=["mV"] * count,
        sig_name=leads,
        d_signal=signal,
        fmt=[fmt] * count,
        adc_gain=[float(value) for value in gain],
        baseline=baseline,
        write_dir=str(folder),
    )
