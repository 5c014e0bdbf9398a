"""The training and the evaluation step: pure functions, and the one place where they meet the devices.

State carries no device axis: it goes in replicated (`in_axes=None`) and, since gradients and metrics are averaged over
the devices, comes out equal on all (`out_axes=None`). Batches carry the devices as their first axis; over several
processes each one's arrays are of its own devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ralenet_jax import augment, metrics, noise, optim
from ralenet_jax.models import gpu_kernels

AXIS = "batch"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseSource:
    """The resident noise: `recordings` float32 `[3, N, C]` in mV, the condition, and the key of fixed noise."""

    recordings: jax.Array
    condition: noise.Condition
    key: jax.Array


def _noisy_windows(protocol: str, source: NoiseSource, batch: dict[str, jax.Array], key, step):
    """The mixture, and what the model takes besides: the R peaks, where a batch tells of them."""
    keys = noise.window_keys(key, batch["id"], step)
    if "r_peak" in batch:
        return augment.mix(source.recordings, source.condition, batch, keys)
    return noise.mix(protocol, source.recordings, source.condition, batch["clean"], keys), {}


def _mean_over_devices(tree: Any) -> Any:
    """One all-reduce for the whole tree; one for each of a hundred leaves costs milliseconds a step."""
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, AXIS))


def train_step(model, optimizer, protocol: str, fresh: bool, state, batch, source: NoiseSource, key, unravel=None):
    """One optimiser step on this device's share of a batch.

    Args:
        model, optimizer, protocol, fresh: what is trained and how noise is drawn; static.
        state: the `TrainState` before.
        batch: "clean" float32 `[B, L, C]` in mV and "id" int32 `[B]`; of recordings also what `augment.mix` takes.
        source: the noise.
        key: key of the run; used where noise is fresh.
        unravel: gives the parameters from the vector that `state` holds in their place; None where it holds them.

    Returns:
        The state after, and the loss and the mean SNR in dB before the update, over all devices.
    """
    mixture, peaks = _noisy_windows(protocol, source, batch, *((key, state.step) if fresh else (source.key, None)))

    def loss_of(params):
        params = params if unravel is None else unravel(params)
        # The gradient of what does not train is a quarter of the work.
        trains = optim.trainable(model, params)
        params = jax.tree.map(lambda leaf, does: leaf if does else jax.lax.stop_gradient(leaf), params, trains)
        output, updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            mixture.noisy,
            train=True,
            mutable=["batch_stats"],
            **peaks,
        )
        return metrics.squared_error(mixture.clean, output, mixture.weight), (output, updates.get("batch_stats", {}))

    (loss, (output, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    scalars = {"loss": loss, "snr_db": jnp.mean(metrics.snr_db(mixture.clean, output))}
    gradients, scalars = _mean_over_devices((gradients, scalars))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state), scalars


def measure(clean, noisy, denoised, mask) -> dict[str, dict[str, jax.Array]]:
    """Sums of all measures over windows `[B, L, C]`, of which `mask` `[B]` counts those that are not 0.

    Returns:
        {"denoised": sums, "noisy": sums}: the denoiser's output, and its input as it came; with the "count" of windows.
    """
    return {
        name: {
            metric: jnp.sum(jnp.where(mask > 0, values, 0.0))
            for metric, values in metrics.window_metrics(clean, noisy, result).items()
        }
        | {"count": jnp.sum(mask)}
        for name, result in (("denoised", denoised), ("noisy", noisy))
    }


def eval_step(model, protocol: str, state_variables, batch, source: NoiseSource) -> dict[str, dict[str, jax.Array]]:
    """Sums of all measures, as `measure` gives them, over this batch's windows, on all devices.

    `batch` holds "clean" `[B, L, C]` in mV, "id" and "mask" float32 `[B]` (0: padding, not counted).
    """
    windows = denoise_step(model, protocol, state_variables, batch, source)
    return jax.lax.psum(measure(**windows, mask=batch["mask"]), AXIS)


def denoise_step(model, protocol: str, state_variables, batch, source: NoiseSource) -> dict[str, jax.Array]:
    """Clean, noisy and denoised windows `[B, L, C]` in the units of the metrics."""
    mixture, peaks = _noisy_windows(protocol, source, batch, source.key, None)
    output = model.apply(state_variables, mixture.noisy, **peaks)
    # Measured after undoing the normalisation, against the centred clean window: an offset is not signal.
    named = {"clean": mixture.clean, "noisy": mixture.noisy, "denoised": output}
    return {name: window * mixture.scale + mixture.offset for name, window in named.items()}


def _pmap(
    step: Callable, devices: Sequence[jax.Device], in_axes: tuple, donate: tuple[int, ...] = (), out_axes=None
) -> Callable:
    @functools.wraps(step)
    def traced(*arguments):
        with gpu_kernels.traced_for(devices[0].platform):
            return step(*arguments)

    return jax.pmap(traced, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, devices=devices, donate_argnums=donate)


def _ravelled(params: Any, told: jax.Array) -> tuple[jax.Array, Callable]:
    """All parameters in one vector, and what gives them back; for GPUs with kernels, and for CPUs.

    `told` is True; XLA is to learn so only when the program runs.
    """
    vector, _ = ravel_pytree(params)
    leaves, tree = jax.tree.flatten(params)
    sizes = tuple(leaf.size for leaf in leaves)
    split = functools.partial(gpu_kernels.split, sizes=sizes) if gpu_kernels.usable() else _build_split(sizes, told)

    def unravel(vector):
        return tree.unflatten(part.reshape(leaf.shape) for part, leaf in zip(split(vector), leaves, strict=True))

    return vector, unravel


def _build_split(sizes: tuple[int, ...], told: jax.Array) -> Callable:
    """Builds `vector → its consecutive parts`, of these sizes, for CPUs.

    XLA compiles a kernel for every place in a vector that it knows, but one for every size where it is told the places
    when the program runs: a third fewer in a training. So they come from a condition, `told`, that always holds.
    """
    places = [sum(sizes[:i]) for i in range(len(sizes))]
    places = jax.lax.cond(told, lambda: [jnp.int32(at) for at in places], lambda: [jnp.int32(0) for _ in places])

    @jax.custom_vjp
    def split(vector, places):
        some = zip(places, sizes, strict=True)
        return [jax.lax.dynamic_slice(vector, (at,), (size,), allow_negative_indices=False) for at, size in some]

    split.defvjp(lambda *given: (split(*given), None), lambda _, gradients: (jnp.concatenate(gradients), None))
    return lambda vector: split(vector, places)


def build_train_block(model, optimizer, protocol: str, fresh: bool, devices: Sequence[jax.Device]) -> Callable:
    """Builds `(state, block, count, source, key) → (state, scalars)`: `count` optimiser steps in one dispatch.

    The block's arrays are `[devices, K, B, …]`, B windows for each device; the scalars are `[K]`, zero from `count` on.
    So one compiled program serves an epoch whose steps K does not divide. The state that goes in is given up to the
    one that comes out.
    """

    def train_block(state, block, count, source, key):
        params, unravel, length = state.params, None, block["id"].shape[0]
        if (gpu_kernels.usable() or gpu_kernels.target() == "cpu") and not hasattr(model, "FROZEN"):
            # One vector instead of three hundred arrays: to add the updates is one kernel, not three hundred.
            params, unravel = _ravelled(params, count >= 0)
        # A GPU that has to be asked after every step whether there is another one stands still meanwhile.
        all_steps = gpu_kernels.usable()

        def one_step(i, carry):
            batch = jax.tree.map(lambda array: array[i], block)
            state, new = train_step(model, optimizer, protocol, fresh, carry[0], batch, source, key, unravel)
            stepped = state, jax.tree.map(lambda row, scalar: row.at[i].set(scalar), carry[1], new)
            return jax.tree.map(functools.partial(jnp.where, i < count), stepped, carry) if all_steps else stepped

        scalars = {name: jnp.zeros(length) for name in ("loss", "snr_db")}
        given = state.replace(params=params), scalars
        state, scalars = jax.lax.fori_loop(0, length if all_steps else count, one_step, given)
        return (state if unravel is None else state.replace(params=unravel(state.params))), scalars

    return _pmap(train_block, devices, (None, 0, None, None, None), donate=(0,))


def build_eval_step(model, protocol: str, devices: Sequence[jax.Device]) -> Callable:
    """Builds `(variables, batch, source) → sums` over devices; the batch's arrays are `[devices, B, …]`."""
    return _pmap(functools.partial(eval_step, model, protocol), devices, (None, 0, None))


def build_inference(model, devices: Sequence[jax.Device]) -> Callable:
    """Builds `(variables, noisy) → denoised`, both `[devices, B, L, C]`, normalised as in training.

    Each device has a program of its own: one over a sharded batch would move the pieces that attention is cut into.
    """
    return _pmap(model.apply, devices, (None, 0), out_axes=0)


def build_denoiser(model, devices: Sequence[jax.Device]) -> Callable:
    """Builds `(variables, noisy, r_peak, r_mask) → denoised`: as `build_inference`, with R peaks `[devices, B, K]`."""

    def denoise(variables, noisy, r_peak, r_mask):
        return model.apply(variables, noisy, r_peak, r_mask=r_mask)

    return _pmap(denoise, devices, (None, 0, 0, 0), out_axes=0)


def replicated(devices: Sequence[jax.Device]) -> NamedSharding:
    """The placement of what is whole on every device; over several processes on this one's, as `pmap` has it."""
    own = [device for device in devices if device.process_index == jax.process_index()]
    return NamedSharding(Mesh(np.array(own), (AXIS,)), PartitionSpec())


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Places a pytree whole on every device."""
    return jax.device_put(tree, replicated(devices))
