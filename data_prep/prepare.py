"""The command `ralenet prepare`: PhysioNet, or a local copy of it, → verified recordings → shards."""

import argparse
import contextlib
import fcntl
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from data_prep import beam, ludb, mitdb, nstdb, physionet, shards

BUILDERS = {"mitdb": (mitdb.Mitdb, mitdb.MitdbRecordings), "nstdb": (nstdb.Nstdb,), "ludb": (ludb.Ludb,)}
DOWNLOADS = "physionet"  # below the data folder


def prepare(
    data_dir: str | Path,
    source: str | Path | None = None,
    base_url: str = physionet.BASE_URL,
    databases: Sequence[str] = tuple(BUILDERS),
    report: Callable[[str], None] = print,
    beam_options: Sequence[str] | None = None,
) -> None:
    """Downloads databases to `data_dir/physionet` and writes their shards to `data_dir/NAME/VERSION`.

    A second call fetches only files that are missing or wrong, and builds only shards whose source has changed.

    Args:
        data_dir: made where it is missing.
        source: a local copy in PhysioNet's layout, read in place of a download; nothing is written there.
        base_url: of a server with PhysioNet's layout.
        databases: names among mitdb, nstdb, ludb.
        report: takes each line of what was done.
        beam_options: of the Apache Beam pipeline that cuts the records, None for this process alone.

    Raises:
        PrepareError: anything the user can mend, in one line.
    """
    data_dir = Path(data_dir).expanduser().absolute()
    if unknown := [name for name in databases if name not in BUILDERS]:
        raise physionet.PrepareError(f"unknown database {unknown[0]!r}, expected some of {','.join(BUILDERS)}")
    if source is not None:
        source = Path(source).expanduser().absolute()
        if not source.is_dir():
            raise physionet.PrepareError(f"--source {source} is no folder, expected one that holds mitdb/1.0.0 etc.")
    pipeline = None if beam_options is None else beam.parse_options(beam_options)
    with _sole_writer(data_dir):
        for name in databases:
            database = physionet.DATABASES[name]
            if source is None:
                copy = physionet.download(database, data_dir / DOWNLOADS, base_url, report)
            else:
                copy = physionet.verify(database, source)
            report(f"{database}: {len(copy.records)} records, {len(copy.checksums)} files verified in {copy.folder}")
            for builder in BUILDERS[name]:
                report(f"{database}: {_build(builder, copy, data_dir, pipeline)}")


def _build(builder: type[shards.Builder], copy: physionet.Copy, data_dir: Path, pipeline: beam.Options | None) -> str:
    """Builds one shard set; tells what there is now."""
    started = time.monotonic()
    directory, is_new = shards.build(builder, copy, data_dir, pipeline)
    done = f"written in {time.monotonic() - started:.1f} s" if is_new else "there from the same source, kept"
    info = tfds.builder_from_directory(directory).info
    counts = ", ".join(f"{split} {info.splits[split].num_examples:,}" for split in sorted(info.splits))
    return f"{counts} examples in {directory} ({done}; digest {info.metadata['digest']})"


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code: 0 good, 2 for what the user can mend, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="ralenet prepare",
        description="Download the recordings from PhysioNet (or read a local copy), verify them, write shards.",
    )
    parser.add_argument("--data-dir", required=True, help="folder for downloads and shards")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--source", help="local copy in PhysioNet's layout (mitdb/1.0.0/…), only read")
    origin.add_argument("--base-url", default=physionet.BASE_URL, help="server to download from (%(default)s)")
    parser.add_argument("--databases", default=",".join(BUILDERS), help="which to prepare (%(default)s)")
    parser.add_argument("--beam", action="store_true", help="cut the records on Apache Beam, for large databases")
    parser.add_argument("--beam-options", metavar="OPTIONS", help="of its pipeline, in one word (a local one)")
    args = parser.parse_args(argv)
    beam_options = shlex.split(args.beam_options or "") if args.beam or args.beam_options else None
    try:
        prepare(args.data_dir, args.source, args.base_url, args.databases.split(","), beam_options=beam_options)
    except physionet.PrepareError as error:
        print(f"ralenet: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ralenet: interrupted; what is finished is kept, the same call goes on from there", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _sole_writer(data_dir: Path) -> Iterator[None]:
    """Holds the data folder: two calls at once would write the same temporary files. The system frees it at exit."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = open(data_dir / ".prepare.lock", "w")
    except OSError as error:
        raise physionet.PrepareError(
            f"cannot write in {data_dir}: {error.strerror}; choose another --data-dir"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise physionet.PrepareError(
                f"another `ralenet prepare` is writing in {data_dir}; wait for it or choose another --data-dir"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
