"""The command `ralenet export`: a trained model as a file for JAX, NumPy, PyTorch, XLA or ONNX; and the way back.

Weights stand in the file under their Flax path with "/" ("params/stem/kernel"); with them go, as JSON texts, the
configuration, the window `[L, C]` the model was trained on, and where it came from.
"""

import argparse
import dataclasses
import functools
import importlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.export
import msgpack
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from ralenet_jax import checkpoint, evaluate, input_pipeline, provenance, readers_recording, startup, torch_weights
from ralenet_jax import state as train_state
from ralenet_jax.errors import UserError, reason
from ralenet_jax.models import gpu_kernels

TEXTS = ("config", "window", "provenance")
_COMPARED = 5  # random windows
_MOST_WEIGHTS = 2**12  # of a file, by number; each takes time and memory, though it may be empty
_WIDEST = 2**9  # parts of a container in a msgpack: a module's weights and modules, an array's dimensions
_LONGEST_TEXT = 2**20  # characters, of which each may become a container
_LONGEST_NAME = 200  # of a weight, as a message tells it
_LONGEST, _MOST_LEADS = 2**16, 2**10  # of a window that a file may claim: its model has to be built


class Different(ArithmeticError):
    """What was written does not compute what the trained model does; it was not kept."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        config: the run's configuration.
        variables: {"params": ..., "batch_stats": ...} of NumPy arrays.
        window: samples and leads of the windows it was trained on.
        provenance: the checkpoint's step, what the run was started with, and what `provenance.describe` tells.
    """

    config: ConfigDict
    variables: dict[str, Any]
    window: tuple[int, int]
    provenance: dict[str, Any]

    def denoise(self, windows: np.ndarray) -> np.ndarray:
        """`[B, L, C]` → the same shape."""
        return np.asarray(_apply(train_state.model_from_config(self.config))(self.variables, windows))

    def texts(self) -> dict[str, str]:
        """What goes with the weights, as JSON, by the names in `TEXTS`."""
        settings = json.loads(self.config.to_json())
        del settings["data"]["dir"], settings["model"]["base"]  # the user's own affair
        values = (settings, list(self.window), self.provenance)
        return {name: json.dumps(value) for name, value in zip(TEXTS, values, strict=True)}


@functools.cache
def _apply(model: Any) -> Callable:
    return jax.jit(model.apply)


def restore(config: ConfigDict, workdir: str | Path, which: str = "last") -> Trained:
    """The trained model of the run in `workdir`, from the "last" or "best" checkpoint or that of a step.

    The run tells what it was trained on; the shards are asked only where it does not (an older one).

    Raises:
        UserError: if there is no such checkpoint, or nothing that tells the shape of a window.
    """
    starts = checkpoint.read_starts(workdir)
    last = starts[-1] if starts else {}
    window = tuple(last.get("window") or input_pipeline.window_shape(config))
    _, state = evaluate.restore_state(config, workdir, [_cpu()], which, window)
    data = last.get("data") or provenance.data(config)
    origin = provenance.software(1) | {"data": data, "checkpoint": int(state.step), "trained_from": starts}
    return Trained(config, jax.device_get(state.variables), window, origin)


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError("exports are compared on the CPU, which JAX_PLATFORMS leaves out; add cpu to it") from error


def load(path: str | Path) -> tuple[ConfigDict, dict[str, Any]]:
    """Reads what `ralenet export` wrote as safetensors, npz or msgpack.

    Nothing in the file is run, and nothing is taken on trust: the weights must be exactly those of the model that the
    configuration names.

    Returns:
        The locked configuration (`data.dir` at its default) and {"params": ..., "batch_stats": ...} of NumPy arrays,
        float32 also where the file holds float16.

    Raises:
        UserError: if the file is missing, damaged or not of this version; it names the first weight that is wrong.
    """
    path = Path(path)
    config, window, arrays = _read(path)
    expected = _expected(config, window, path)
    for name in sorted(expected.keys() | arrays.keys()):
        _check(name, arrays.get(name), expected.get(name), config.model.name, path)
    return config, _nested(arrays)


