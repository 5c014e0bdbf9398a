"""A long training: does memory stay, does the number of checkpoints, can the logs be read?

    python benchmarks/soak.py --data-dir data --minutes 60 --out results/soak.json

trains on 320 windows, so that epochs, validations and checkpoints come by the hundred, looks at the process every ten
seconds, stops it as a cluster would (SIGTERM) and writes, as JSON, what was seen. Memory counts from a tenth of the
time on. Linux only. Exit code 1 if memory moved by more than 5 %, checkpoints piled up, or a log cannot be read.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ralenet_jax import checkpoint, provenance, writer

EVERY_S = 10
MOST_CHANGE = 0.05
MOST_CHECKPOINTS = 3  # the newest, the best, and one that is being written or removed
SETTINGS = {"data.num_windows": 400, "data.num_train": 320, "train.epochs": 1_000_000}


def resident_mib(pid):
    """Memory of a process, MiB; None when it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")]
    return found[0] if found else None


def watch(process, workdir, minutes):
    """Memory in MiB and number of checkpoints, every ten seconds."""
    memory, checkpoints, end = [], [], time.monotonic() + 60 * minutes
    while time.monotonic() < end and process.poll() is None:
        time.sleep(EVERY_S)
        memory.append(resident_mib(process.pid))
        checkpoints.append(len(list((workdir / "checkpoints").glob("[0-9]*"))))
    return memory, checkpoints


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="folder of the shards")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", required=True, help="JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [sys.executable, "-m", "ralenet_jax.main", "--data-dir", options.data_dir, "--workdir", str(workdir)]
        command += [f"--config.{key}={value}" for key, value in SETTINGS.items()]
        with (Path(folder) / "out").open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
            memory, checkpoints = watch(process, workdir, options.minutes)
            process.send_signal(signal.SIGTERM)
            code = process.wait(120)
        history = writer.read_history(workdir)
        logged = len((workdir / "metrics.jsonl").read_text().splitlines())
        lines = (Path(folder) / "out").read_text().splitlines()
        size = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file()) / 2**20
    settled = [mib for mib in memory[len(memory) // 10 :] if mib is not None]
    early, late = (statistics.mean(part) for part in (settled[: len(settled) // 3], settled[-len(settled) // 3 :]))
    result = {
        "minutes": options.minutes,
        "exit_code": code,
        "last_line": lines[-1].replace(str(workdir), "WORKDIR"),
        "steps": history[-1]["step"],
        "records_in_the_log": len(history),
        "unreadable_records": logged - len(history),
        "memory_mib": {"first third": early, "last third": late, "lowest": min(settled), "highest": max(settled)},
        "memory_change": late / early - 1,
        "most_checkpoints": max(checkpoints),
        "workdir_mib": size,
    }
    steady = abs(late / early - 1) < MOST_CHANGE and max(checkpoints) <= MOST_CHECKPOINTS
    fine = code == 128 + signal.SIGTERM and steady and logged == len(history)
    checkpoint.write_json(Path(options.out), result | {"passed": fine, "made_by": provenance.software(2)})
    print(json.dumps(result, indent=1))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
