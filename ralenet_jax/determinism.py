"""`ralenet reproduce --check`: is it the same number when run twice?

The same cell is trained for a few steps: twice, killed and resumed, on one device and on all. The shards are read, and
built anew where their source is at hand. Published models are computed again where their numbers are given.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from data_prep import physionet, prepare, shards
from ralenet_jax import benchmark_parts, checkpoint, evaluate, input_pipeline, main, models, torch_weights, train

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
_EPOCHS, _STEPS = 3, 10  # of how many steps
_DEVICES_LIMIT = 1e-6  # after an epoch of plain gradient steps: Adam would make 1e-4 of the rounding
# Largest difference from the published model's output in eval and in train mode.
_PARITY_LIMITS = {"output_eval": 1e-5, "output_train": 2e-5}
_DANET_TRAIN_LIMIT = 5e-5


@dataclasses.dataclass(frozen=True)
class Line:
    """What one check found: its name, `PASS`, `FAIL` or `SKIP`, and the figure or the reason."""

    name: str
    state: str
    text: str


def check(
    name: str, overrides: list[str], parity: str | Path | None = None, source: str | Path | None = None, log=print
) -> list[Line]:
    """Runs all checks, telling each line as it comes.

    Args:
        name: of the configuration, such as "ralenet".
        overrides: of it, such as "data.dir='data'".
        parity: folder with the numbers of the published models, NAME.npz; None skips them.
        source: folder with the databases in PhysioNet's layout, to build the shards anew; None takes what
            `ralenet prepare` downloaded, if it did.
        log: takes lines of text.

    Raises:
        UserError: for a bad configuration, or data that is not there.
    """
    config = main.load_config(name, [*overrides, *_small(main.load_config(name, overrides))])
    lines = []
    for line in _lines(config, parity, source):
        lines.append(line)
        log(f"{line.state}  {line.name}: {line.text}")
    return lines


def _small(config: ConfigDict) -> list[str]:
    batch = config.train.batch_size
    settings = {"num_train": _STEPS * batch, "num_windows": (_STEPS + 1) * batch}
    return [f"train.epochs={_EPOCHS}", *(f"data.{key}={value}" for key, value in settings.items())]


def _lines(config: ConfigDict, parity, source) -> Iterator[Line]:
    with tempfile.TemporaryDirectory(prefix="ralenet_check_") as folder:
        yield from _training(config, Path(folder))
        for name in ("mitdb", "mitdb_recordings", "nstdb", "ludb"):
            if any(Path(config.data.dir).glob(f"{name}/*/dataset_info.json")):
                yield _shards_read(config, name)
                yield _shards_rebuilt(config, name, source, Path(folder, "anew"))
    if parity is None:
        yield Line("published models", SKIP, "no folder with their numbers was given (--parity DIR)")
        return
    for path in sorted(Path(parity).glob("*.npz")):
        yield _parity(path)


def _training(config: ConfigDict, folder: Path) -> Iterator[Line]:
    first = _trained(config, folder / "first")
    yield _same("trained twice", first, _trained(config, folder / "second"))
    killed = folder / "killed"
    settings = _settings(config)
    # The checkpoint of the second epoch is under way when it is killed.
    arguments = ["train", "--workdir", str(killed), *(f"--config.{text}" for text in settings)]
    benchmark_parts.run_command(arguments, until="epoch 2")
    resumed = _trained(config, killed)
    start = checkpoint.read_starts(killed)[-1]["step"]
    yield _same("killed and resumed", first, resumed, f"resumed at step {start}, ")
    yield _devices(config, folder)


def _settings(config: ConfigDict) -> list[str]:
    """All of a configuration as overrides of the default one."""
    flat = checkpoint.flat(json.loads(config.to_json()))
    return [f"{key}={tuple(value) if isinstance(value, list) else value!r}" for key, value in flat.items()]


def _trained(config: ConfigDict, workdir: Path) -> dict[str, np.ndarray]:
    """Trains, or goes on, and gives everything in the last checkpoint, by its path."""
    train.train(config, workdir)
    _, state = evaluate.restore_state(config, workdir, evaluate.choose_devices(config, config.train.batch_size), "last")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def _difference(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> tuple[float, int]:
    """The largest difference, and how many numbers differ at all."""
    pairs = [(first[name], second[name]) for name in first]
    largest = max(float(np.max(np.abs(a.astype(np.float64) - b), initial=0.0)) for a, b in pairs)
    return largest, sum(int(np.sum(a != b)) for a, b in pairs)


def _same(name: str, first: dict[str, np.ndarray], second: dict[str, np.ndarray], text: str = "") -> Line:
    largest, count = _difference(first, second)
    total = sum(leaf.size for leaf in first.values())
    same = f"{total:,} numbers after {_EPOCHS * _STEPS} steps are the same bits"
    text += f"{count:,} of {total:,} numbers differ, by up to {largest:.1e}" if count else same
    return Line(name, FAIL if count else PASS, text)


def _devices(config: ConfigDict, folder: Path) -> Line:
    devices = len(evaluate.choose_devices(config, config.train.batch_size))
    if devices == 1:
        return Line("on several devices", SKIP, "there is one device here")
    ends = []
    for count in (1, devices):
        chosen = main.override(config.copy_and_resolve_references().lock(), ["optim.name=sgd", f"num_devices={count}"])
        chosen.train.epochs = 1
        ends.append(_trained(chosen, folder / f"devices{count}"))
    largest, _ = _difference(*ends)
    state = PASS if largest <= _DEVICES_LIMIT else FAIL
    return Line(
        f"on 1 and on {devices} devices", state, f"largest difference {largest:.1e}, limit {_DEVICES_LIMIT:.0e}"
    )


def _shards_read(config: ConfigDict, name: str) -> Line:
    builder = input_pipeline.open_shards(config.data.dir, name)
    title, wanted = f"shards of {name}", builder.info.metadata["digest"]
    try:
        found = shards.digest(builder.data_path)
    except Exception as error:  # whatever reading a damaged shard meets
        return Line(title, FAIL, f"cannot be read ({(str(error).splitlines() or [repr(error)])[0]})")
    if found != wanted:
        return Line(title, FAIL, f"digest {found[:12]}… of what is on disk, {wanted[:12]}… when they were written")
    return Line(title, PASS, f"digest {found[:12]}…, as when they were written")


def _shards_rebuilt(config: ConfigDict, name: str, source: str | Path | None, folder: Path) -> Line:
    title = f"shards of {name} built anew"
    source = Path(source) if source is not None else Path(config.data.dir) / "physionet"
    database = name.partition("_")[0]
    if not (source / physionet.DATABASES[database].folder).is_dir():
        return Line(title, SKIP, "the recordings are not at hand (--source DIR)")
    prepare.prepare(folder, databases=(database,), source=source)
    found = input_pipeline.open_shards(folder, name).info.metadata["digest"]
    wanted = input_pipeline.open_shards(config.data.dir, name).info.metadata["digest"]
    return Line(title, PASS if found == wanted else FAIL, f"digest {found[:12]}…, of those in use {wanted[:12]}…")


def _parity(path: Path) -> Line:
    title = f"published {path.stem}"
    if path.stem not in models.MODEL_NAMES:
        return Line(title, SKIP, "not a model of ours")
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    prefix = "state_dict/"
    state_dict = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    variables = torch_weights.from_state_dict(path.stem, state_dict)
    x = arrays["input"].transpose(0, 2, 1)
    model = models.build_model(path.stem)
    outputs = {
        "output_eval": jax.jit(model.apply)(variables, x),
        "output_train": jax.jit(lambda v: model.apply(v, x, train=True, mutable=["batch_stats"])[0])(variables),
    }
    limits = _PARITY_LIMITS | ({"output_train": _DANET_TRAIN_LIMIT} if path.stem == "danet" else {})
    found = {
        name: float(np.max(np.abs(np.asarray(output) - arrays[name].transpose(0, 2, 1))))
        for name, output in outputs.items()
    }
    text = ", ".join(f"{name} {found[name]:.1e} (limit {limits[name]:.0e})" for name in limits)
    return Line(title, PASS if all(found[name] <= limits[name] for name in limits) else FAIL, text)
