"""Memory for recordings of 100 MB, written by other libraries: reading and writing take four times the file at most.

What would take more than that and a fixed amount is refused, as the tests of each format show.
"""

import functools
import subprocess
import sys
import wave
from pathlib import Path

import edfio
import numpy as np
import pytest
import wfdb

ROOT = Path(__file__).parents[1]
MEGABYTES = 100
MOST = 4  # times the file: what reading may take, and what writing may besides
CHILD = """
import sys
from pathlib import Path
from ralenet_jax import readers

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

def restart():
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return memory("VmRSS")

small, large = map(Path, sys.argv[1:3])
recording = readers.read(small, 250)  # imports
readers.write(recording, recording.signal + 1, small.with_name(f"small_out{small.suffix}"))
before = restart()
recording = readers.read(large, 250)
read = memory("VmHWM") - before
signal = recording.signal
signal[:, 0] += signal[:, 0].max() / 1000
before = restart()
readers.write(recording, signal, large.with_name(f"large_out{large.suffix}"))
print(read, memory("VmHWM") - before)
"""


def digital(length, channels):
    """Samples of 12 bits: a wave and noise."""
    noise = np.random.default_rng(0).integers(-200, 200, (length, channels), np.int16)
    return noise + np.round(900 * np.sin(np.arange(length) / 50))[:, None].astype(np.int16)


def record(folder, name, megabytes, fmt, width):
    samples = digital(int(megabytes * 1e6 / width / 2), 2)
    told = {"fmt": [fmt] * 2, "adc_gain": [200.0] * 2, "baseline": [0] * 2, "write_dir": str(folder)}
    wfdb.wrsamp(name, 250, ["mV"] * 2, ["I", "II"], d_signal=samples.astype(np.int64), **told)
    return folder / f"{name}.hea"


def skewed(folder, name, megabytes):
    header = record(folder, name, megabytes, "212", 1.5)
    header.write_text(header.read_text().replace(" 212 ", " 212:3 ", 1))
    return header


def segments(folder, name, megabytes, gains):
    """Of several gains there are no digital values of the whole."""
    samples = digital(int(megabytes * 1e6 / 4), 2)
    lines = [f"{name}/2 2 250 {len(samples) // 2 * 2}"]
    for number, gain in enumerate(gains):
        told = {"fmt": ["16"] * 2, "adc_gain": [gain] * 2, "baseline": [0] * 2, "write_dir": str(folder)}
        part = samples[: len(samples) // 2].astype(np.int64)
        wfdb.wrsamp(f"{name}_{number}", 250, ["mV"] * 2, ["I", "II"], d_signal=part, **told)
        lines.append(f"{name}_{number} {len(part)}")
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")
    return folder / f"{name}.hea"


def edf(folder, name, megabytes, make=edfio.Edf, make_signal=edfio.EdfSignal, dtype=np.int16, width=2):
    samples = digital(int(megabytes * 1e6 / width / 2) // 250 * 250, 2).astype(dtype)
    parts = [make_signal.from_digital(lead.copy(), 250, physical_dimension="uV") for lead in samples.T]
    path = folder / f"{name}.{make.__name__.lower()}"
    make(parts, data_record_duration=1).write(path)
    return path


bdf = functools.partial(edf, make=edfio.Bdf, make_signal=edfio.BdfSignal, dtype=np.int32, width=3)


def table(folder, name, megabytes):
    samples = digital(int(megabytes * 1e6 / 24), 2) / 200
    times = np.arange(len(samples)) / 250
    path = folder / f"{name}.csv"
    np.savetxt(
        path,
        np.column_stack([times, samples]),
        ["%.4f", "%.3f", "%.3f"],
        delimiter=",",
        header="time,I,II",
        comments="",
    )
    return path


def wav(folder, name, megabytes):
    with wave.open(str(folder / f"{name}.wav"), "wb") as file:
        file.setparams((2, 2, 250, 0, "NONE", ""))
        file.writeframes(digital(int(megabytes * 1e6 / 4), 2).tobytes())
    return folder / f"{name}.wav"


def npy(folder, name, megabytes):
    np.save(folder / f"{name}.npy", digital(int(megabytes * 1e6 / 4), 2))
    return folder / f"{name}.npy"


def npz(folder, name, megabytes, save=np.savez, width=2):
    save(folder / f"{name}.npz", signal=digital(int(megabytes * 1e6 / width / 2), 2), fs=250)
    return folder / f"{name}.npz"


FORMATS = {  # (folder, name, megabytes) → the path of a file of that size
    "wfdb 16": functools.partial(record, fmt="16", width=2),
    "wfdb 212": functools.partial(record, fmt="212", width=1.5),
    "wfdb 24": functools.partial(record, fmt="24", width=3),
    "wfdb 516": functools.partial(record, fmt="516", width=1.3),
    "wfdb skewed": skewed,
    "wfdb segments": functools.partial(segments, gains=(100.0, 200.0)),
    "wfdb segments alike": functools.partial(segments, gains=(200.0, 200.0)),
    **{"edf": edf, "bdf": bdf, "csv": table, "wav": wav, "npy": npy, "npz": npz},
    "npz packed": functools.partial(npz, save=np.savez_compressed, width=1.4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_takes_four_times_its_size_at_most(tmp_path, name):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux alone tells the peak of a part of a run")
    small, large = (FORMATS[name](tmp_path, part, size) for part, size in (("small", 0.1), ("large", MEGABYTES)))
    size = sum(file.stat().st_size for file in tmp_path.glob("large*"))
    command = [sys.executable, "-c", CHILD, str(small), str(large)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert not found.returncode, found.stderr
    read, write = (int(text) / size for text in found.stdout.split())
    print(f"{name}: {size / 1e6:.0f} MB, read {read:.2f} times the file, write {write:.2f} times besides")
    assert read < MOST and write < MOST