def load_own(path: str | Path) -> tuple[ConfigDict, dict[str, Any]]:
    """As `load`, for a file that comes with the package: to know what its weights should be takes most of the time."""
    config, _, arrays = _read(Path(path))
    return config, _nested(arrays)


def _read(path: Path) -> tuple[ConfigDict, Any, dict[str, Any]]:
    """The configuration of a file of weights, the window that it tells of, and what arrays it holds, by name."""
    if path.suffix not in _READERS:
        raise UserError(f"{path} is no file of weights; expected one that ends in {', '.join(_READERS)}")
    try:
        texts, arrays = _READERS[path.suffix](path)
        if max(map(len, texts.values()), default=0) > _LONGEST_TEXT:
            raise ValueError(f"a text of more than {_LONGEST_TEXT} characters")
        settings, window = json.loads(texts["config"]), json.loads(texts["window"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]!r} text; expected a file that `ralenet export` wrote") from error
    # Each library has errors of its own for each kind of damage.
    except Exception as error:
        raise UserError(f"{path} is damaged or no {path.suffix[1:]} file ({reason(error)}); export it anew") from error
    config = checkpoint.typed_config(settings, path)
    # Half the size for the weights that come along; they are used as float32 all the same.
    half = {name: np.asarray(array, np.float32) for name, array in arrays.items() if _is_half(array)}
    return config, window, arrays | half


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    return {"params": {}, "batch_stats": {}} | flax.traverse_util.unflatten_dict(arrays, sep="/")


