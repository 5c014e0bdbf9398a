"""The simulated databases: PhysioNet's layout, true annotations, the same bytes from the same seed."""

import errno
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import wfdb

from data_prep import physionet, simulate

CHECKOUT = Path(__file__).parents[1]
SMALL = {"101": 0.5, "109": 0.5, "100": 0.5}


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "_MITDB", SMALL)
        patch.setattr(simulate, "_NSTDB_MINUTES", 2)
        patch.setattr(simulate, "_LUDB", ("4", "5"))
        yield


@pytest.fixture(scope="module")
def root(patched, tmp_path_factory):
    return simulate.write(tmp_path_factory.mktemp("simulated") / "physionet")


@pytest.fixture
def instant(monkeypatch):
    """Writers that take no time, for tests of what is around them."""
    for name in ("mitdb", "nstdb", "ludb"):
        monkeypatch.setattr(simulate, f"_write_{name}", lambda folder, seed: (folder / "a").write_text("a") and ["a"])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def beats(root, record):
    path = str(root / "mitdb/1.0.0" / record)
    annotation = wfdb.rdann(path, "atr")
    symbol = np.array(annotation.symbol)
    assert symbol[0] == "+"
    return wfdb.rdrecord(path).p_signal, annotation.sample[1:], symbol[1:]


def test_the_records_train_validate_and_test():
    assert set(simulate._MITDB) == set("101 106 108 112 114 109 116 100 103 105 102".split())
    train = sum(simulate._MITDB[record] for record in "101 106 108 112 114".split())
    assert train * 75 >= 1500  # windows, at an ordinary heart rate
    assert simulate._NSTDB_MINUTES >= 5


def test_layout_is_physionets(root):
    records = {
        name: (root / name / "RECORDS").read_text().split() for name in ("mitdb/1.0.0", "nstdb/1.0.0", "ludb/1.0.1")
    }
    assert records == {
        "mitdb/1.0.0": ["100", "101", "109"],
        "nstdb/1.0.0": ["bw", "em", "ma"],
        "ludb/1.0.1": ["data/4", "data/5"],
    }
    for name, database in physionet.DATABASES.items():
        assert physionet.verify(database, root).records == tuple(records[database.folder]), name
        listed = dict(
            reversed(line.split(" ")) for line in (root / database.folder / "SHA256SUMS.txt").read_text().splitlines()
        )
        present = contents(root / database.folder)
        present.pop("SHA256SUMS.txt")
        assert listed == {path: hashlib.sha256(data).hexdigest() for path, data in present.items()}


@pytest.mark.parametrize(
    ("record", "rate", "seconds", "leads", "number_format", "gain", "baseline"),
    [
        ("mitdb/1.0.0/101", 360, 30, ["MLII", "V1"], "212", 200, 1024),
        ("nstdb/1.0.0/em", 360, 120, ["noise1", "noise2"], "212", 200, 0),
        ("ludb/1.0.1/data/5", 500, 10, "i ii iii avr avl avf v1 v2 v3 v4 v5 v6".split(), "16", 1000, 0),
    ],
)
def test_records_are_like_the_real_ones(root, record, rate, seconds, leads, number_format, gain, baseline):
    read = wfdb.rdrecord(str(root / record), physical=False)
    assert (read.fs, read.sig_len, read.sig_name) == (rate, rate * seconds, leads)
    assert set(read.fmt) == {number_format}
    assert set(read.adc_gain) == {gain}
    assert set(read.baseline) == {baseline}
    millivolts = (read.d_signal - baseline) / gain
    assert (millivolts.std(0) > 0.05).all()
    assert np.abs(millivolts).max() < 8
    assert read.checksum == read.calc_checksum()


@pytest.mark.parametrize("record", SMALL)
def test_normal_beats_stand_on_the_r_peaks(root, record):
    signal, peaks, symbols = beats(root, record)
    normal = peaks[symbols == "N"]
    assert len(peaks) > 25
    # Nothing else in the lead is as steep: an independent look for the R peaks in the band of the QRS.
    band = scipy.signal.sosfiltfilt(scipy.signal.butter(2, (8, 40), "bandpass", fs=360, output="sos"), signal[:, 0])
    found, _ = scipy.signal.find_peaks(band, height=0.35 * np.percentile(band[normal], 50), distance=100)
    distance = np.abs(normal[:, None] - found).min(1)
    assert np.median(distance) <= 1
    assert distance.max() <= 5
    assert 0.4 < np.diff(peaks).min() / 360
    assert np.diff(peaks).max() / 360 < 1.7


