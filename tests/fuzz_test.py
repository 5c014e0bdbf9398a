"""Hostile files in every reader of a user's file: a result or one clear line, in bounded time and memory.

A case is a sound file that was damaged, its numbers and words replaced by nasty ones, or bytes at random. A normal run
tries `FEW` cases of each reader, always the same; `-m slow` tries RALENET_FUZZ_CASES of them, by default 10,000.
"""

import contextlib
import io
import json
import os
import re
import signal
import struct
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import small_model
import wfdb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_databases import write_lists
from made_recordings import WAVE, other_channels, wav_file
from readers_csv_test import TABLES
from readers_edf_test import bdf_bytes, edf_bytes
from small_model import flat, save

from data_prep import physionet
from ralenet_jax import checkpoint, export, heartbeats, main, readers, torch_weights
from ralenet_jax.errors import UserError

FEW, MANY = 60, int(os.environ.get("RALENET_FUZZ_CASES", 10_000))
LONGEST_S = 10  # of a case, on the processor: other work on the machine does not count
SPARE_BYTES = 2**28  # that a case may take besides four times its files, as in `readers_recording`
LONGEST_LINE = 1500  # characters of what a user is told


class Hang(BaseException):
    """A reader did not come back."""


class Watch:
    """Notes what no reader may do: open a file outside the folder, unpickle, ask the network, start a process."""

    forbidden = ("pickle.find_class", "socket.", "subprocess.", "os.system", "os.exec", "urllib.", "shutil.unpack")

    def __init__(self):
        self.folder = None
        self.seen = []
        sys.addaudithook(self.hook)

    def hook(self, event, details):
        if self.folder is None:
            return
        if event.startswith(self.forbidden):
            self.seen.append((event, details[:1]))
        elif event == "open" and isinstance(details[0], str | bytes):
            path = os.path.realpath(os.fsdecode(details[0]))
            if path.startswith(("/etc/", str(self.folder.parent))) and not path.startswith(f"{self.folder}/"):
                self.seen.append((event, path))


WATCH = Watch()


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return 0


@contextlib.contextmanager
def watched(folder: Path, size: int):
    """Fails if what is done takes too long or too much memory, or does what a reader must not."""

    def stop(*_):
        raise Hang(f"more than {LONGEST_S} s")

    has_proc = Path("/proc/self/clear_refs").exists()
    if has_proc:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _memory("VmRSS")
    handler = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)
    WATCH.folder, WATCH.seen = folder, []
    try:
        yield
    finally:
        WATCH.folder = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    assert not WATCH.seen
    if has_proc:
        assert _memory("VmHWM") - before < SPARE_BYTES + 4 * size


# What stands in place of a number or a word of a sound file.
NUMBERS = [
    *(b"0", b"-1", b"1", b"7", b"65536", b"2147483648", b"4294967295", b"9223372036854775807", b"18446744073709551616"),
    *(b"99999999", b"1e400", b"-1e308", b"nan", b"inf", b"1e-320", b"0x10", b"1_0", b"1.5", b"", b"9" * 400, b"07"),
    *(b"1000000000000", b"100000", b"508", b"212", b"310", b"-2147483649", "١٢".encode(), b"1" * 5000),
]
WORDS = [
    *(b"../../etc/passwd", b"/etc/passwd", b"http://localhost/x.dat", b"s3://b/x", b"file:///etc/passwd", b"~", b"."),
    *(b"..", b"-", b"\x00", b"\xff\xfe", b"\n", b"\r\n", b"\x1b[2J", b"'", b'"', b"#", b"/", b"(" * 300, b"[" * 5000),
    *(b" ", b" " * 3000, b"a" * 3000, b"__import__('os')", b"O", b"|O", b"<U9999999", b"<f8", b"BF16", b"null"),
    *(
        b"true",
        b"{}",
        b"[]",
        b"\xed\xa0\x80",
        "µ".encode(),
        b"r.dat",
        b"r.hea",
        b"outside.dat",
        b"../outside.dat",
        b"r/2 ",
    ),
    *(b",", b"::", b"simplecache::", b"x3", b":2", b"+5", b"\\d", b"## x", b"1" * 3000 + b"(", b"RF64", b"EDF+D"),
]
INTEGERS = [0, 1, 2, 3, 7, 0x7F, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]


