"""A model that is built in a moment, and files of its weights written without our code."""

import contextlib

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import numpy as np
import pytest
import safetensors.numpy

from ralenet_jax import export, models
from ralenet_jax.main import load_config
from ralenet_jax.models.batch_norm import BatchNorm


class Small(nn.Module):
    """Mixes two leads and normalises them."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, r_peak=None, train=False):
        x = x @ self.param("kernel", nn.initializers.constant(0.5), (2, 2))
        return BatchNorm(self.axis_name, name="norm")(nn.leaky_relu(x), train)


@contextlib.contextmanager
def known():
    """While it lasts, "small" is a model."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(models._MODELS, "small", (Small, {}))
        yield


def trained():
    """It, as if trained."""
    config = load_config("ralenet")
    config.model.name = "small"
    norm = {"mean": np.array([0.5, -1], np.float32), "var": np.array([1, 2], np.float32)}
    scaled = {"scale": np.array([3, 1], np.float32), "bias": np.zeros(2, np.float32)}
    params = {"kernel": np.array([[1, -2], [0.5, 3]], np.float32), "norm": scaled}
    return export.Trained(config, {"params": params, "batch_stats": {"norm": norm}}, (32, 2), {"checkpoint": 4})


def flat(variables):
    return flax.traverse_util.flatten_dict(variables, sep="/")


def save(path, texts, arrays):
    """Writes a file of weights."""
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path, texts)
    elif path.suffix == ".npz":
        np.savez(path, **arrays, **texts)
    else:
        tree = flax.traverse_util.unflatten_dict(arrays, sep="/")
        path.write_bytes(flax.serialization.msgpack_serialize(tree | texts))
    return path
