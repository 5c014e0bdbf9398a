import hashlib
import io
import os
import sys
import threading
import time
from pathlib import Path

import file_server
import numpy as np
import pytest
import wfdb
from file_server import answer, serving
from made_databases import tree, write_lists, write_ludb, write_mitdb, write_nstdb

import data_prep.physionet as module
from data_prep.physionet import PrepareError, download, verify

MITDB, NSTDB, LUDB = module.DATABASES.values()
CLIMBING = ["../x", "a/../../x", "/etc/x", "http://host/x", "C:/x", "..\\x", "a/./x", "a//x", "x\x1b[2J"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "RETRY_PAUSE_S", 0)


@pytest.fixture
def remote(tmp_path):
    """A server over mitdb with records 100, 101, 102 and files that no builder reads."""
    write_mitdb(tmp_path / "remote")
    folder = tmp_path / "remote/mitdb/1.0.0"
    (folder / "100.xws").write_text("not read")
    (folder / "mitdbdir").mkdir()
    (folder / "mitdbdir/intro.htm").write_text("not read")
    write_lists(folder, ["100", "101", "102"])
    with serving(tmp_path / "remote") as server:
        yield server


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(PrepareError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def wanted(remote) -> dict[str, bytes]:
    """What a complete download holds."""
    files = tree(remote.root / "mitdb/1.0.0")
    return {name: data for name, data in files.items() if name not in ("100.xws", "mitdbdir/intro.htm")}


def test_download_fetches_what_is_read_and_no_more(tmp_path, remote):
    copy = download(MITDB, tmp_path / "local", remote.url, report=lambda line: None)
    assert tree(tmp_path / "local/mitdb/1.0.0") == wanted(remote)
    assert copy.records == ("100", "101", "102")
    assert copy == verify(MITDB, tmp_path / "local")
    assert sorted(copy.checksums) == sorted(
        ["RECORDS", *(f"{n}.{e}" for n in copy.records for e in ("hea", "dat", "atr"))]
    )
    assert copy.checksums["100.dat"] == hashlib.sha256((remote.root / "mitdb/1.0.0/100.dat").read_bytes()).hexdigest()
    assert len(remote.requested) == len(set(remote.requested)) == 11


def test_a_complete_copy_needs_no_network(tmp_path, remote):
    download(MITDB, tmp_path / "local", remote.url)
    remote.requested.clear()
    download(MITDB, tmp_path / "local", remote.url)
    assert remote.requested == []


def test_only_missing_and_wrong_files_are_fetched_again(tmp_path, remote):
    folder = tmp_path / "local/mitdb/1.0.0"
    download(MITDB, tmp_path / "local", remote.url)
    (folder / "101.dat").unlink()
    (folder / "102.atr").write_bytes(b"something else")
    remote.requested.clear()
    download(MITDB, tmp_path / "local", remote.url)
    assert sorted(remote.requested) == [f"mitdb/1.0.0/{name}" for name in ("101.dat", "102.atr", "SHA256SUMS.txt")]
    assert tree(folder) == wanted(remote)


def test_folders_inside_a_database_are_kept(tmp_path):
    write_ludb(tmp_path / "remote", numbers=("1", "2"))
    with serving(tmp_path / "remote") as server:
        copy = download(LUDB, tmp_path / "local", server.url)
    assert copy.records == ("data/1", "data/2")
    assert (tmp_path / "local/ludb/1.0.1/data/2.ii").is_file()


def test_several_files_come_at_once(tmp_path, remote):
    together = threading.Barrier(4, timeout=10)

    def wait(handler, body):
        together.wait()
        answer(handler, body)

    remote.faults = {f"mitdb/1.0.0/{name}": wait for name in ("100.hea", "100.dat", "101.hea", "101.dat")}
    download(MITDB, tmp_path / "local", remote.url)  # one after the other would break the barrier


@pytest.mark.parametrize("fault", [file_server.cut, file_server.status(503), file_server.status(429)])
def test_a_passing_fault_is_tried_again(tmp_path, remote, fault):
    remote.faults["mitdb/1.0.0/101.dat"] = file_server.after(module.NUM_ATTEMPTS - 1, fault)
    download(MITDB, tmp_path / "local", remote.url)
    assert tree(tmp_path / "local/mitdb/1.0.0") == wanted(remote)


def check_failure_and_resumption(tmp_path, remote, name: str, *words: str) -> None:
    """The call fails in these words, leaves good files only, and the next one fetches no good file again."""
    message = error_of(download, MITDB, tmp_path / "local", remote.url)
    for word in words:
        assert word in message
    folder = tmp_path / "local/mitdb/1.0.0"
    kept = tree(folder)
    assert name not in kept
    assert kept.items() <= wanted(remote).items()  # no partial file, whatever its name
    remote.faults.clear()
    remote.requested.clear()
    download(MITDB, tmp_path / "local", remote.url)
    assert tree(folder) == wanted(remote)
    again = {path.removeprefix("mitdb/1.0.0/") for path in remote.requested} - {module.CHECKSUMS}
    assert again == wanted(remote).keys() - kept.keys() - {module.CHECKSUMS}


@pytest.mark.parametrize("name", ["RECORDS", "101.dat", "SHA256SUMS.txt"])
def test_a_cut_connection(tmp_path, remote, name):
    remote.faults[f"mitdb/1.0.0/{name}"] = file_server.cut
    check_failure_and_resumption(
        tmp_path, remote, name, f"{name} could not be fetched in 3 attempts", "bytes read", "call again"
    )


def test_a_file_that_is_not_there(tmp_path, remote):
    remote.faults["mitdb/1.0.0/101.atr"] = file_server.status(404)
    check_failure_and_resumption(tmp_path, remote, "101.atr", "101.atr answered 404 Not Found", "--base-url")


def test_a_wrong_checksum(tmp_path, remote):
    remote.faults["mitdb/1.0.0/102.dat"] = file_server.damage
    check_failure_and_resumption(tmp_path, remote, "102.dat", "102.dat has the wrong checksum", "SHA256SUMS.txt says")


def test_a_server_that_falls_silent(tmp_path, remote, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_S", (1, 0.1))
    released = threading.Event()
    remote.faults["mitdb/1.0.0/100.dat"] = lambda handler, body: released.wait(10)
    try:
        check_failure_and_resumption(tmp_path, remote, "100.dat", "100.dat could not be fetched", "timed out")
    finally:
        released.set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without room")
def test_a_full_disk(tmp_path, remote):
    folder = tmp_path / "local/mitdb/1.0.0"
    folder.mkdir(parents=True)
    (folder / ".101.dat.part").symlink_to("/dev/full")
    check_failure_and_resumption(
        tmp_path, remote, "101.dat", "cannot write", "101.dat: No space left on device", "free space"
    )


def test_a_folder_that_cannot_be_written(tmp_path, remote):
    (tmp_path / "file").write_text("")
    message = error_of(download, MITDB, tmp_path / "file/local", remote.url)
    assert "cannot write" in message or "cannot read" in message
    assert "Not a directory" in message


@pytest.mark.parametrize("name", CLIMBING)
def test_a_checksum_list_that_climbs_out(tmp_path, remote, name):
    with open(remote.root / "mitdb/1.0.0/SHA256SUMS.txt", "a", encoding="utf-8") as file:
        file.write(f"{'0' * 64} {name}\n")
    message = error_of(download, MITDB, tmp_path / "deep/local", remote.url)
    assert f"names {name!r}, expected plain names inside its folder" in message
    assert set(tree(tmp_path / "deep")) == {"local/mitdb/1.0.0/SHA256SUMS.txt"}
    assert f"names {name!r}" in error_of(verify, MITDB, remote.root)


@pytest.mark.parametrize("name", CLIMBING)
def test_a_list_of_records_that_climbs_out(tmp_path, remote, name):
    write_lists(remote.root / "mitdb/1.0.0", ["100", name])
    message = error_of(download, MITDB, tmp_path / "deep/local", remote.url)
    assert f"RECORDS of mitdb 1.0.0 names {name!r}" in message
    assert set(tree(tmp_path / "deep")) == {f"local/mitdb/1.0.0/{list_}" for list_ in ("SHA256SUMS.txt", "RECORDS")}
    assert f"names {name!r}" in error_of(verify, MITDB, remote.root)


def test_an_error_page_in_place_of_the_list(tmp_path, remote):
    (remote.root / "mitdb/1.0.0/SHA256SUMS.txt").write_text("<html><body>Please log in</body></html>")
    message = error_of(download, MITDB, tmp_path / "local", remote.url)
    assert "line 1 of http://127.0.0.1" in message
    assert "'<html><body>Please log in</body></html>', expected 'SHA-256 name'" in message


def test_a_list_that_lacks_a_file(tmp_path, remote):
    path = remote.root / "mitdb/1.0.0/SHA256SUMS.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "101.dat" not in line))
    assert "does not list 101.dat" in error_of(download, MITDB, tmp_path / "local", remote.url)


def test_no_server(tmp_path):
    with serving(tmp_path) as server:
        url = server.url
    message = error_of(download, MITDB, tmp_path / "local", url)
    assert "could not be fetched in 3 attempts: ConnectionRefusedError" in message


@pytest.mark.parametrize("url", ["ftp://physionet.org/files/", "physionet.org/files", "file:///files", ""])
def test_an_address_of_another_kind(tmp_path, url):
    assert f"{url!r} is no http or https address" in error_of(download, MITDB, tmp_path / "local", url)


def test_an_error_stops_the_files_on_their_way(tmp_path, remote):
    """Ctrl-C and a failed file alike: a slow one is left after its next piece."""
    remote.faults = {
        "mitdb/1.0.0/100.dat": file_server.trickle(seconds=3),
        "mitdb/1.0.0/102.atr": file_server.status(404),
    }
    start = time.monotonic()
    assert "102.atr answered 404" in error_of(download, MITDB, tmp_path / "local", remote.url)
    assert time.monotonic() - start < 5
    assert not [name for name in tree(tmp_path / "local") if name.endswith((".part", "100.dat"))]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path, remote, monkeypatch):
    lines = []
    download(MITDB, tmp_path / "first", remote.url, report=lines.append)
    assert lines[0] == f"mitdb 1.0.0: fetching 9 of 10 files from {remote.url}mitdb/1.0.0/"
    assert lines[1:] == [f"mitdb 1.0.0: {count} of 9 files" for count in range(1, 10)]
    monkeypatch.setattr(sys, "stderr", Terminal())
    lines.clear()
    download(MITDB, tmp_path / "second", remote.url, report=lines.append)
    assert len(lines) == 1
    assert "mitdb 1.0.0" in sys.stderr.getvalue()
    assert "/9 [" in sys.stderr.getvalue()


def test_a_source_is_verified_and_only_read(tmp_path):
    write_nstdb(tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}
    copy = verify(NSTDB, tmp_path)
    assert copy.records == ("bw", "em", "ma")
    assert len(copy.checksums) == 7  # RECORDS, and two files for each
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}


