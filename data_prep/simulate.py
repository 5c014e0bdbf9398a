"""Small made-up databases in PhysioNet's file layout: the same builders read them, without a download.

The heartbeats come from NeuroKit2's ECGSYN (McSharry et al. 2003, doi:10.1109/TBME.2003.808805), the noise is shaped
white noise. They are for trying and testing the software: no figure obtained on them speaks of real recordings.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import scipy.signal
import wfdb

from data_prep.physionet import CHECKSUMS, DATABASES, RECORDS, PrepareError

try:
    import neurokit2
except ImportError as error:
    raise ImportError(
        'simulated databases need the library neurokit2; install it with: pip install "ralenet_jax[demo]"'
    ) from error

MARKER = "SIMULATED.json"
_LAYOUT = 1  # goes up when the same seed gives other files

# Record and its minutes; what trains, validates and tests is decided by name, as for the real database.
_MITDB = {
    **dict.fromkeys(("101", "106", "108", "112", "114"), 4.0),  # train
    **dict.fromkeys(("109", "116"), 1.0),  # validation
    **dict.fromkeys(("100", "103", "105"), 2.0),  # test
    "102": 0.4,  # paced
}
_NSTDB_MINUTES = 6.0
_LUDB = ("1", "2", "3", "4", "5")  # 5 tests: its number divides by five
_LUDB_SECONDS = 10
_LUDB_QRS_HALF_S = 0.05

_START_S = 2  # left out: ECGSYN begins on top of an R wave and needs a while to swing in

# WFDB format, its bits, ADC units per mV, and at 0 mV; as in the real databases (ludb's gains vary there).
_STORAGE = {"mitdb": ("212", 12, 200, 1024), "nstdb": ("212", 12, 200, 0), "ludb": ("16", 16, 1000, 0)}

# Of ECGSYN's waves P Q R S T: angles in degrees (the R peak stands at 0), heights, widths in radians. Records have
# wider ones, never narrower: the library's integrator may step over a narrow QRS.
_ANGLES = np.array([-70.0, -15.0, 0.0, 15.0, 100.0])
_WIDTHS = np.array([0.25, 0.1, 0.1, 0.1, 0.4])
_HEIGHTS = {"MLII": np.array([1.2, -5.0, 30.0, -7.5, 0.75]), "V1": np.array([0.6, 0.0, 8.0, -22.0, 0.4])}
# A ventricular beat: no P wave, a QRS three times as wide, the T wave against it.
_VENTRICULAR_WIDTHS = np.array([0.25, 0.25, 0.3, 0.25, 0.45])
_VENTRICULAR_HEIGHTS = {"MLII": np.array([0.0, -3.0, 20.0, 0.0, -1.5]), "V1": np.array([0.0, 4.0, -18.0, 0.0, 1.0])}


def write(directory: str | os.PathLike, seed: int = 0) -> Path:
    """Writes simulated mitdb, nstdb and ludb below a folder, laid out as on PhysioNet's file server.

    mitdb: 2 leads, 360 Hz, normal beats (N) and a few early ventricular ones (V), a patient for each record. nstdb: bw,
    em and ma, 2 channels, 360 Hz. ludb: 12 leads, 500 Hz, QRS complexes annotated for lead ii. The same seed gives the
    same bytes. The folder appears whole or not at all; a finished one of the same seed is left as it is.

    Args:
        directory: the folder, new, empty, or written by this function before.
        seed: any integer from 0 on.

    Returns:
        The folder.

    Raises:
        PrepareError: the folder holds something else, or cannot be written.
    """
    directory = Path(directory)
    marker = {"simulated": True, "layout": _LAYOUT, "seed": seed, "neurokit2": neurokit2.__version__}
    try:
        if _is_ours(directory) and json.loads((directory / MARKER).read_text(encoding="utf-8")) == marker:
            return directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
            new = Path(scratch) / "new"
            for name, writer in {"mitdb": _write_mitdb, "nstdb": _write_nstdb, "ludb": _write_ludb}.items():
                folder = new / DATABASES[name].folder
                folder.mkdir(parents=True)
                _write_lists(folder, writer(folder, seed))
            (new / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
            if directory.exists():
                os.rename(directory, Path(scratch) / "old")
            os.rename(new, directory)
    except OSError as error:
        raise PrepareError(
            f"cannot write simulated databases to {directory}: {error.strerror or error}; "
            "free space or choose another folder"
        ) from error
    return directory


def _is_ours(directory: Path) -> bool:
    """Tells whether the folder was written here (True) or may be (False, new or empty); refuses any other."""
    if (directory / MARKER).is_file():
        return True
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PrepareError(
            f"{directory} holds something else than simulated databases; expected a new or empty folder: choose another"
        )
    return False


def _write_record(path: Path, database: str, signal: np.ndarray, names: list[str]) -> None:
    """Writes the header and the signal, [L, leads] in mV, of one record."""
    number_format, bits, gain, baseline = _STORAGE[database]
    highest = 2 ** (bits - 1) - 1  # the lowest number, -highest - 1, stands for a missing sample
    wfdb.wrsamp(
        path.name,
        DATABASES[database].sampling_rate,
        ["mV"] * len(names),
        names,
        d_signal=np.clip(np.round(signal * gain + baseline), -highest, highest).astype(np.int64),
        fmt=[number_format] * len(names),
        adc_gain=[gain] * len(names),
        baseline=[baseline] * len(names),
        comments=["Simulated: no patient"],
        write_dir=str(path.parent),
    )


def _write_lists(folder: Path, records: list[str]) -> None:
    """Writes RECORDS, and SHA256SUMS.txt over all files of a database."""
    (folder / RECORDS).write_text("".join(f"{record}\n" for record in records), encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.relative_to(folder).as_posix()}\n" for path in files
    ]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


@dataclasses.dataclass
class _Patient:
    """What makes one record differ from the next; drawn once for each."""

    rng: np.random.Generator
    heart_rate: float  # beats per minute
    heart_rate_std: float
    rhythm_seed: int  # the same for all leads: they beat together
    angles: np.ndarray  # degrees, [5]
    widths: np.ndarray  # factors, [5]

    @classmethod
    def draw(cls, seed: int, database: int, record: int) -> "_Patient":
        rng = np.random.default_rng([seed, database, record])
        return cls(
            rng,
            heart_rate=rng.uniform(62, 100),
            heart_rate_std=rng.uniform(1, 5),
            rhythm_seed=int(rng.integers(2**31)),
            angles=_ANGLES + rng.normal(0, [6, 1, 0, 1, 8]),
            widths=rng.uniform(1.0, 1.3, 5),
        )

    def lead(self, seconds: float, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """One lead by ECGSYN: float64 [L] at 360 Hz, mV, about 0 between the beats."""
        rate = DATABASES["mitdb"].sampling_rate
        start = _START_S * rate
        signal = neurokit2.ecg_simulate(
            length=round(seconds * rate) + start,
            # ECGSYN works out the next power of two of these seconds: those of the start are among them
            duration=seconds,
            sampling_rate=rate,
            noise=0,
            heart_rate=self.heart_rate,
            heart_rate_std=self.heart_rate_std,
            random_state=self.rhythm_seed,
            ti=self.angles,
            ai=heights,
            bi=widths * self.widths,
        )[start:]
        return signal - np.median(signal)


def _write_mitdb(folder: Path, seed: int) -> list[str]:
    for index, (record, minutes) in enumerate(_MITDB.items()):
        patient = _Patient.draw(seed, 0, index)
        signal, peaks, symbols = _two_leads(patient, 60 * minutes)
        _write_record(folder / record, "mitdb", signal, list(_HEIGHTS))
        # As in the real database, a change of rhythm is annotated too: not every annotation is a beat.
        wfdb.wrann(
            record,
            "atr",
            np.concatenate([[0], peaks]),
            ["+", *symbols],
            aux_note=["(N", *[""] * len(peaks)],
            write_dir=str(folder),
        )
    return sorted(_MITDB)


def _two_leads(patient: _Patient, seconds: float) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A recording of two leads: signal float64 [L, 2] in mV, R peaks int [N] in samples, symbols [N]."""
    rate, rng = DATABASES["mitdb"].sampling_rate, patient.rng
    amplitudes = rng.uniform(0.8, 1.5, len(_HEIGHTS))
    shapes = {name: heights * rng.lognormal(0, 0.2, 5) for name, heights in _HEIGHTS.items()}
    signal = np.stack([patient.lead(seconds, heights, _WIDTHS) for heights in shapes.values()], axis=1) * amplitudes
    peaks = _r_peaks(signal[:, 0], rate)
    strip = [patient.lead(13, heights, _VENTRICULAR_WIDTHS) for heights in _VENTRICULAR_HEIGHTS.values()]
    strip = np.stack(strip, axis=1) * amplitudes * rng.uniform(1.0, 1.4)
    symbols = _put_ventricular_beats(signal, peaks, strip, rng, share=rng.uniform(0.02, 0.1))
    # Breathing moves the heart: all waves grow and shrink by a few per cent with every breath.
    breath = 2 * np.pi * (rng.uniform(0.2, 0.3) * np.arange(len(signal)) / rate + rng.uniform())
    return signal * (1 + rng.uniform(0.02, 0.06) * np.sin(breath))[:, None], peaks, symbols


