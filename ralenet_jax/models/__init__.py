"""The models by name."""

import dataclasses
import difflib

from ralenet_jax.errors import UserError
from ralenet_jax.models.acdae import ACDAE
from ralenet_jax.models.danet import DANet
from ralenet_jax.models.ralenet import RALENet
from ralenet_jax.models.twelve_lead import TwelveLead
from ralenet_jax.models.unet import UNet

# name: (Linen module, the fields in which it differs from the module's defaults)
_MODELS = {
    "ralenet": (RALENet, {}),
    "ralenet_mlp": (RALENet, {"local_enhancement": "none"}),
    "ralenet_nra": (RALENet, {"r_wave_attention": False}),
    "ralenet_12lead": (TwelveLead, {}),
    "unet": (UNet, {}),
    "danet": (DANet, {}),
    "acdae": (ACDAE, {}),
}
MODEL_NAMES = tuple(_MODELS)


def build_model(name, axis_name=None, **overrides):
    """The model `name` as a Linen module: `__call__(x [B, L, C], r_peak=None, train=False) -> [B, L, C]`.

    Args:
        name: one of `MODEL_NAMES`.
        axis_name: the pmapped axis over which BatchNorm takes its statistics, None for one device.
        **overrides: fields of the module, such as `efficient_channel_attention=True`.

    Raises:
        UserError: for an unknown name, override or value; it names the nearest known one.
    """
    if name not in _MODELS:
        raise UserError(f"unknown model {name!r}; {_nearest(name, MODEL_NAMES)}")
    module, variant = _MODELS[name]
    fields = [f.name for f in dataclasses.fields(module) if f.name not in ("axis_name", "parent", "name")]
    for key in overrides:
        if key not in fields:
            raise UserError(f"model {name!r} has no option {key!r}; {_nearest(key, fields)}")
    choices = getattr(module, "CHOICES", {})
    for key, value in overrides.items():
        if key in choices and value not in choices[key]:
            raise UserError(f"model {name!r} got {key}={value!r}; {_nearest(value, choices[key])}")
    return module(axis_name=axis_name, **{**variant, **overrides})


def _nearest(given, known):
    if not known:
        return "it has none"
    nearest = difflib.get_close_matches(str(given), known, n=1, cutoff=0)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}known: {', '.join(map(repr, known))}"
