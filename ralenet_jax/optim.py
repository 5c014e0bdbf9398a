"""The optimiser that a configuration describes, from Optax."""

import math
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from ralenet_jax.errors import UserError

_SCHEDULES = ("constant", "cosine")
# PyTorch's defaults, which the published runs used.
_OPTIMIZERS = {
    "adam": lambda rate, decay: optax.adam(rate, b1=0.9, b2=0.999, eps=1e-8),
    "adamw": lambda rate, decay: optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=decay),
    "sgd": lambda rate, decay: optax.sgd(rate),
}


def learning_rate(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Learning rate over optimiser steps; raises `UserError` for an unknown schedule or an impossible rate."""
    peak, warmup = config.optim.learning_rate, config.optim.warmup_steps
    if not 0 < peak < math.inf or warmup < 0:
        raise UserError(f"optim.learning_rate is {peak} and optim.warmup_steps {warmup}; expected > 0 and >= 0")
    if config.optim.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(total_steps - warmup, 1))
    else:
        raise UserError(f"optim.schedule is {config.optim.schedule!r}; expected one of {', '.join(_SCHEDULES)}")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def trainable(model: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Which parameters train: True or False in place of each; not those of the submodule that `model.FROZEN` names."""
    frozen = getattr(model, "FROZEN", None)
    return {name: jax.tree.map(lambda _, trains=name != frozen: trains, part) for name, part in params.items()}


def build_optimizer(config: ConfigDict, total_steps: int, model: Any = None) -> optax.GradientTransformation:
    """Builds the optimiser for a model, whose frozen part it leaves alone; raises `UserError` for an unknown one."""
    if config.optim.name not in _OPTIMIZERS:
        raise UserError(f"optim.name is {config.optim.name!r}; expected one of {', '.join(_OPTIMIZERS)}")
    for key in ("weight_decay", "clip_norm"):
        if not 0 <= config.optim[key] < math.inf:
            raise UserError(f"optim.{key} is {config.optim[key]}; expected a number from 0 on")
    if config.optim.weight_decay and config.optim.name != "adamw":
        raise UserError(
            f"optim.weight_decay is set, but optim.name is {config.optim.name!r}; only adamw decays weights"
        )
    optimizer = _OPTIMIZERS[config.optim.name](learning_rate(config, total_steps), config.optim.weight_decay)
    if config.optim.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.optim.clip_norm), optimizer)
    # One vector instead of three hundred arrays: one pass over it, and a third less to compile.
    optimizer = optax.flatten(optimizer)
    if not hasattr(model, "FROZEN"):
        return optimizer
    # Around the one vector: inside it, nobody knows any more what belongs to the frozen part.
    return optax.partition(
        {"trained": optimizer, "frozen": optax.set_to_zero()},
        lambda params: jax.tree.map(lambda trains: "trained" if trains else "frozen", trainable(model, params)),
    )
