"""The PhysioNet databases the project reads: what they are, and how they are downloaded, verified and opened.

A local copy has the layout of PhysioNet's file server (https://physionet.org/files/): `ROOT/mitdb/1.0.0/100.dat`.
Every file is held against the database's own SHA256SUMS.txt before anything else reads it.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

import requests
import tqdm
import wfdb

from ralenet_jax import readers_annotations, readers_wfdb

BASE_URL = "https://physionet.org/files/"
CHECKSUMS = "SHA256SUMS.txt"
RECORDS = "RECORDS"

NUM_CONNECTIONS = 8
NUM_ATTEMPTS = 3
RETRY_PAUSE_S = 1.0  # doubles with every attempt
TIMEOUT_S = (10, 20)  # to connect, and between two pieces of a body
PIECE_BYTES = 1 << 13  # small, so that Ctrl-C need not wait for long on a slow line


class PrepareError(Exception):
    """What a user can mend: its text is one line with what was given, what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class Database:
    """One database of PhysioNet, and what of it is read.

    Attributes:
        name: as in its address, "mitdb".
        version: "1.0.0".
        endings: of the files read for each record; the annotator's name is the last one of them, where one is read.
        sampling_rate: Hz.
        num_leads: signals in each record.
        only: the records read, empty for all that the RECORDS file names.
    """

    name: str
    version: str
    endings: tuple[str, ...]
    sampling_rate: int
    num_leads: int
    only: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def folder(self) -> str:
        """The folder below a root or the base address."""
        return f"{self.name}/{self.version}"


DATABASES = {
    database.name: database
    for database in (
        Database("mitdb", "1.0.0", (".hea", ".dat", ".atr"), sampling_rate=360, num_leads=2),
        Database("nstdb", "1.0.0", (".hea", ".dat"), sampling_rate=360, num_leads=2, only=("bw", "em", "ma")),
        Database("ludb", "1.0.1", (".hea", ".dat", ".ii"), sampling_rate=500, num_leads=12),
    )
}


@dataclasses.dataclass(frozen=True)
class Copy:
    """A verified local copy of a database.

    Attributes:
        database: which.
        folder: where its RECORDS lies.
        records: names in the order of RECORDS; ludb's have a folder, "data/1".
        checksums: SHA-256 of every file a builder reads, {"100.dat": "b2ea…"}.
    """

    database: Database
    folder: Path
    records: tuple[str, ...]
    checksums: dict[str, str]


def verify(database: Database, root: Path) -> Copy:
    """Opens the copy below `root`, each file that is read held against SHA256SUMS.txt; writes nothing.

    Raises:
        PrepareError: a file is missing, differs from its checksum, or a list names one outside the folder.
    """
    folder = Path(root) / database.folder
    known = parse_checksums(_read_text(folder / CHECKSUMS), f"{folder / CHECKSUMS}")
    _check_file(folder, RECORDS, _checksum_of(known, RECORDS, database))
    records = parse_records(database, _read_text(folder / RECORDS))
    checksums = {name: _checksum_of(known, name, database) for name in _files(database, records)}
    for name, checksum in checksums.items():
        _check_file(folder, name, checksum)
    return Copy(database, folder, records, checksums)


def download(database: Database, root: Path, base_url: str = BASE_URL, report: Callable[[str], None] = print) -> Copy:
    """Fetches what is missing or wrong below `root`, several files at once, and returns the verified copy.

    A complete copy needs no network. A file takes its final name only when it is whole and has the published
    checksum, so a call that fails or is interrupted leaves nothing but good files, and the next one goes on there.

    Args:
        database: which.
        root: the folder that will hold `mitdb/1.0.0` and so on; made where it is missing.
        base_url: of a server with PhysioNet's layout, http or https.
        report: takes each line of progress where standard error is no terminal; a terminal gets a bar.

    Raises:
        PrepareError: no connection, a cut one, an HTTP error, a wrong checksum, a list that names a file outside the
            folder, or a folder that cannot be written (full disk, no permission).
    """
    try:
        return verify(database, root)
    except PrepareError:
        pass  # the usual first call; whatever is missing or wrong is fetched now
    if urllib.parse.urlsplit(base_url).scheme not in ("http", "https"):
        raise PrepareError(f"the base address {base_url!r} is no http or https address, such as {BASE_URL}")
    folder = Path(root) / database.folder
    base_url = f"{base_url.rstrip('/')}/{database.folder}/"
    with requests.Session() as session:
        session.mount(base_url, requests.adapters.HTTPAdapter(pool_maxsize=NUM_CONNECTIONS))
        # Whole bodies as the server stores them: a compressed one would not have the length that is announced.
        session.headers["Accept-Encoding"] = "identity"
        fetcher = _Fetcher(session, base_url, folder)
        fetcher.fetch(CHECKSUMS, None)
        known = parse_checksums(_read_text(folder / CHECKSUMS), base_url + CHECKSUMS)
        if not _is_good(folder / RECORDS, checksum := _checksum_of(known, RECORDS, database)):
            fetcher.fetch(RECORDS, checksum)
        records = parse_records(database, _read_text(folder / RECORDS))
        checksums = {name: _checksum_of(known, name, database) for name in _files(database, records)}
        wanted = {name: checksum for name, checksum in checksums.items() if not _is_good(folder / name, checksum)}
        if wanted:
            report(f"{database}: fetching {len(wanted)} of {len(checksums)} files from {base_url}")
            fetcher.fetch_all(wanted, str(database), report)
    return Copy(database, folder, records, checksums)


