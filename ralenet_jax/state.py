"""What training changes from step to step."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ralenet_jax import optim
from ralenet_jax.models import build_model, gpu_kernels, initializers


@flax.struct.dataclass
class TrainState:
    """Parameters, running statistics, optimiser state and step count; no device axis, a plain pytree of arrays."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def model_from_config(config: ConfigDict, axis_name: str | None = None) -> nn.Module:
    """Builds the model that `config.model` names, with the options that it sets."""
    options = {key: value for key, value in config.model.items() if key not in ("name", "base") and value is not None}
    return build_model(config.model.name, axis_name=axis_name, **options)


def create_state(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int, shape: tuple[int, int]
) -> TrainState:
    """Fresh state for windows of `shape` (samples, leads): the same from the same seed on every platform."""
    return build_create(model, optimizer, seed, shape)()


def build_create(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int, shape: tuple[int, int]
) -> Callable[[], TrainState]:
    """Builds the jitted function that makes the state of `create_state`."""

    def create() -> TrainState:
        # Initial values do not depend on how the model is computed.
        with initializers.drawn_on_host(seed), gpu_kernels.traced_for("cpu"):
            variables = model.init(jax.random.key(seed), jnp.zeros((1, *shape)))
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
        )

    return jax.jit(create)


def count_parameters(params: Any) -> int:
    """All parameters, frozen ones too."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def count_trainable(model: nn.Module, params: Any) -> int:
    """Parameters that train."""
    sizes = jax.tree.map(lambda leaf, trains: leaf.size * trains, params, optim.trainable(model, params))
    return sum(jax.tree.leaves(sizes))