def damaged(draw, data: bytes) -> bytes:
    """A file's bytes after one to six blows; no strategy holds them, as Hypothesis keeps what it is given."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=300))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(len(data), 1) - 1))
        if draw(st.booleans()):
            place %= 600  # most formats begin with a header
        kind = draw(st.integers(0, 9))
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data = data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
        elif kind == 2:
            data = data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place:]
        elif kind == 3:
            data = data[:place] + data[place + draw(st.integers(1, 400)) :]
        elif kind == 4:
            data = data[: place + draw(st.integers(1, 400))] + data[place:]
        elif kind == 5:
            form = draw(st.sampled_from(["<H", "<I", "<Q", ">H", ">I"]))
            packed = struct.pack(form, draw(st.sampled_from(INTEGERS)) % 256 ** struct.calcsize(form))
            data = data[:place] + packed + data[place + len(packed) :]
        else:
            pattern, values = (rb"[+-]?\d+", NUMBERS) if kind < 8 else (rb"[\w./+-]+", WORDS)
            value, match = draw(st.sampled_from(values)), re.compile(pattern).search(data, place)
            if match:
                if kind % 2:
                    value = value.ljust(match.end() - match.start())  # where fields have a width
                data = data[: match.start()] + value + data[match.end() :]
    return data


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(packing=zipfile.ZIP_STORED, **arrays) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as members:
        for name, array in arrays.items():
            members.writestr(f"{name}.npy", npy(array))
    return file.getvalue()


def record_files(folder: Path) -> list[dict[str, bytes]]:
    """Sound WFDB records: with annotations, of several files, of segments with a layout, in FLAC."""
    other_channels(folder)
    notes = {"aux_note": ["(N", "", "", ""], "fs": 250}
    wfdb.wrann("r", "atr", np.array([3, 99, 200, 70_000]), ["+", "N", "V", "N"], write_dir=str(folder), **notes)
    records = [{name: (folder / name).read_bytes() for name in ("r.hea", "r.dat", "r.atr")}]
    samples = WAVE.astype("<i2").tobytes()
    text = b"r 2 250/1(0) 500 10:11:12 01/02/2003\nr.dat 16x2:3+0 100(5)/mV 12 0 3 7 0 II\n"
    text += b"s1.dat 212 10/mmHg 8 0 0 0 0 X\n"
    records.append({"r.hea": text, "r.dat": samples * 2, "s1.dat": samples})
    records.append(
        {
            "r.hea": b"r/4 1 250 1600\nlayout 0\ns1 500\n~ 600\ns2 500\n",
            "layout.hea": b"layout 1 250 0\n~ 0 1 12 0 0 0 0 II\n",
            "s1.hea": b"s1 1 250 500\ns1.dat 16 100/mV 12 0 0 0 0 II\n",
            "s2.hea": b"s2 1 250 500\ns2.dat 16 200/mV 12 0 0 0 0 II\n",
            "s1.dat": samples,
            "s2.dat": samples,
        }
    )
    one = {"fmt": ["516"], "units": ["mV"], "sig_name": ["II"], "write_dir": str(folder)}
    wfdb.wrsamp("f", 250, p_signal=WAVE[:, None] / 100, adc_gain=[100.0], baseline=[0], **one)
    header, packed = ((folder / name).read_bytes() for name in ("f.hea", "f.dat"))
    return [*records, {"r.hea": header.replace(b"f.dat", b"r.dat"), "r.dat": packed}]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, list[dict[str, bytes]]]:
    """Sound files of each reader; the first of each is the one to read."""
    folder = tmp_path_factory.mktemp("sound")
    files = {"records": record_files(folder)}
    files["edf"] = [{"a.edf": edf_bytes()}, {"a.edf": edf_bytes("EDF+D", (0, 0.5, 7))}]
    files["bdf"] = [{"a.bdf": bdf_bytes()}]
    files["csv"] = [{"a.csv": text.encode()} for text, *_ in TABLES.values()]
    arrays = [WAVE, WAVE.astype("f4").reshape(-1, 2), np.asfortranarray(WAVE.astype(">i2").reshape(2, -1))]
    files["npy"] = [{"a.npy": npy(array)} for array in arrays]
    parts = {"signal": WAVE.astype("f4"), "fs": np.array(250), "names": np.array(["II"]), "units": np.array(["mV"])}
    files["npz"] = [{"a.npz": npz(packing, **parts)} for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
    files["wav"] = []
    for width in (1, 2, 3, 4):
        wav_file(folder / "a.wav", width, np.resize(WAVE, 300 * width).astype("u1").tobytes())
        files["wav"].append({"a.wav": (folder / "a.wav").read_bytes()})
    return files | weight_files(folder)


def weight_files(folder: Path) -> dict[str, list[dict[str, bytes]]]:
    trained = small_model.trained()
    files = {}
    for name in ("safetensors", "npz", "msgpack"):
        path = save(folder / f"w.{name}", trained.texts(), flat(trained.variables))
        files[f"weights {name}"] = [{path.name: path.read_bytes()}]
    random = np.random.default_rng(0)
    weights = {entry.key: random.normal(size=entry.shape).astype("f4") for entry in torch_weights._entries("acdae")}
    return files | {"state dict": [{"a.safetensors": safetensors.numpy.save(weights, {"format": "pt"})}]}


@pytest.fixture(autouse=True, scope="module")
def small_is_a_model():
    with small_model.known():
        yield


def read_recording(path: Path) -> None:
    """Reads a recording, which must be whole, and writes it again."""
    readers.find([path.parent])
    recording = readers.read(path, None if path.suffix in (".hea", ".edf", ".bdf", ".wav", ".npz") else 250)
    length, channels = recording.signal.shape
    assert recording.signal.dtype == np.float64 and not np.isinf(recording.signal).any()
    assert length > 1 and channels == len(recording.names) == len(recording.units) > 0
    assert all(text.isprintable() for text in (*recording.names, *recording.units))
    assert 0 < recording.sampling_rate < np.inf and set(recording.leads) <= set(range(channels))
    out = path.parent / "out"
    out.mkdir(exist_ok=True)
    readers.write(recording, recording.signal, out / path.name)
    again = readers.read(out / path.name, recording.sampling_rate)
    if path.suffix != ".hea":  # there the samples of a frame come as their mean
        np.testing.assert_array_equal(again.signal, recording.signal)


def read_heartbeats(path: Path) -> None:
    leads, beats, rate = heartbeats.read_recording(path.parent, path.stem)
    assert leads.dtype == np.float32 and leads.ndim == 2 and rate > 0
    assert beats.dtype == np.int64 and (beats >= 0).all()


def read_database(path: Path) -> None:
    """As `ralenet prepare` does; the lists vouch for the hostile files."""
    database = physionet.Database("d", "1", (".hea", ".dat", ".atr"), 250.5, 3)
    folder = path.parent / database.folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in path.parent.glob("r.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    write_lists(folder, ["r"])
    try:
        copy = physionet.verify(database, path.parent)
        physionet.read_record(copy, "r", physical=True)
        found = physionet.read_annotation(copy, "r")
    except physionet.PrepareError as error:
        raise UserError(str(error)) from error
    assert len(found.sample) == len(found.symbol) and all(isinstance(symbol, str) for symbol in found.symbol)


def read_weights(path: Path) -> None:
    config, variables = export.load(path)
    assert config.model.name == "small" and variables["params"]["kernel"].shape == (2, 2)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in flat(variables).values())


def read_state_dict(path: Path) -> None:
    variables = torch_weights.read("acdae", path)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in flat(variables).values())


READERS = {  # sound files, the file to damage (None: any), the reader
    "wfdb header": ("records", ".hea", read_recording),
    "wfdb signal": ("records", ".dat", read_recording),
    "wfdb annotation": ("records", ".atr", read_heartbeats),
    "wfdb database": ("records", None, read_database),
    "edf": ("edf", None, read_recording),
    "bdf": ("bdf", None, read_recording),
    "csv": ("csv", None, read_recording),
    "npy": ("npy", None, read_recording),
    "npz": ("npz", None, read_recording),
    "wav": ("wav", None, read_recording),
    "weights safetensors": ("weights safetensors", None, read_weights),
    "weights npz": ("weights npz", None, read_weights),
    "weights msgpack": ("weights msgpack", None, read_weights),
    "state dict": ("state dict", None, read_state_dict),
}


def told_in_one_line(call, *given) -> bool:
    """Whether a call refuses; what it tells must be one printable line, and nothing else may come out of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "The inplace keyword")  # the import of wfdb 4.3.1 under pandas 3.1
            call(*given)
    except UserError as error:
        assert str(error).isprintable() and 0 < len(str(error)) < LONGEST_LINE, repr(str(error))
        return True
    return False


