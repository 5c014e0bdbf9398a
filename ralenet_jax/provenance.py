"""Where a result came from: versions, device, revision, data."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ralenet_jax import input_pipeline

_PACKAGES = ("ralenet_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


def _git(*command: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def revision() -> str | None:
    """Git revision of the source that runs, with "+changes" if it differs from it; None outside a checkout."""
    tracked = _git("ls-files", "--error-unmatch", "provenance.py")
    commit = _git("rev-parse", "HEAD") if tracked else None
    if commit is None:
        return None
    return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(config: ConfigDict, num_devices: int) -> dict[str, Any]:
    """What made a result: configuration, revision, versions, devices, and the checksums of the data.

    The data is told by its digest; the folder it lies in is the user's own affair, as are that of a base and
    the cluster.
    """
    settings = json.loads(config.to_json())
    del settings["data"]["dir"], settings["model"]["base"], settings["distributed"]
    return {"config": settings} | software(num_devices) | {"data": data(config)}


def data(config: ConfigDict) -> dict[str, dict[str, str]]:
    """The part of it that tells the shards: source and digest of each database."""
    found = {}
    for name in (config.data.database, "nstdb"):
        builder = input_pipeline.open_shards(config.data.dir, name)
        found[name] = {"source": builder.info.metadata["source"], "digest": builder.info.metadata["digest"]}
    return found


def software(num_devices: int) -> dict[str, Any]:
    """The part of it that is the same for all data: revision, versions, devices."""
    return {
        "revision": revision(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "device": device(num_devices),
    }


def device(num_devices: int) -> dict[str, Any]:
    """What computes, and how many of them."""
    first = jax.devices()[0]
    return {"kind": first.device_kind, "platform": first.platform, "count": num_devices}
