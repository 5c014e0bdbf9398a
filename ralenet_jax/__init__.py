"""RA-LENet in JAX: ECG denoising with R-wave attention and local enhancement.

The names below load on first use, so that `import ralenet_jax` and the `ralenet` command start without JAX.

    build_model(name, axis_name=None, **overrides)     a Flax Linen model by its name
    torch_weights                                      published PyTorch weights as Flax variables
    Denoiser                                           cleans recordings with a trained model
"""

import importlib
from typing import Any

__version__ = "0.1.0"  # the only place; the package's metadata reads it from here

__all__ = ["Denoiser", "__version__", "build_model", "torch_weights"]


def __getattr__(name: str) -> Any:
    if name == "build_model":
        return importlib.import_module("ralenet_jax.models").build_model
    if name == "torch_weights":
        return importlib.import_module("ralenet_jax.torch_weights")
    if name == "Denoiser":
        return importlib.import_module("ralenet_jax.denoise").Denoiser
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
