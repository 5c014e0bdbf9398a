"""Published PyTorch state dicts ↔ Flax variables.

Every model has a function that lists its arrays as `Entry`: the published key, where the array stands in the Flax
variables, and how it is laid out there.
"""

import dataclasses
import re
from collections.abc import Callable
from itertools import pairwise

import flax
import numpy as np
import safetensors.numpy

from ralenet_jax.errors import UserError, printable, reason
from ralenet_jax.models import acdae, danet, ralenet, twelve_lead, unet

# Buffers that hold no weights.
_IGNORED = re.compile(r"(.*\.)?(num_batches_tracked|relative_position_index)")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array is turned from PyTorch's layout into Flax's and back."""

    to_flax: Callable
    to_torch: Callable


SAME = Layout(np.asarray, np.asarray)
DENSE = Layout(np.transpose, np.transpose)  # [out, in] → [in, out]
CONV = Layout(lambda w: w.transpose(2, 1, 0), lambda w: w.transpose(2, 1, 0))  # [out, in, width] → [width, in, out]
# [in, out, width] → [width, in, out], flipped along the width
CONV_TRANSPOSE = Layout(lambda w: w.transpose(2, 0, 1)[::-1], lambda w: w[::-1].transpose(1, 2, 0))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array: its published key, its path in the Flax variables, its published shape and its layout."""

    key: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout = SAME


def read(name, path):
    """Flax variables of a model from a file of its published weights as safetensors; see `from_state_dict`.

    Raises:
        UserError: also if the file is missing or damaged.
    """
    try:
        weights = safetensors.numpy.load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    # A header that lies, or types that NumPy does not have.
    except Exception as error:
        raise UserError(f"{path} is damaged or no safetensors file ({reason(error)}); fetch it anew") from error
    return from_state_dict(name, weights)


def from_state_dict(name, state_dict):
    """Flax variables of a model from its published weights.

    Args:
        name: a model's name, as for `build_model`.
        state_dict: {published key: array}, NumPy arrays or what NumPy can read.

    Returns:
        {"params": ..., "batch_stats": ...} of float32 NumPy arrays; acdae has no "batch_stats".

    Raises:
        UserError: if a key is missing, unknown, or holds an array of another shape or of what is no finite number, or
            if two keys that are one array in the model differ.
    """
    entries = _entries(name)
    known = {entry.key for entry in entries}
    missing = sorted(known - set(state_dict))
    extra = sorted(key for key in set(state_dict) - known if not _IGNORED.fullmatch(key))
    if missing or extra:
        told = [f"{word}: {_some(keys)}" for word, keys in (("missing", missing), ("unknown", extra)) if keys]
        raise UserError(f"the weights do not fit model {name!r}: {'; '.join(told)}; give the state dict of that model")
    variables = {}
    for entry in entries:
        array = np.asarray(state_dict[entry.key])
        with np.errstate(over="ignore"):
            is_sound = array.dtype.kind in "iuf" and np.isfinite(array := array.astype(np.float32)).all()
        if not is_sound:
            raise UserError(f"weight {entry.key!r} holds what is no finite number; give the weights of a sound model")
        if array.shape != entry.shape:
            raise UserError(
                f"weight {entry.key!r} has shape {list(array.shape)}; model {name!r} expects {list(entry.shape)}"
            )
        array = np.ascontiguousarray(entry.layout.to_flax(array))
        if not np.array_equal(array, variables.setdefault(entry.path, array)):
            first = next(other.key for other in entries if other.path == entry.path)
            raise UserError(f"weights {first!r} and {entry.key!r} differ; in model {name!r} they are one and the same")
    return flax.traverse_util.unflatten_dict(variables)


def to_state_dict(name, variables):
    """The inverse of `from_state_dict`: {published key: float32 NumPy array}.

    Raises:
        UserError: if the variables are not those of the model.
    """
    flat = flax.traverse_util.flatten_dict(dict(variables))
    entries = _entries(name)
    different = {entry.path for entry in entries} ^ set(flat)
    if different:
        paths = sorted("/".join(path) for path in different)
        raise UserError(f"the variables are not those of model {name!r}: missing or unknown {_some(paths)}")
    return {
        entry.key: np.ascontiguousarray(entry.layout.to_torch(np.asarray(flat[entry.path], np.float32)))
        for entry in entries
    }