def test_ventricular_beats_are_wide_and_early(patched):
    widths, intervals = {"N": [], "V": []}, {"N": [], "V": []}
    for index in range(3):
        patient = simulate._Patient.draw(1, 0, index)
        signal, peaks, symbols = simulate._two_leads(patient, 29)
        assert symbols.count("V") < 0.25 * len(symbols)
        half = scipy.signal.peak_widths(signal[:, 0], peaks, rel_height=0.5)[0]
        for beat in range(1, len(peaks) - 1):
            widths[symbols[beat]].append(half[beat])
            if symbols[beat - 1] == "N":
                intervals[symbols[beat]].append(peaks[beat] - peaks[beat - 1])
    assert len(widths["V"]) >= 3
    assert min(widths["V"]) > 1.5 * np.median(widths["N"])
    assert np.median(intervals["V"]) < 0.9 * np.median(intervals["N"])


def test_patients_differ(root):
    rates = [360 * 60 / np.median(np.diff(beats(root, record)[1])) for record in SMALL]
    assert np.ptp(rates) > 5
    shapes = []
    for record in SMALL:
        signal, peaks, symbols = beats(root, record)
        middle = peaks[symbols == "N"][5:-5]
        shapes.append(np.median([signal[peak - 100 : peak + 100].ravel() for peak in middle], 0))
    assert np.corrcoef(shapes)[np.triu_indices(3, 1)].max() < 0.995


def test_noises_have_their_characters(root):
    shares, jumps = {}, {}
    for name in ("bw", "em", "ma"):
        noise = wfdb.rdrecord(str(root / "nstdb/1.0.0" / name)).p_signal[:, 0]
        frequency, power = scipy.signal.welch(noise, 360, nperseg=8192)
        shares[name] = [
            power[(frequency >= low) & (frequency < high)].sum() / power.sum() for low, high in ((0, 1), (8, 180))
        ]
        jumps[name] = np.abs(np.diff(noise.reshape(-1, 18).mean(1))).max()  # from one 50 ms to the next, mV
    assert shares["bw"][0] > 0.95
    assert shares["ma"][1] > 0.8
    assert shares["em"][0] < 0.9
    assert shares["em"][1] < 0.3
    assert jumps["em"] > 2
    assert max(jumps["bw"], jumps["ma"]) < 1


def test_ludb_annotations_bracket_the_qrs(root):
    for record in ("4", "5"):
        path = str(root / "ludb/1.0.1/data" / record)
        annotation = wfdb.rdann(path, "ii")
        assert annotation.symbol == ["(", "N", ")"] * (len(annotation.symbol) // 3)
        assert len(annotation.symbol) // 3 >= 7
        begin, peak, end = annotation.sample.reshape(-1, 3).T
        assert (begin < peak).all()
        assert (peak < end).all()
        lead = wfdb.rdrecord(path).p_signal[:, 0]
        for sample in peak:  # lead i: the highest point for 0.15 s on both sides
            low = max(sample - 75, 0)
            assert abs(low + np.argmax(lead[low : sample + 75]) - sample) <= 2


def test_the_seed_decides_the_bytes(root, patched, tmp_path):
    same = contents(simulate.write(tmp_path / "same"))
    assert same == contents(root)
    other = contents(simulate.write(tmp_path / "other", seed=1))
    assert same.keys() == other.keys()
    changed = {name for name in same if same[name] != other[name]}
    assert changed == {name for name in same if not name.endswith("RECORDS")}


def test_a_finished_folder_is_kept_and_another_seed_replaces_it(instant, tmp_path):
    folder = simulate.write(str(tmp_path / "deep/sim"))
    assert folder == tmp_path / "deep/sim"
    (folder / "mitdb/1.0.0/mark").write_text("kept")
    simulate.write(folder)
    assert (folder / "mitdb/1.0.0/mark").exists()
    simulate.write(folder, seed=1)
    assert not (folder / "mitdb/1.0.0/mark").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["sim"]


def test_an_empty_folder_is_taken(instant, tmp_path):
    (tmp_path / "sim").mkdir()
    assert (simulate.write(tmp_path / "sim") / "ludb/1.0.1/RECORDS").is_file()


def test_a_folder_with_other_things_is_refused(instant, tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(physionet.PrepareError, match="holds something else .* choose another"):
        simulate.write(tmp_path)
    with pytest.raises(physionet.PrepareError, match="holds something else"):
        simulate.write(tmp_path / "thesis.txt")
    assert contents(tmp_path) == {"thesis.txt": b"years"}


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            physionet.PrepareError,
            "No space left on device; free space",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_write_that_fails_leaves_nothing(instant, monkeypatch, tmp_path, error, expected, message):
    def fail(folder, seed):
        raise error

    monkeypatch.setattr(simulate, "_write_ludb", fail)
    with pytest.raises(expected, match=message):
        simulate.write(tmp_path / "sim")
    assert list(tmp_path.iterdir()) == []


def test_without_the_simulator_the_extra_is_named():
    code = "import sys; sys.modules['neurokit2'] = None\nimport data_prep.simulate"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        'ImportError: simulated databases need the library neurokit2; install it with: pip install "ralenet_jax[demo]"'
    )