def test_files_that_are_not_read_may_be_wrong_or_missing(tmp_path, remote):
    (remote.root / "mitdb/1.0.0/100.xws").write_text("changed")
    (remote.root / "mitdb/1.0.0/mitdbdir/intro.htm").unlink()
    verify(MITDB, remote.root)


@pytest.mark.parametrize("name", ["RECORDS", "100.hea", "101.dat", "102.atr"])
def test_a_source_with_a_wrong_or_a_missing_file(tmp_path, name):
    write_mitdb(tmp_path)
    path = tmp_path / "mitdb/1.0.0" / name
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert f"{name} does not have the checksum of SHA256SUMS.txt" in error_of(verify, MITDB, tmp_path)
    path.unlink()
    assert f"{name} is missing" in error_of(verify, MITDB, tmp_path)
    path.mkdir()
    assert f"{name}: Is a directory" in error_of(verify, MITDB, tmp_path)


def test_a_source_without_the_database(tmp_path):
    message = error_of(verify, MITDB, tmp_path)
    assert "SHA256SUMS.txt: No such file or directory; expected PhysioNet's file" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_source_that_may_not_be_read(tmp_path):
    write_mitdb(tmp_path)
    (tmp_path / "mitdb/1.0.0/100.dat").chmod(0)
    assert "100.dat: Permission denied" in error_of(verify, MITDB, tmp_path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("100 2 360 2000\n101.dat 212 200 11 0 0 0 0 A\n101.dat 212 200 11 0 0 0 0 B\n", "are (360, 2, {'101.dat'})"),
        ("100 2 500 2000\n100.dat 212 200 11 0 0 0 0 A\n100.dat 212 200 11 0 0 0 0 B\n", "are (500, 2,"),
        ("100 1 360 2000\n100.dat 212 200 11 0 0 0 0 A\n", "are (360, 1,"),
        ("100/2 2 360 2000\n101 1000\n102 1000\n", "expected (360, 2, {'100.dat'})"),
        # wfdb refuses a folder in a header's names itself
        ("100 2 360 2000\n../x.dat 212 200 11 0 0 0 0 A\n../x.dat 212 200 11 0 0 0 0 B\n", "cannot be read"),
        ("100 2 360 2000\n/etc/x 212 200 11 0 0 0 0 A\n100.dat 212 200 11 0 0 0 0 B\n", "cannot be read"),
        ("100/2 2 360 2000\n../x 1000\n../y 1000\n", "cannot be read"),
        ("not a header\n", "cannot be read"),
    ],
)
def test_a_header_that_is_not_the_database_s(tmp_path, header, words):
    write_mitdb(tmp_path)
    folder = tmp_path / "mitdb/1.0.0"
    (folder / "100.hea").write_text(header)
    write_lists(folder, ["100"])
    copy = verify(MITDB, tmp_path)
    message = error_of(module.read_record, copy, "100")
    assert message.startswith(("header of record 100 in", "record 100 in"))
    assert words in message