def _r_peaks(lead: np.ndarray, rate: int) -> np.ndarray:
    """R peaks of a clean lead, int [N]; the simulator does not tell where it put them."""
    _, found = neurokit2.ecg_peaks(lead, sampling_rate=rate)
    return np.asarray(found["ECG_R_Peaks"], np.int64)


def _put_ventricular_beats(
    signal: np.ndarray, peaks: np.ndarray, strip: np.ndarray, rng: np.random.Generator, share: float
) -> list[str]:
    """Puts ventricular beats from a strip in the place of a share of the normal ones, each a little early.

    Args:
        signal: [L, 2], changed in place.
        peaks: int [N], the moved peaks changed in place.
        strip: [M, 2], ventricular beats only.
        rng: draws which beats.
        share: of all beats, 0 to 1.

    Returns:
        The symbols, "N" or "V", [N].
    """
    rate = DATABASES["mitdb"].sampling_rate
    symbols = ["N"] * len(peaks)
    strip_peaks = _r_peaks(strip[:, 0], rate)[1:-1]
    ramp = np.hanning(2 * (rate // 15) + 2)[1 : rate // 15 + 1, None]
    normal_peaks = peaks.copy()
    for beat in np.flatnonzero(rng.random(len(peaks)) < share):
        if not 2 <= beat < len(peaks) - 2 or symbols[beat - 1] == "V":
            continue
        interval = normal_peaks[beat] - normal_peaks[beat - 1]
        # From after the last T wave to before the next P wave; the early beat takes the room of the normal one.
        begin, end = normal_peaks[beat] - round(0.46 * interval), normal_peaks[beat] + round(0.5 * interval)
        place = normal_peaks[beat] - round(0.15 * interval)
        source = rng.choice(strip_peaks) + begin - place
        piece = strip[source : source + end - begin]
        weight = np.concatenate([ramp, np.ones((end - begin - 2 * len(ramp), 1)), ramp[::-1]])
        signal[begin:end] += weight * (piece - signal[begin:end])
        peaks[beat] = place
        symbols[beat] = "V"
    return symbols


def _write_nstdb(folder: Path, seed: int) -> list[str]:
    rate = DATABASES["nstdb"].sampling_rate
    length = round(60 * _NSTDB_MINUTES * rate)
    makers = {"bw": _baseline_wander, "em": _electrode_motion, "ma": _muscle_artifact}
    for index, (record, make) in enumerate(makers.items()):
        rng = np.random.default_rng([seed, 1, index])
        _write_record(folder / record, "nstdb", make(length, rate, rng), ["noise1", "noise2"])
    return sorted(makers)


def _shaped(length: int, rate: int, band, kind: str, rng: np.random.Generator) -> np.ndarray:
    """White noise through a Butterworth filter with edges in Hz: [length, 2], each channel with power one.

    The channels share half of their power, as electrodes of one body do.
    """
    margin = 10 * rate  # a slow filter needs time to forget where it began
    white = rng.normal(size=(length + 2 * margin, 3))
    sos = scipy.signal.butter(2, band, kind, fs=rate, output="sos")
    filtered = scipy.signal.sosfiltfilt(sos, white[:, :2] + white[:, 2:], axis=0)[margin:-margin]
    return filtered / filtered.std(axis=0)


def _baseline_wander(length: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Slow drift below 0.5 Hz: float64 [length, 2], mV."""
    return _shaped(length, rate, 0.4, "lowpass", rng) * [0.47, 0.2]


def _electrode_motion(length: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Abrupt jumps that decay, over noise of 1 to 10 Hz: float64 [length, 2], mV."""
    events = rng.random(length) < 0.8 / rate
    jumps = events * rng.laplace(scale=1.0, size=length)
    kernel = np.exp(-np.arange(3 * rate) / (0.35 * rate))
    steps = scipy.signal.fftconvolve(jumps, kernel)[:length]
    sos = scipy.signal.butter(2, 25, "lowpass", fs=rate, output="sos")  # a contact breaks fast, not at once
    steps = scipy.signal.sosfilt(sos, steps)[:, None] * [0.9, -0.3]
    return steps + _shaped(length, rate, (1, 10), "bandpass", rng) * [0.25, 0.08]


def _muscle_artifact(length: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Broadband noise of 8 to 120 Hz that comes in bursts, over a little drift: float64 [length, 2], mV."""
    strength = np.exp(0.5 * _shaped(length, rate, 0.3, "lowpass", rng))
    drift = _shaped(length, rate, 0.5, "lowpass", rng) * 0.04
    return strength * _shaped(length, rate, (8, 120), "bandpass", rng) * 0.15 + drift


def _write_ludb(folder: Path, seed: int) -> list[str]:
    rate = DATABASES["ludb"].sampling_rate
    (folder / "data").mkdir()
    for index, record in enumerate(_LUDB):
        rng = np.random.default_rng([seed, 2, index])
        leads = neurokit2.ecg_simulate(
            length=(_LUDB_SECONDS + _START_S) * rate,
            duration=_LUDB_SECONDS,
            sampling_rate=rate,
            noise=0,
            heart_rate=rng.uniform(55, 95),
            heart_rate_std=rng.uniform(1, 4),
            method="multileads",
            bi=_WIDTHS * 1.25,
            random_state=int(rng.integers(2**31)),
        )[_START_S * rate :]
        signal = (leads.to_numpy() - leads.median().to_numpy()) * rng.uniform(0.7, 1.6, leads.shape[1])
        _write_record(folder / "data" / record, "ludb", signal, [name.lower() for name in leads.columns])
        half = round(_LUDB_QRS_HALF_S * rate)
        peaks = _r_peaks(leads["I"].to_numpy(), rate)  # all leads beat together; the R wave of II is small here
        peaks = peaks[(peaks >= half) & (peaks < len(signal) - half)]
        samples = (peaks[:, None] + [-half, 0, half]).ravel()
        wfdb.wrann(record, "ii", samples, ["(", "N", ")"] * len(peaks), write_dir=str(folder / "data"))
    return [f"data/{record}" for record in _LUDB]
