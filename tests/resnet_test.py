"""The beat classifier against a NumPy reading of its description, with double precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ralenet_jax.errors import UserError
from ralenet_jax.models import initializers, resnet


@pytest.fixture(scope="module")
def variables():
    """Random weights and running statistics, none of them neutral."""
    shapes = jax.eval_shape(resnet.ResNet().init, jax.random.key(0), jnp.zeros((1, 256, 2)))
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("var", "scale"):
            return generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        bound = math.prod(leaf.shape[:-1]) ** -0.5 if name == "kernel" else 0.3
        return (bound * generator.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(resnet.ResNet().apply)


def windows(count, length=256):
    return np.random.default_rng(1).standard_normal((count, length, 2)).astype(np.float32)


def convolve(x, kernel, stride=1):
    """`[B, L, C]` with a kernel `[width, C, features]`, sample by sample of the output."""
    width = len(kernel)
    padded = np.pad(x, [(0, 0), (width // 2, width // 2), (0, 0)])
    starts = range(0, padded.shape[1] - width + 1, stride)
    return np.stack([np.einsum("bwc,wcf->bf", padded[:, i : i + width], kernel) for i in starts], 1)


def expected_logits(variables, x):
    params, stats = variables["params"], variables["batch_stats"]

    def norm(y, block, name):
        weights, running = params[block][name], stats[block][name]
        return (y - running["mean"]) / np.sqrt(running["var"] + 1e-5) * weights["scale"] + weights["bias"]

    x = convolve(x, params["stem"]["kernel"], 2)
    for stage, blocks in enumerate((2, 3, 3, 3)):
        if stage:
            x = convolve(x, params[f"down{stage}"]["kernel"], 2)
        for block in (f"stage{stage}_{i}" for i in range(blocks)):
            y = np.maximum(norm(convolve(x, params[block]["reduce"]["kernel"]), block, "reduce_norm"), 0)
            y = np.maximum(norm(convolve(y, params[block]["conv"]["kernel"]), block, "conv_norm"), 0)
            x = np.maximum(x + norm(convolve(y, params[block]["expand"]["kernel"]), block, "expand_norm"), 0)
    hidden = np.maximum(x.mean(1) @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    return hidden @ params["logits"]["kernel"] + params["logits"]["bias"]


@pytest.mark.parametrize("length", [256, 75])
def test_logits_are_those_of_the_description(apply, variables, length):
    x = windows(3, length)
    exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
    expected = expected_logits(exact, x.astype(np.float64))
    assert expected.shape == (3, 2)
    np.testing.assert_allclose(apply(variables, x), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_parameter_count_by_hand(variables):
    # A block of c channels: c·c/4 + 3·(c/4)² + c/4·c, and scale and bias of c/4, c/4 and c channels.
    blocks = 2 * 800 + 3 * 3_008 + 3 * 11_648 + 3 * 45_824
    between = 3 * (32 * 64 + 64 * 128 + 128 * 256)
    head = (256 * 512 + 512) + (512 * 2 + 2)
    assert 7 * 2 * 32 + blocks + between + head == 445_122
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 445_122


@pytest.mark.parametrize(
    ("width", "stride", "length", "out"),
    [(7, 2, 256, 128), (3, 2, 128, 64), (3, 2, 5, 3), (3, 2, 1, 1), (3, 1, 6, 6), (1, 1, 4, 4)],
)
def test_stride_arithmetic_is_pytorchs(width, stride, length, out):
    conv = resnet.Conv(3, width, stride)
    x = windows(2, length)
    kernel = np.random.default_rng(2).standard_normal((width, 2, 3)).astype(np.float32)
    y = conv.apply({"params": {"kernel": kernel}}, x.transpose(2, 0, 1))
    assert y.shape == (3, 2, out) == (3, 2, (length + 2 * (width // 2) - width) // stride + 1)
    np.testing.assert_allclose(np.transpose(y, (1, 2, 0)), convolve(x, kernel, stride), rtol=1e-5, atol=1e-5)


def test_evaluation_does_not_depend_on_batch_mates_and_training_does(apply, variables):
    x = windows(3)
    other = np.concatenate([x[:1], 2 * x[1:] + 1])
    np.testing.assert_allclose(apply(variables, x)[0], apply(variables, other)[0], rtol=1e-6)
    train = jax.jit(lambda x: resnet.ResNet().apply(variables, x, train=True, mutable=["batch_stats"])[0])
    assert np.abs(train(x)[0] - train(other)[0]).max() > 1e-2


def test_initial_values_are_pytorchs():
    with initializers.drawn_on_host(0):
        fresh = jax.jit(lambda: resnet.ResNet().init(jax.random.key(0), jnp.zeros((1, 16, 2))))()["params"]
    # A dense layer's bias has the bound of its weights.
    for layer, fan_in in (("stem", 7 * 2), ("down3", 3 * 128), ("hidden", 256), ("logits", 512)):
        for leaf in fresh[layer].values():
            assert leaf.size < 10 or 0.9 * fan_in**-0.5 < np.abs(leaf).max()
            assert np.abs(leaf).max() <= fan_in**-0.5


@pytest.mark.parametrize("shape", [(256, 2), (3, 0, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(UserError, match=r"expected \[B, L, leads\]"):
        resnet.ResNet().init(jax.random.key(0), jnp.zeros(shape))
