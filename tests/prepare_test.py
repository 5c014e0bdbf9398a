import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import file_server
import pytest
import tensorflow_datasets as tfds
from file_server import serving
from made_databases import tree, write_ludb, write_mitdb, write_nstdb

from data_prep import shards
from data_prep.prepare import main, prepare

CHECKOUT = Path(__file__).parents[1]
FOLDERS = ("mitdb/1.0.0", "mitdb_recordings/1.0.0", "nstdb/1.0.0", "ludb/1.0.1")
COMMAND = [sys.executable, "-c", "import sys; from data_prep.prepare import main; sys.exit(main(sys.argv[1:]))"]


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source"
    write_mitdb(root)
    write_nstdb(root)
    write_ludb(root)
    return root


def run(*argv) -> int:
    return main([str(argument) for argument in argv])


def error_of(capsys, *argv) -> str:
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ralenet: error: ")
    return line


def test_a_local_copy_becomes_shards(tmp_path, source, capsys):
    before = tree(source)
    assert run("--data-dir", tmp_path / "data", "--source", source) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0] == f"mitdb 1.0.0: 3 records, 10 files verified in {source}/mitdb/1.0.0"
    assert lines[1].startswith(
        f"mitdb 1.0.0: ds1 3, ds2 3, paced 3 examples in {tmp_path}/data/mitdb/1.0.0 (written in"
    )
    assert lines[2].startswith(
        f"mitdb 1.0.0: ds1 1, ds2 1, paced 1 examples in {tmp_path}/data/mitdb_recordings/1.0.0 (written in"
    )
    assert lines[4].startswith("nstdb 1.0.0: bw 1, em 1, ma 1 examples in")
    assert lines[6].startswith("ludb 1.0.1: test 6, train 6 examples in")
    for line, folder in zip([lines[1], lines[2], lines[4], lines[6]], FOLDERS, strict=True):
        assert line.endswith(f"digest {shards.digest(tmp_path / 'data' / folder)})")
    assert tree(source) == before
    assert not (tmp_path / "data/physionet").exists()


def test_a_second_call_builds_nothing(tmp_path, source, capsys):
    run("--data-dir", tmp_path / "data", "--source", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*array_record*")}
    capsys.readouterr()
    assert run("--data-dir", tmp_path / "data", "--source", source) == 0
    assert capsys.readouterr().out.count("there from the same source, kept") == 4
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*array_record*")}


def test_a_download_becomes_the_same_shards(tmp_path, source, capsys):
    with serving(source) as server:
        assert run("--data-dir", tmp_path / "data", "--base-url", server.url, "--databases", "nstdb,mitdb") == 0
    assert {path.name for path in (tmp_path / "data").iterdir()} >= {"physionet", "mitdb", "nstdb"}
    assert not (tmp_path / "data/ludb").exists()
    capsys.readouterr()
    assert run("--data-dir", tmp_path / "data", "--source", source) == 0
    assert capsys.readouterr().out.count("there from the same source, kept") == 3  # ludb alone is new


def test_a_failed_download_goes_on_in_the_next_call(tmp_path, source, capsys):
    with serving(source) as server:
        server.faults["ludb/1.0.1/data/12.dat"] = file_server.damage
        message = error_of(capsys, "--data-dir", tmp_path / "data", "--base-url", server.url)
        assert "ludb/1.0.1/data/12.dat has the wrong checksum" in message
        assert not (tmp_path / "data/ludb").exists()
        server.faults.clear()
        server.requested.clear()
        assert run("--data-dir", tmp_path / "data", "--base-url", server.url) == 0
    assert {"ludb/1.0.1/data/12.dat"} <= set(server.requested)
    assert not [path for path in server.requested if path.startswith(("mitdb", "nstdb"))]
    assert tfds.builder_from_directory(tmp_path / "data/ludb/1.0.1").info.splits["train"].num_examples == 6


def test_prepare_from_python(tmp_path, source):
    lines = []
    assert prepare(str(tmp_path / "data"), source=str(source), databases=["nstdb"], report=lines.append) is None
    assert len(lines) == 2
    assert [path.name for path in (tmp_path / "data/nstdb").iterdir()] == ["1.0.0"]


def test_a_data_folder_that_cannot_be_written(tmp_path, source, capsys):
    (tmp_path / "file").write_text("")
    message = error_of(capsys, "--data-dir", tmp_path / "file/data", "--source", source)
    assert f"cannot write in {tmp_path}/file/data: Not a directory; choose another --data-dir" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_data_folder_that_may_not_be_written(tmp_path, source, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    message = error_of(capsys, "--data-dir", tmp_path / "locked", "--source", source)
    assert "Permission denied; choose another --data-dir" in message


def test_a_source_that_is_not_there(tmp_path, capsys):
    message = error_of(capsys, "--data-dir", tmp_path / "data", "--source", tmp_path / "nowhere")
    assert f"--source {tmp_path}/nowhere is no folder, expected one that holds mitdb/1.0.0" in message
    assert not (tmp_path / "data").exists()


def test_a_source_without_a_database(tmp_path, source, capsys):
    message = error_of(capsys, "--data-dir", tmp_path / "data", "--source", source / "mitdb")
    assert f"cannot read {source}/mitdb/mitdb/1.0.0/SHA256SUMS.txt" in message


def test_an_unknown_database(tmp_path, capsys):
    message = error_of(capsys, "--data-dir", tmp_path / "data", "--databases", "mitdb,ptbdb")
    assert "unknown database 'ptbdb', expected some of mitdb,nstdb,ludb" in message


def test_a_source_and_an_address_exclude_each_other(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--data-dir", tmp_path, "--source", tmp_path, "--base-url", "http://127.0.0.1/")
    assert "not allowed with argument --source" in capsys.readouterr().err


def test_two_calls_at_once(tmp_path, source, capsys):
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data/.prepare.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # any holder is one too many
        message = error_of(capsys, "--data-dir", tmp_path / "data", "--source", source)
    assert "another `ralenet prepare` is writing in" in message
    assert run("--data-dir", tmp_path / "data", "--source", source) == 0


def test_ctrl_c(tmp_path, source):
    with serving(source) as server:
        server.faults["mitdb/1.0.0/101.dat"] = file_server.trickle(seconds=10)
        argv = ["--data-dir", tmp_path / "data", "--base-url", server.url]
        with subprocess.Popen([*COMMAND, *argv], cwd=CHECKOUT, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 30
            while not list((tmp_path / "data").rglob(".101.dat.part")) and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines() == ["ralenet: interrupted; what is finished is kept, the same call goes on from there"]
    assert not list((tmp_path / "data").rglob("*.part"))
    assert not (tmp_path / "data/mitdb").exists()


def test_simulated_databases_go_the_same_way(data_dir):
    splits = {name: set(tfds.builder_from_directory(data_dir / name).info.splits) for name in FOLDERS}
    mitdb = {"ds1", "ds2", "paced"}
    assert list(splits.values()) == [mitdb, mitdb, {"bw", "em", "ma"}, {"train", "test"}]


@pytest.mark.slow
def test_real_databases_in_time_and_memory(tmp_path, physionet):
    code = (
        "import resource, sys, time; from data_prep.prepare import main; code = main(sys.argv[1:]);"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20; print(peak); sys.exit(code)"
    )
    argv = ["--data-dir", str(tmp_path), "--source", str(physionet), "--databases", "mitdb,nstdb"]
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 90  # seconds
    assert float(done.stdout.splitlines()[-1]) < 1  # GiB
    assert "ds1 53,607, ds2 47,558, paced 8,758 examples" in done.stdout