def _expected(config: ConfigDict, window: Any, path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the weights, by name, that the model of a configuration has."""
    is_pair = isinstance(window, list) and [type(number) for number in window] == [int, int]
    if not (is_pair and 0 < window[0] <= _LONGEST and 0 < window[1] <= _MOST_LEADS):
        raise UserError(f"{path} tells of windows {str(window)[:40]}; expected [samples, leads]; export it anew")
    model = train_state.model_from_config(config)
    try:
        example = jax.ShapeDtypeStruct((1, *window), np.float32)
        return _flat(jax.eval_shape(model.init, jax.random.key(0), example))
    # What a model cannot take shows where its layers meet.
    except Exception as error:
        raise UserError(f"{path} tells of windows {window}, which its model does not take; export it anew") from error


def _check(name: str, array: Any, expected: jax.ShapeDtypeStruct | None, model: str, path: Path) -> None:
    told = "is missing" if array is None else "is unknown"
    if array is not None and expected is not None:
        found = f"{getattr(array, 'dtype', type(array).__name__)} {list(np.shape(array))}"
        wanted = f"{expected.dtype} {list(expected.shape)}"
        if found == wanted and np.isfinite(array).all():
            return
        told = f"is {found}, expected {wanted}" if found != wanted else "is not finite"
    raise UserError(f"{path} does not hold model {model!r}: {name[:_LONGEST_NAME]!r} {told}; export it anew")


def _is_half(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype == np.float16


def _flat(variables: dict[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(variables, sep="/")


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    with safetensors.safe_open(path, framework="numpy") as file:
        if len(file.keys()) > _MOST_WEIGHTS:
            raise ValueError(f"{len(file.keys())} weights")
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}


def _read_npz(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    with readers_recording.open_archive(path) as members:
        # Packed or overlapping members could ask for more memory than there is.
        if sum(member.file_size for member in members.infolist()) > path.stat().st_size:
            raise ValueError("it holds more than its size")
        if len(members.infolist()) > _MOST_WEIGHTS:
            raise ValueError(f"{len(members.infolist())} weights")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return {name: str(arrays.pop(name)) for name in TEXTS if name in arrays}, arrays


def _read_msgpack(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    tree = _unpack(path.read_bytes())
    texts = {name: tree.pop(name) for name in TEXTS if name in tree}
    return texts, _flat(tree)


def _unpack(data: bytes) -> dict[str, Any]:
    """What Flax serialised, as `flax.serialization.msgpack_restore` gives it, of arrays and texts alone.

    A byte may stand for an empty container, which takes 64 in memory, so a file may have only so many.
    """
    parts = 0

    def count(container):
        nonlocal parts
        parts += 1 + len(container)
        if parts > 4 * _MOST_WEIGHTS:
            raise ValueError(f"more than {4 * _MOST_WEIGHTS} parts")
        return container

    limits = {"max_array_len": _WIDEST, "max_map_len": _WIDEST, "list_hook": count, "object_hook": count}

    def array(code: int, packed: bytes) -> np.ndarray:
        if code != 1:
            raise ValueError(f"an extension {code}, which is no array")
        shape, dtype, values = msgpack.unpackb(packed, raw=True, **limits)
        return np.frombuffer(values, dtype).reshape(shape)

    return msgpack.unpackb(data, ext_hook=array, **limits)


_READERS = {".safetensors": _read_safetensors, ".npz": _read_npz, ".msgpack": _read_msgpack}


def _write_safetensors(trained: Trained) -> bytes:
    return safetensors.numpy.save(_flat(trained.variables), trained.texts())


def _write_npz(trained: Trained) -> bytes:
    file = io.BytesIO()
    np.savez(file, **_flat(trained.variables), **trained.texts())
    return file.getvalue()


def _write_msgpack(trained: Trained) -> bytes:
    return flax.serialization.msgpack_serialize(trained.variables | trained.texts())


def _write_torch(trained: Trained) -> bytes:
    weights = torch_weights.to_state_dict(trained.config.model.name, trained.variables)
    return safetensors.numpy.save(weights, {"format": "pt"} | trained.texts())


def _write_stablehlo(trained: Trained) -> bytes:
    (batch,) = jax.export.symbolic_shape("b")
    windows = jax.ShapeDtypeStruct((batch, *trained.window), np.float32)
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)  # or the file would name this machine's folders
    try:
        exported = jax.export.export(_function(trained), platforms=("cpu", "cuda", "tpu"))(windows)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    return bytes(exported.serialize())


def _write_onnx(trained: Trained) -> bytes:
    jax2onnx = _optional("jax2onnx")
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # hundreds of lines on shapes it leaves to the runtime
    name = trained.config.model.name
    names = {"input_names": ["noisy"], "output_names": ["denoised"], "model_name": name}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Explicitly requested dtype")  # what it asks of JAX for its own ends
            model = jax2onnx.to_onnx(_function(trained), [("batch", *trained.window)], **names)
    # It fails in many ways where an operation is beyond it.
    except Exception as error:
        raise UserError(f"jax2onnx cannot convert model {name!r} ({reason(error)}); take another --format") from error
    for key, value in trained.texts().items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def _function(trained: Trained) -> Callable:
    model = train_state.model_from_config(trained.config)

    @jax.jit
    def denoise(windows):
        return model.apply(trained.variables, windows)

    return denoise


def _optional(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'the format onnx needs {error.name}; pip install "ralenet_jax[onnx]"') from error


def _reread_weights(path: Path, trained: Trained) -> Callable:
    config, variables = load(path)
    return dataclasses.replace(trained, config=config, variables=variables).denoise


def _reread_torch(path: Path, trained: Trained) -> Callable:
    variables = torch_weights.read(trained.config.model.name, path)
    return dataclasses.replace(trained, variables=variables).denoise


def _reread_stablehlo(path: Path, trained: Trained) -> Callable:
    return jax.export.deserialize(bytearray(path.read_bytes())).call


def _reread_onnx(path: Path, trained: Trained) -> Callable:
    session = _optional("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda windows: session.run(None, {"noisy": windows})[0]


@dataclasses.dataclass(frozen=True)
class Format:
    """How a format is written, read back as a function of windows, and how much the two may differ.

    Attributes:
        suffix: what its files end in.
        write: the bytes of a trained model's file.
        reread: what that file computes: `[B, L, C]` → `[B, L, C]`.
        limit: largest absolute difference on windows of unit power, for a model that computes in float32.
        rounded_limit: the same for one that computes in bfloat16; None: the file computes in float32 all the same, and
            says so.
    """

    suffix: str
    write: Callable[[Trained], bytes]
    reread: Callable[[Path, Trained], Callable]
    limit: float = 1e-5
    rounded_limit: float | None = 1e-5


FORMATS = {
    "safetensors": Format(".safetensors", _write_safetensors, _reread_weights),
    "npz": Format(".npz", _write_npz, _reread_weights),
    "msgpack": Format(".msgpack", _write_msgpack, _reread_weights),
    # Compiled in another way it rounds in other places.
    "stablehlo": Format(".stablehlo", _write_stablehlo, _reread_stablehlo, rounded_limit=0.1),
    "onnx": Format(".onnx", _write_onnx, _reread_onnx, limit=1e-4, rounded_limit=None),
    "torch": Format(".torch.safetensors", _write_torch, _reread_torch),
}


def write(trained: Trained, name: str, path: str | Path) -> float:
    """Writes a trained model in a format of `FORMATS`, once what was written computes the same.

    Returns:
        The largest difference between the two on random windows.

    Raises:
        UserError: if the model has no such format, a library is missing, or the file cannot be written.
        Different: if the two differ by more than the format's limit; no file is left.
    """
    path, chosen = Path(path), FORMATS[name]
    suffix = Path(f"name{chosen.suffix}").suffix  # with a name of the user's own .safetensors is enough
    if path.suffix != suffix or path.is_dir():
        raise UserError(f"--out {path}; expected a file whose name ends in {suffix}")
    if _rounds(trained) and chosen.rounded_limit is None:
        config = trained.config.copy_and_resolve_references()
        config.model.dtype = "float32"
        trained = dataclasses.replace(trained, config=config)
    with jax.default_device(_cpu()), gpu_kernels.traced_for("cpu"):
        data = chosen.write(trained)
        windows = np.random.default_rng(0).standard_normal((_COMPARED, *trained.window), np.float32)
        try:
            return _keep(path, data, lambda file: _difference(chosen, file, trained, windows))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; free space or name another --out") from error


def _keep(path: Path, data: bytes, check: Callable[[Path], float]) -> float:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        temporary.write_bytes(data)
        difference = check(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def _difference(chosen: Format, file: Path, trained: Trained, windows: np.ndarray) -> float:
    found, wanted = np.asarray(chosen.reread(file, trained)(windows)), trained.denoise(windows)
    difference = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else np.inf
    limit = chosen.rounded_limit if _rounds(trained) else chosen.limit
    if not difference <= limit:  # NaN is no match either
        raise Different(f"the file read back differs from the model by {difference:.1e}, more than {limit:.0e}")
    return difference


def _rounds(trained: Trained) -> bool:
    return trained.config.model.dtype == "bfloat16"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ralenet export", allow_abbrev=False, description="Write a trained model as a file for other programs."
    )
    add = parser.add_argument
    add("--workdir", required=True, help="folder of the run")
    add("--format", required=True, choices=FORMATS, help="of the file; see the README")
    add("--out", help="file to write (default: WORKDIR/export/MODEL and the format's suffix)")
    add("--checkpoint", default="last", help="last, best or the number of a step (default: last)")
    add("--data-dir", help="folder of the shards, which a run is asked for that does not tell of them itself")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns 0, or 1 if the file read back differs. Raises `UserError` for bad input."""
    arguments = _parser().parse_args(argv)
    startup.start_jax()
    settings = checkpoint.read_config(arguments.workdir).to_dict()
    config = checkpoint.typed_config(settings, arguments.workdir)
    if arguments.data_dir:
        config.data.dir = arguments.data_dir
    chosen = FORMATS[arguments.format]
    path = Path(arguments.out or Path(arguments.workdir) / "export" / f"{config.model.name}{chosen.suffix}")
    trained = restore(config, arguments.workdir, arguments.checkpoint)
    try:
        difference = write(trained, arguments.format, path)
    except Different as error:
        print(f"ralenet: not written: {error}", file=sys.stderr)
        return 1
    print(f"written to {path}: step {trained.provenance['checkpoint']}, {path.stat().st_size:,} bytes")
    print(f"read back, its output differs by at most {difference:.1e} on {_COMPARED} random windows")
    return 0
