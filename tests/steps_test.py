import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from ralenet_jax import metrics, noise, steps
from ralenet_jax.models import build_model, gpu_kernels
from ralenet_jax.models.batch_norm import BatchNorm
from ralenet_jax.state import create_state

_LENGTH = 64
_BATCH = 8


class _Small(nn.Module):
    """Compiles in a moment; has what can go wrong over devices: a normalisation over the batch."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Conv(2, (3,))(nn.relu(BatchNorm(self.axis_name)(nn.Conv(8, (3,))(x), train)))


class _Setup:
    """A batch, noise, a model and its optimiser (SGD: Adam amplifies rounding) with the first state, as host arrays."""

    def __init__(self, model):
        rng = np.random.default_rng(0)
        self.model, self.optimizer = model, optax.sgd(0.1)
        self.state = jax.device_get(create_state(model, self.optimizer, 0, (_LENGTH, 2)))
        self.batch = {
            "clean": rng.standard_normal((3, _BATCH, _LENGTH, 2)).astype(np.float32),
            "id": np.arange(3 * _BATCH, dtype=np.int32).reshape(3, _BATCH),
        }
        recordings = rng.standard_normal((3, 1000, 2)).astype(np.float32)
        self.source = steps.NoiseSource(recordings, noise.condition("emb", -4.0, None, (0, 1000)), jax.random.key(1))

    @functools.cache  # noqa: B019 - compiled once for each kind
    def block(self, devices, fresh):
        return steps.build_train_block(self.model, self.optimizer, "honest", fresh, jax.devices()[:devices])

    def run(self, devices, fresh=False, state=None, first=0, count=1, key=7, filled=0):
        """Trains on steps first..first+count of the batch, the block filled up with others: state and scalars."""
        there = jax.devices()[:devices]
        block = {
            name: np.stack(np.split(array[first : first + count + filled], devices, axis=1))
            for name, array in self.batch.items()
        }
        state, source = steps.replicate((self.state if state is None else state, self.source), there)
        return jax.device_get(self.block(devices, fresh)(state, block, np.int32(count), source, jax.random.key(key)))


@pytest.fixture(scope="module")
def small():
    return _Setup(_Small(axis_name=steps.AXIS))


def _largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.max(np.abs(x - y)), a, b)))


@pytest.mark.parametrize("target", ["cpu", "interpreted"])
def test_parameters_in_one_vector_train_alike(small, target):
    with gpu_kernels.traced_for(target):
        state, scalars = (small if target == "cpu" else _Setup(small.model)).run(2, count=3)
    # As arrays, one for each parameter.
    plain, fixed = small.state, (small.source, jax.random.key(7))
    step = functools.partial(steps.train_step, small.model, small.optimizer, "honest", False)
    step = jax.pmap(step, axis_name=steps.AXIS, in_axes=(None, 0, None, None), out_axes=None, devices=jax.devices()[:2])
    for i in range(3):
        batch = {name: array[i].reshape(2, -1, *array.shape[2:]) for name, array in small.batch.items()}
        plain, single = jax.device_get(step(plain, batch, *fixed))
        np.testing.assert_allclose(scalars["loss"][i], single["loss"], rtol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(plain)
    assert _largest_difference(state.params, plain.params) < 1e-6
    assert _largest_difference(plain.params, small.state.params) > 1e-3  # the steps moved something


# Their gradients take long to compile; the forward pass of the rivals over two devices is tested with the models.
_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ralenet", "unet", "danet")]


@pytest.mark.parametrize("name", ["small", *_SLOW])
def test_one_and_two_devices_agree_after_one_sgd_step(name, small):
    setup = small if name == "small" else _Setup(build_model(name, axis_name=steps.AXIS))
    (one, one_scalars), (two, two_scalars) = setup.run(1), setup.run(2)
    assert _largest_difference(one.params, two.params) < 1e-6
    assert _largest_difference(one.batch_stats, two.batch_stats) < 1e-6
    np.testing.assert_allclose(one_scalars["loss"], two_scalars["loss"], rtol=1e-6)
    assert _largest_difference(one.params, setup.state.params) > 1e-4  # the step moved something


def test_block_of_steps_is_the_steps_one_by_one(small):
    block, scalars = small.run(2, fresh=True, count=3)
    state = None
    for i in range(3):
        state, single = small.run(2, fresh=True, state=state, first=i)
        np.testing.assert_allclose(scalars["loss"][i], single["loss"][0], rtol=1e-6)
    assert int(block.step) == int(state.step) == 3
    assert _largest_difference(block.params, state.params) < 1e-6


@pytest.mark.parametrize("target", ["cpu", "interpreted"])  # kernels: all steps are done, but not all count
def test_what_fills_a_block_up_is_not_trained_on(small, target):
    with gpu_kernels.traced_for(target):
        setup = small if target == "cpu" else _Setup(small.model)
        whole, whole_scalars = setup.run(2, count=2)
        filled, scalars = setup.run(2, count=2, filled=1)
    assert int(filled.step) == 2
    assert _largest_difference(filled, whole) == 0
    np.testing.assert_array_equal(scalars["loss"], [*whole_scalars["loss"], 0])


def test_loss_is_that_of_the_plain_model_on_the_mixed_windows(small):
    _, scalars = small.run(2)
    clean, identity = small.batch["clean"][0], small.batch["id"][0]
    keys = noise.window_keys(small.source.key, identity, None)
    mixture = noise.mix("honest", small.source.recordings, small.source.condition, clean, keys)
    plain = small.model.clone(axis_name=None)
    output, _ = plain.apply(small.state.variables, mixture.noisy, train=True, mutable=["batch_stats"])
    expected = np.mean(np.square(np.asarray(mixture.clean, np.float64) - np.asarray(output, np.float64)))
    np.testing.assert_allclose(scalars["loss"][0], expected, rtol=1e-5)


def test_fixed_noise_ignores_step_and_run_key_fresh_noise_does_not(small):
    later = small.state.replace(step=np.int32(5))
    losses = {
        (fresh, name): small.run(1, fresh=fresh, state=state, key=key)[1]["loss"][0]
        for fresh in (False, True)
        for name, state, key in (("first", None, 7), ("later", later, 7), ("other key", None, 8))
    }
    assert losses[False, "first"] == losses[False, "later"] == losses[False, "other key"]
    assert len({losses[True, "first"], losses[True, "later"], losses[True, "other key"]}) == 3


def test_evaluation_counts_every_window_once_and_no_padding(small):
    clean, identity = small.batch["clean"][0], small.batch["id"][0]
    devices = jax.devices()[:2]
    step = steps.build_eval_step(small.model, "honest", devices)
    mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    given = {"clean": clean, "id": identity, "mask": mask}
    split = {name: np.stack(np.split(array, 2)) for name, array in given.items()}
    variables, source = steps.replicate((small.state.variables, small.source), devices)
    sums = jax.device_get(step(variables, split, source))
    single = jax.jit(functools.partial(steps.denoise_step, small.model, "honest"))
    shown = jax.device_get(single(small.state.variables, {"clean": clean[:5], "id": identity[:5]}, small.source))
    expected = metrics.window_metrics(shown["clean"], shown["noisy"], shown["denoised"])
    assert sums["denoised"]["count"] == sums["noisy"]["count"] == 5
    for name, values in expected.items():
        np.testing.assert_allclose(sums["denoised"][name], np.sum(values), rtol=2e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(sums["noisy"]["snr_db"] / 5, -4.0, atol=1e-4)
    np.testing.assert_allclose(shown["clean"], clean[:5] - clean[:5].mean(1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_inference_is_the_plain_model_on_every_device(small, count):
    devices = jax.devices()[:count]
    noisy = small.batch["clean"][0]
    variables = steps.replicate(small.state.variables, devices)
    split = noisy.reshape(count, _BATCH // count, _LENGTH, 2)
    denoised = steps.build_inference(small.model, devices)(variables, split)
    assert denoised.shape == split.shape
    plain = small.model.clone(axis_name=None).apply(small.state.variables, noisy)
    np.testing.assert_allclose(np.reshape(denoised, noisy.shape), plain, atol=1e-6)


class _Around(nn.Module):
    """A frozen part between two that train."""

    FROZEN = "base"

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Conv(3, (3,), name="base")(nn.Conv(2, (3,), name="before")(x))
        return nn.Conv(2, (3,), name="after")(y)


def test_frozen_part_gets_no_gradient_and_hands_one_on():
    setup = _Setup(_Around())  # whose optimiser would change all
    after, _ = setup.run(1)
    moved = {
        name: _largest_difference(setup.state.params[name], after.params[name]) for name in ("before", "base", "after")
    }
    assert moved["base"] == 0 and min(moved["before"], moved["after"]) > 1e-5