def parse_checksums(text: str, where: str) -> dict[str, str]:
    """Parses lines of "SHA-256 name" to {name: SHA-256}; one bad line condemns the list.

    Raises:
        PrepareError: a line of another form (an error page in place of the list), or a name outside the folder.
    """
    checksums = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64})\s+\*?(\S.*)", line.rstrip())
        if not match:
            raise PrepareError(
                f"line {number} of {where} is {_short(line)}, expected 'SHA-256 name'; check the address or the copy"
            )
        checksums[_confined(match[2], where)] = match[1]
    return checksums


def parse_records(database: Database, text: str) -> tuple[str, ...]:
    """Parses RECORDS, one name a line, and keeps the records that are read.

    Raises:
        PrepareError: a name outside the folder, or no record to read.
    """
    names = [_confined(line.strip(), f"{RECORDS} of {database}") for line in text.splitlines() if line.strip()]
    records = tuple(name for name in dict.fromkeys(names) if not database.only or name in database.only)
    if not records:
        raise PrepareError(
            f"{RECORDS} of {database} names {len(names)} records, none of those read "
            f"({', '.join(database.only) or 'any'}); use a complete copy"
        )
    return records


def read_record(copy: Copy, name: str, physical: bool = False) -> wfdb.Record:
    """Reads one record of a verified copy.

    Args:
        copy: from `verify` or `download`.
        name: one of `copy.records`.
        physical: `p_signal` in mV, float64 [L, leads], instead of `d_signal` in ADC units, int16 [L, leads].

    Raises:
        PrepareError: wfdb cannot read it, or it is not what the database promises. A header may name any file as the
            one that holds its signal; only the record's own, which was verified, is opened.
    """
    path = str((copy.folder / name).absolute())
    expected = (copy.database.sampling_rate, copy.database.num_leads, {f"{Path(name).name}.dat"})
    try:
        readers_wfdb.files(Path(f"{path}.hea"))  # are there, and hold what the header claims
        header = wfdb.rdheader(path)
        found = (header.fs, header.n_sig, set(getattr(header, "file_name", None) or ()))
        if found != expected:
            raise PrepareError(
                f"header of record {name} in {copy.folder}: (Hz, leads, signal files) are {found}, "
                f"expected {expected}; use PhysioNet's copy of {copy.database}"
            )
        return wfdb.rdrecord(path, physical=physical, return_res=64 if physical else 16)
    except PrepareError:
        raise
    except Exception as error:  # wfdb raises whatever its parsing met
        raise PrepareError(
            f"record {name} in {copy.folder} cannot be read: {_reason(error)}; use PhysioNet's copy of {copy.database}"
        ) from error


def read_annotation(copy: Copy, name: str) -> readers_annotations.Annotations:
    """Reads the annotations of one record of a verified copy: `sample` int [N] at the record's rate, `symbol` [N].

    Raises:
        PrepareError: they are damaged.
    """
    annotator = copy.database.endings[-1].removeprefix(".")
    try:
        return readers_annotations.read(copy.folder / f"{name}.{annotator}")
    except (OSError, ValueError) as error:
        raise PrepareError(
            f"annotations {name}.{annotator} in {copy.folder} cannot be read: {_reason(error)}; "
            f"use PhysioNet's copy of {copy.database}"
        ) from error


