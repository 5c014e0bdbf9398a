"""The trained model that another is built around: where `model.base` says it is."""

from typing import Any

import jax
from ml_collections import ConfigDict

from ralenet_jax import checkpoint, evaluate
from ralenet_jax import state as train_state
from ralenet_jax.errors import UserError
from ralenet_jax.models import build_model


def read(
    config: ConfigDict, shape: tuple[int, int], devices: list[jax.Device]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the last checkpoint of the run that `model.base` names, which must be of the published ralenet on mitdb.

    Args:
        config: of the model that is built around it.
        shape: of the windows (samples, leads) that it gets.
        devices: where its arrays are placed.

    Returns:
        {"params": ..., "batch_stats": ...}, and where they come from: the step, and what the run was started with.

    Raises:
        UserError: if `model.base` is not set, or names something else.
    """
    base = config.model.base
    if base is None:
        raise UserError(
            f"{config.model.name} is built around a trained ralenet; give the --workdir of its training: "
            "--config.model.base=DIR"
        )
    try:
        settings = checkpoint.typed_config(checkpoint.read_config(base).to_dict(), base)
        name, database = settings.model.name, settings.data.database
        if train_state.model_from_config(settings) != build_model("ralenet") or database != "mitdb":
            raise UserError(f"{base} holds a run of {name} on {database}; expected ralenet as published, on mitdb")
        _, state = evaluate.restore_state(settings, base, devices, "last", shape)
    except UserError as error:
        raise UserError(f"model.base: {error}") from error
    return state.variables, {"checkpoint": int(state.step), "trained_from": checkpoint.read_starts(base)}
