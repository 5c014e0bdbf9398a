"""Windows streamed from the shards against windows in memory: the same losses, the rate of reading, peak memory.

python benchmarks/streamed_input.py DATA_DIR --config ralenet --steps 200
python benchmarks/streamed_input.py DATA_DIR --steps 0 KEY=VALUE …  # reading alone

Prints JSON for each, made in a process of its own: equal hashes are equal losses and parameters.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time


def peak() -> int:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(data_dir: str, name: str, steps: int, overrides: list[str], is_streamed: bool) -> dict:
    import jax
    import numpy as np

    from ralenet_jax import input_pipeline, main, startup, train

    startup.start_jax()
    config = main.load_config(name, [f"data.dir={data_dir!r}", f"data.stream={is_streamed}", *overrides])
    seed, batch, result = config.seed, config.train.batch_size, {"imports_mib": peak()}
    began = time.monotonic()
    windows = input_pipeline.open_split(config, "train")
    result |= {"windows": len(windows), "open_s": time.monotonic() - began, "opened_mib": peak()}
    total = input_pipeline.steps_per_epoch(config, len(windows))
    length = min(50, total)
    stream = input_pipeline.BatchStream(windows, seed, batch, total, length) if is_streamed else None
    blocks = min(total // length, 20)
    began = time.monotonic()
    for first in range(0, blocks * length, length):
        if is_streamed:
            stream.block(length, length, 1)
        else:
            indices = input_pipeline.batch_indices(seed, first, length, len(windows), batch)
            input_pipeline.train_block(windows, indices, 1)
    result |= {"read_windows_per_s": blocks * length * batch / (time.monotonic() - began), "read_mib": peak()}
    del windows, stream
    if not steps:
        return result
    run, losses, began = train._Run(config), [], None
    while len(losses) < steps:
        losses += run.train_block(len(losses))["loss"].tolist()
        began = began or (time.monotonic(), len(losses))  # after the compilation
    result["train_windows_per_s"] = (len(losses) - began[1]) * batch / (time.monotonic() - began[0])
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(run.state))]
    result |= {"steps": len(losses), "last_loss": losses[-1], "peak_mib": peak()}
    result["losses"] = hashlib.sha256(np.array(losses).tobytes()).hexdigest()
    result["state"] = hashlib.sha256(b"".join(leaves)).hexdigest()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir")
    parser.add_argument("--config", default="ralenet")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", choices=("memory", "stream"), help="measure in this process")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_intermixed_args()
    if given.only:
        arguments = (given.data_dir, given.config, given.steps, given.overrides, given.only == "stream")
        print(json.dumps(measure(*arguments), indent=1))
        return
    for only in ("memory", "stream"):  # a process each: its peak is its own
        print(only, flush=True)
        subprocess.run([sys.executable, *sys.argv, "--only", only], check=True)


if __name__ == "__main__":
    main()