@pytest.fixture(scope="module")
def tally():
    """Counts of cases and refusals by reader, added to the file that RALENET_FUZZ_TALLY names."""
    counts = {}
    yield counts
    if path := os.environ.get("RALENET_FUZZ_TALLY"):
        there = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        Path(path).write_text(json.dumps(there | counts, indent=1) + "\n")


def attack(cases: int, strategy, case, tally: dict, name: str) -> None:
    """Tries so many cases, always the same; a case tells whether it was refused."""
    counts = tally[name] = {"cases": 0, "refused": 0, "slowest_s": 0.0}

    @settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def attacked(given):
        start = time.process_time()
        refused = case(given)
        counts["cases"] += 1
        counts["refused"] += refused
        counts["slowest_s"] = max(counts["slowest_s"], round(time.process_time() - start, 2))

    attacked()


def attack_files(name: str, cases: int, sound, folder: Path, tally: dict) -> None:
    kind, suffix, reader = READERS[name]
    folder = folder / "in"
    (folder.parent / "outside.dat").write_bytes(bytes(4000))

    choices = sound[kind][:1] if name.endswith(("annotation", "database")) else sound[kind]

    @st.composite
    def files(draw):
        names = choices[draw(st.integers(0, len(choices) - 1))]
        hit = draw(st.sampled_from([file for file in names if suffix is None or file.endswith(suffix)]))
        return names | {hit: damaged(draw, names[hit])}

    def case(files):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.mkdir(exist_ok=True)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        with watched(folder, sum(map(len, files.values()))):
            return told_in_one_line(reader, folder / next(iter(files)))

    attack(cases, files(), case, tally, name)