class _Fetcher:
    """Fetches files of one database into one folder; its threads share one pool of connections."""

    def __init__(self, session: requests.Session, base_url: str, folder: Path):
        self._session = session
        self._base_url = base_url
        self._folder = folder
        self._stop = threading.Event()

    def fetch_all(self, wanted: dict[str, str], label: str, report: Callable[[str], None]) -> None:
        """Fetches {name: SHA-256}; the first error ends the others, which keep what they have finished."""
        is_terminal = sys.stderr.isatty()
        step = max(1, len(wanted) // 10)
        with concurrent.futures.ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            try:
                futures = [pool.submit(self.fetch, name, checksum) for name, checksum in wanted.items()]
                finished = concurrent.futures.as_completed(futures)
                bar = tqdm.tqdm(finished, label, len(wanted), unit="file", leave=False, disable=not is_terminal)
                for count, future in enumerate(bar, start=1):
                    future.result()
                    if not is_terminal and count % step == 0:
                        report(f"{label}: {count} of {len(wanted)} files")
            except BaseException:  # Ctrl-C too: leave after the pieces on their way, not after all files
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def fetch(self, name: str, checksum: str | None) -> None:
        """Fetches one file, whole and with this SHA-256 (None: any) or not at all; tries again on a cut connection."""
        url = self._base_url + urllib.parse.quote(name)
        path = self._folder / name
        temporary = path.with_name(f".{path.name}.part")  # one process at a time writes here: prepare holds a lock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = self._fetch_patiently(url, temporary)
            if checksum not in (None, found):
                raise PrepareError(
                    f"{url} has the wrong checksum: SHA-256 {found[:12]}…, {CHECKSUMS} says {checksum[:12]}…; "
                    "call again, and if it stays so, use another server with --base-url"
                )
            os.replace(temporary, path)
        except OSError as error:
            raise PrepareError(
                f"cannot write {path}: {error.strerror or error}; free space or choose another folder, then call "
                "again: finished files are kept"
            ) from error
        finally:
            with contextlib.suppress(OSError):  # it may never have been there, nor its folder
                temporary.unlink()

    def _fetch_patiently(self, url: str, temporary: Path) -> str:
        """Fetches into a temporary file and returns its SHA-256."""
        for attempt in range(NUM_ATTEMPTS):
            if attempt and self._stop.wait(RETRY_PAUSE_S * 2 ** (attempt - 1)):
                break
            try:
                return self._fetch_once(url, temporary)
            except requests.RequestException as error:
                reason = _reason(error)
        raise PrepareError(
            f"{url} could not be fetched in {NUM_ATTEMPTS} attempts: {reason}; "
            "check the connection and call again: finished files are kept"
        )

    def _fetch_once(self, url: str, temporary: Path) -> str:
        digest = hashlib.sha256()
        with self._session.get(url, stream=True, timeout=TIMEOUT_S) as response, open(temporary, "wb") as file:
            if response.status_code >= 500 or response.status_code == 429:  # a busy server: worth another attempt
                response.raise_for_status()
            if response.status_code != 200:
                raise PrepareError(
                    f"{url} answered {response.status_code} {response.reason}, expected the file; check --base-url"
                )
            for piece in response.iter_content(PIECE_BYTES):
                if self._stop.is_set():
                    raise PrepareError("stopped")  # nobody reads this: another file's error came first
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest()


def _files(database: Database, records: Sequence[str]) -> list[str]:
    """Lists all a builder reads."""
    return [RECORDS] + [record + ending for record in records for ending in database.endings]


def _checksum_of(known: dict[str, str], name: str, database: Database) -> str:
    if name not in known:
        raise PrepareError(f"{CHECKSUMS} of {database} does not list {name}; use a complete copy")
    return known[name]


def _check_file(folder: Path, name: str, checksum: str) -> None:
    if not _is_good(folder / name, checksum):
        fault = "does not have the checksum of" if (folder / name).exists() else "is missing, but listed in"
        raise PrepareError(f"{folder / name} {fault} {CHECKSUMS}; put PhysioNet's file there")


def _is_good(path: Path, checksum: str) -> bool:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == checksum
    except FileNotFoundError:
        return False
    except OSError as error:
        raise PrepareError(f"cannot read {path}: {error.strerror}; make it a readable file") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise PrepareError(
            f"cannot read {path}: {error.strerror}; expected PhysioNet's file in PhysioNet's layout"
        ) from error


def _confined(name: str, where: str) -> str:
    """Returns the name if it can only mean a file below the folder it is joined to, on any system."""
    parts = name.split("/")  # an absolute name begins with an empty part
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:]", name) or not name.isprintable():
        raise PrepareError(
            f"{where} names {_short(name)}, expected plain names inside its folder; do not use this copy or server"
        )
    return name


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")


def _reason(error: BaseException) -> str:
    """Tells in one line what was at the bottom of an error: libraries wrap it several times over."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())