def test_damaged_signals_and_annotations(tmp_path):
    write_mitdb(tmp_path)
    folder = tmp_path / "mitdb/1.0.0"
    (folder / "100.dat").write_bytes(b"short")
    (folder / "100.atr").write_bytes(b"x")
    write_lists(folder, ["100"])
    copy = verify(MITDB, tmp_path)
    assert "record 100 in" in error_of(module.read_record, copy, "100")
    assert "annotations 100.atr in" in error_of(module.read_annotation, copy, "100")


def test_records_are_read_in_adc_units_or_millivolts(tmp_path):
    signals = write_mitdb(tmp_path)
    copy = verify(MITDB, tmp_path)
    np.testing.assert_array_equal(module.read_record(copy, "100").d_signal, signals["100"], strict=True)
    found = module.read_record(copy, "100", physical=True).p_signal
    np.testing.assert_array_equal(found, (signals["100"] - np.array([1024.0, 1000.0])) / [200, 100])


def test_the_real_lists_are_accepted(physionet):
    for database, count in ((MITDB, 48), (NSTDB, 3), (LUDB, 200)):
        copy = verify(database, physionet)
        assert len(copy.records) == count
        assert len(copy.checksums) == 1 + count * len(database.endings)


def test_a_real_download(tmp_path, physionet):
    with serving(physionet) as server:
        copy = download(NSTDB, tmp_path, server.url)
    assert len(server.requested) == 8  # the two lists, three records of two files
    assert copy.checksums["bw.dat"] == "15f68280aba8b006f5497c14da44b558e68caaabc2afc5c4b710eea779b7512c"
    assert wfdb.rdheader(str(copy.folder / "bw")).sig_len == 650000