@pytest.mark.parametrize("name", READERS)
def test_sound_files_are_read(name, sound, tmp_path):
    kind, _, reader = READERS[name]
    for number, files in enumerate(sound[kind][:1] if name.endswith(("annotation", "database")) else sound[kind]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        refused = told_in_one_line(reader, folder / next(iter(files)))
        assert refused == (kind == "edf" and number == 1)


@pytest.mark.parametrize("name", READERS)
def test_files(name, sound, tmp_path, tally):
    attack_files(name, FEW, sound, tmp_path, tally)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_files(name, sound, tmp_path, tally):
    attack_files(name, MANY, sound, tmp_path, tally)


def overrides():
    """Texts as in `--config.KEY=VALUE`: mostly of known keys."""
    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=4)
    )
    literals = st.recursive(
        scalars | st.complex_numbers(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner)
        ),
        max_leaves=5,
    ).map(repr)
    nasty = st.sampled_from([word.decode("utf-8", "surrogateescape") for word in (*NUMBERS, *WORDS)])
    grown = st.sampled_from(["({}", "-", "1+", "[", "not ", "{{1:", "1if 1else "]).map(lambda text: text * 30_000 + "1")
    value = literals | nasty | grown | st.text(max_size=30)
    known = st.sampled_from(main._keys(main.load_config("ralenet")))
    key = known | nasty | st.text(max_size=20) | known.map(lambda text: text.rpartition(".")[0])
    return st.lists(st.builds("{}{}{}".format, key, st.sampled_from(["=", "=", "=", "", "=="]), value), max_size=3)


def override(texts: list[str]) -> bool:
    default = checkpoint.flat(main.load_config("ralenet").to_dict())

    def load():
        found = checkpoint.flat(main.load_config("ralenet", texts).to_dict())
        assert found.keys() == default.keys()
        for key, value in found.items():
            assert default[key] is None or isinstance(value, type(default[key])), (key, value)

    with watched(Path("/nowhere/in"), 0):
        return told_in_one_line(load)


def test_overrides(tally):
    attack(FEW, overrides(), override, tally, "config overrides")


@pytest.mark.slow
def test_many_overrides(tally):
    attack(MANY, overrides(), override, tally, "config overrides")


def names_of_configurations():
    words = [word.decode("utf-8", "surrogateescape") for word in WORDS if b"etc" not in word]  # it would be run
    return st.sampled_from(words) | st.text(max_size=300) | st.text(min_size=4000, max_size=5000)


def test_names_of_configurations(tally):
    def case(name):
        with watched(Path("/nowhere/in"), 0):
            return told_in_one_line(main.load_config, name)

    attack(FEW, names_of_configurations(), case, tally, "config names")