def _some(keys):
    return ", ".join(printable(key)[:80] for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _entries(name):
    if name not in _PUBLISHED:
        raise UserError(f"model {name!r} has no published weights; known: {', '.join(map(repr, _PUBLISHED))}")
    return _PUBLISHED[name]()


def _dense(key, path, features_in, features_out, bias=True):
    yield Entry(f"{key}.weight", ("params", *path, "kernel"), (features_out, features_in), DENSE)
    if bias:
        yield Entry(f"{key}.bias", ("params", *path, "bias"), (features_out,))


def _conv(key, path, features_in, features_out, width, bias=True):
    yield Entry(f"{key}.weight", ("params", *path, "kernel"), (features_out, features_in, width), CONV)
    if bias:
        yield Entry(f"{key}.bias", ("params", *path, "bias"), (features_out,))


def _conv_transpose(key, path, features_in, features_out, width):
    yield Entry(f"{key}.weight", ("params", *path, "kernel"), (features_in, features_out, width), CONV_TRANSPOSE)
    yield Entry(f"{key}.bias", ("params", *path, "bias"), (features_out,))


def _norm(key, path, features):
    yield Entry(f"{key}.weight", ("params", *path, "scale"), (features,))
    yield Entry(f"{key}.bias", ("params", *path, "bias"), (features,))


def _batch_norm(key, path, features):
    yield from _norm(key, path, features)
    yield Entry(f"{key}.running_mean", ("batch_stats", *path, "mean"), (features,))
    yield Entry(f"{key}.running_var", ("batch_stats", *path, "var"), (features,))


def _ralenet_block(key, path, channels, local):
    yield from _dense(f"{key}.attn.qkv_proj.to_q", (path, "attention", "query"), channels, channels)
    yield from _dense(f"{key}.attn.qkv_proj.to_kv", (path, "attention", "key_value"), channels, 2 * channels)
    yield from _dense(f"{key}.attn.proj", (path, "attention", "out"), channels, channels)
    yield from _norm(f"{key}.norm1", (path, "attention_norm"), channels)
    yield from _norm(f"{key}.norm2", (path, "feed_forward_norm"), channels)
    yield from _dense(f"{key}.mlp.fc1", (path, "feed_forward", "expand"), channels, 4 * channels)
    yield from _dense(f"{key}.mlp.fc2", (path, "feed_forward", "project"), 4 * channels, channels)
    if local:
        yield from _conv(f"{key}.mlp.leconv.partial_conv3", (path, "feed_forward", "local"), 1, 1, 3, bias=False)


# published name, Flax name, level; "utranformer3" is spelled so
_RALENET_LAYERS = (
    ("dtransformer1", "encoder0", 0),
    ("dtransformer2", "encoder1", 1),
    ("dtransformer3", "encoder2", 2),
    ("dtransformer34", "encoder3", 3),
    ("transformer", "bottleneck_in", 4),
    ("utransformer4", "bottleneck_out", 4),
    ("utranformer3", "decoder3", 3),
    ("utransformer2", "decoder2", 2),
    ("utransformer1", "decoder1", 1),
)


def _ralenet(local=True, r_wave=True):
    width = ralenet.STEM_WIDTH
    entries = [
        *_conv("conv1.0", ("stem",), 2, width, 3),
        *_batch_norm("conv1.2", ("stem_norm",), width),
        *_conv("transconv.0", ("head",), width, 2, 3),
    ]
    for published, flax_name, level in _RALENET_LAYERS:
        for i in range(2):
            # Without R-wave attention the published layer is a bare list of blocks.
            key = f"{published}.blocks.{i}" if r_wave else f"{published}.{i}"
            entries += _ralenet_block(key, f"{flax_name}_{i}", width * 2**level, local)
    for level, window in enumerate(ralenet.R_WAVE_WINDOWS):
        wide, narrow = width * 2 ** (level + 1), width * 2**level
        for key, path, channels in (("pm", "merge", wide), ("ps", "separate", narrow)):
            entries += _norm(f"{key}{level + 1}.norm", (f"{path}{level}", "norm"), channels)
            entries += _dense(
                f"{key}{level + 1}.reduction", (f"{path}{level}", "dense"), channels, channels, bias=False
            )
        if r_wave:
            key = f"rwattn{level + 1}.relative_position_bias_table"
            shape = (2 * window - 1, narrow // ralenet.HEAD_DIM)
            entries.append(Entry(key, ("params", f"r_wave{level}", "table"), shape))
    return entries


def _ralenet_12lead():
    leads, inner, base_leads = twelve_lead.LEADS, twelve_lead.INNER_LEADS, twelve_lead.TwelveLead.BASE_LEADS
    names = ("reduce0", "reduce1", "expand0", "expand1")
    entries = []
    for i, widths in enumerate(pairwise((leads, inner, base_leads, inner, leads))):
        entries += _conv(f"conv{i + 1}", (names[i],), *widths, twelve_lead.WIDTH)
    for entry in _ralenet():
        collection, *path = entry.path
        path = (collection, twelve_lead.TwelveLead.FROZEN, *path)
        entries.append(dataclasses.replace(entry, key=f"rale.{entry.key}", path=path))
    return entries


def _levels(channels, widths):
    """Of a rival: every level, channels above and below it, width, and its place in the decoder, which goes upwards."""
    last = len(channels) - 1
    return [
        (level, above, below, width, last - level)
        for level, (above, below, width) in enumerate(zip((2, *channels[:-1]), channels, widths, strict=True))
    ]


def _unet():
    bottom = unet.CHANNELS[-1]
    entries = []
    for level, above, below, width, i in _levels(unet.CHANNELS, (3, 3, 3, 3)):
        entries += _conv(f"EncList.{level}.conv", (f"encoder{level}",), above, below, width)
        entries += _batch_norm(f"EncList.{level}.bn", (f"encoder{level}_norm",), below)
        entries += _conv_transpose(f"DecList.{i}.conv", (f"decoder{level}",), below, above, 4)
        entries += _batch_norm(f"DecList.{i}.bn", (f"decoder{level}_norm",), above)
    for i, width in enumerate((1, 3, 1)):
        entries += _conv(f"bottleneck.{3 * i}", (f"bottleneck{i}",), bottom, bottom, width)
    for i in range(2):
        entries += _batch_norm(f"bottleneck.{3 * i + 2}", (f"bottleneck{i}_norm",), bottom)
    return entries


def _danet_gate(key, path, features_in, features_out):
    yield from _dense(f"{key}.0", (path, "gate", "hidden"), features_in, features_in)
    yield from _batch_norm(f"{key}.1", (path, "gate", "hidden_norm"), features_in)
    yield from _dense(f"{key}.3", (path, "gate", "out"), features_in, features_out)
    yield from _batch_norm(f"{key}.4", (path, "gate", "out_norm"), features_out)


def _danet_activation(key, path, features):
    yield from _danet_gate(f"{key}.activate.fcn", f"{path}_activation", 2 * features, features)
    yield from _batch_norm(f"{key}.bn", (f"{path}_norm",), features)


def _danet():
    entries = []
    for level, above, below, width, i in _levels(danet.CHANNELS, danet.ENCODER_WIDTHS):
        key, path = f"enc.EncoderList.cell{level}", f"encoder{level}"
        entries += _conv(f"{key}.conv", (path,), above, below, width)
        entries += _danet_activation(key, path, below)
        key, path = f"dec.DecoderList.{i}", f"decoder{level}"
        entries += _conv_transpose(f"{key}.deconv", (path,), below, above, danet.DECODER_WIDTHS[level])
        entries += _danet_activation(key, path, above)
        if level:
            attention = f"{path}_attention"
            for name in ("fcn1", "fcn2"):  # one module under two names
                entries += _danet_gate(f"{key}.dam.{name}", attention, above, above)
            entries += _conv(f"{key}.dam.convsa", (attention, "sample"), 2, 1, 1)
    return entries


def _acdae():
    entries = []
    for level, above, below, width, i in _levels(acdae.CHANNELS, acdae.WIDTHS):
        entries += _conv(f"EncList.{level}.conv", (f"encoder{level}",), above, below, width)
        entries += _conv_transpose(f"DecList.{i}.conv", (f"decoder{level}",), below, above, width)
        entries += _conv(f"DecList.{i}.ECA.conv", (f"decoder{level}_attention",), 1, 1, 3, bias=False)
    return entries


_PUBLISHED = {
    "ralenet": _ralenet,
    "ralenet_mlp": lambda: _ralenet(local=False),
    "ralenet_nra": lambda: _ralenet(r_wave=False),
    "ralenet_12lead": _ralenet_12lead,
    "unet": _unet,
    "danet": _danet,
    "acdae": _acdae,
}
