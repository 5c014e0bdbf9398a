import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import ralenet
from ralenet_jax import optim
from ralenet_jax.errors import UserError


def config(**changes):
    made = ralenet.get_config()
    with made.optim.unlocked():
        made.optim.update(changes)
    return made


def steps(made, gradients, start, total_steps=100):
    """Parameters after each gradient, float64."""
    optimizer = optim.build_optimizer(made, total_steps)
    params = jnp.asarray(start)
    state = optimizer.init(params)
    after = []
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        after.append(np.asarray(params, np.float64))
    return np.array(after)


def adam(gradients, start, rate, decay=0.0):
    """Kingma and Ba (2015), algorithm 1, with PyTorch's defaults; decay as Loshchilov and Hutter (2019)."""
    first = second = np.zeros_like(start)
    after, params = [], start
    for t, gradient in enumerate(gradients, 1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        step = (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        params = params - rate * (step + decay * params)
        after.append(params)
    return np.array(after)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    # Sizes over seven decades: a wrong epsilon shows in the small ones.
    return rng.standard_normal((12, 8)) * 10.0 ** np.arange(-6, 2), rng.standard_normal(8)


def test_default_is_the_published_adam(problem):
    gradients, start = problem
    found = steps(ralenet.get_config(), gradients.astype(np.float32), start.astype(np.float32))
    np.testing.assert_allclose(found - start, adam(gradients, start, 1e-3) - start, rtol=2e-3, atol=3e-7)


def test_adamw_decays_the_weights_beside_the_gradient(problem):
    gradients, start = problem
    made = config(name="adamw", weight_decay=0.1, learning_rate=1e-2)
    found = steps(made, gradients.astype(np.float32), start.astype(np.float32))
    np.testing.assert_allclose(found - start, adam(gradients, start, 1e-2, 0.1) - start, rtol=2e-3, atol=3e-7)


def test_sgd_steps_down_the_gradient():
    found = steps(config(name="sgd", learning_rate=0.5), [[2.0, -4.0], [1.0, 0.0]], [1.0, 1.0])
    np.testing.assert_allclose(found, [[0.0, 3.0], [-0.5, 3.0]])


def test_gradients_are_clipped_by_their_global_norm():
    made = config(name="sgd", learning_rate=1.0, clip_norm=1.0)
    found = steps(made, [[3.0, -4.0], [0.3, 0.4]], [0.0, 0.0])  # norms 5 and 0.5: the second is left alone
    np.testing.assert_allclose(found, [[-0.6, 0.8], [-0.9, 0.4]], rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 2.0, 50: 2.0, 100: 2.0}),
        ("constant", 20, {0: 0.0, 5: 0.5, 20: 2.0, 100: 2.0}),
        ("cosine", 0, {0: 2.0, 25: 1 + np.sqrt(0.5), 50: 1.0, 100: 0.0}),
        # After 20 steps of warm-up 80 are left: a quarter of them at 40, half at 60.
        ("cosine", 20, {0: 0.0, 10: 1.0, 20: 2.0, 40: 1 + np.sqrt(0.5), 60: 1.0, 100: 0.0}),
        ("cosine", 100, {0: 0.0, 50: 1.0, 99: 1.98}),  # nothing but warm-up
    ],
)
def test_learning_rate_over_100_steps(schedule, warmup, expected):
    rate = optim.learning_rate(config(schedule=schedule, warmup_steps=warmup, learning_rate=2.0), 100)
    found = [float(rate(jnp.asarray(step))) for step in expected]
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-5, atol=1e-6)


def test_the_optimiser_follows_the_schedule():
    made = config(name="sgd", schedule="cosine", learning_rate=1.0)
    found = steps(made, np.ones((4, 1), np.float32), [0.0], total_steps=4)
    np.testing.assert_allclose(np.diff(-found[:, 0], prepend=0), (1 + np.cos(np.pi * np.arange(4) / 4)) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamm"}, "optim.name is 'adamm'; expected one of adam, adamw, sgd"),
        ({"schedule": "linear"}, "optim.schedule is 'linear'; expected one of constant, cosine"),
        ({"learning_rate": 0.0}, "optim.learning_rate is 0.0"),
        ({"learning_rate": -1e-3}, "optim.learning_rate is -0.001"),
        ({"learning_rate": float("nan")}, "optim.learning_rate is nan"),
        ({"learning_rate": float("inf")}, "optim.learning_rate is inf"),
        ({"warmup_steps": -1}, "optim.warmup_steps -1"),
        ({"weight_decay": 0.1}, "optim.weight_decay .*only adamw"),
        ({"weight_decay": -0.1, "name": "adamw"}, "optim.weight_decay"),
        ({"clip_norm": -1.0}, "optim.clip_norm"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        optim.build_optimizer(config(**changes), 100)


def test_state_does_not_depend_on_the_number_of_steps():
    for schedule in ("constant", "cosine"):
        states = [
            jax.eval_shape(optim.build_optimizer(config(schedule=schedule), total).init, jnp.zeros(3))
            for total in (1, 1000)
        ]
        assert states[0] == states[1]


class Around:
    """Stands for a model with a frozen part."""

    FROZEN = "base"


def test_frozen_part_stays_and_counts_for_nothing():
    made = config(name="adamw", weight_decay=0.1, clip_norm=1.0)
    params = {"base": {"a": jnp.ones(3), "b": jnp.ones((2, 2))}, "inside": {"base": jnp.ones(4)}, "out": jnp.ones(2)}
    assert optim.trainable(Around(), params) == {
        "base": {"a": False, "b": False},
        "inside": {"base": True},  # the name counts at the top alone
        "out": True,
    }
    # Gradients of the frozen part that would be cut to nearly nothing, and everything with them.
    gradients = jax.tree.map(lambda leaf: leaf * 1e6, params) | {"inside": {"base": jnp.ones(4)}, "out": jnp.ones(2)}
    rest = {name: params[name] for name in ("inside", "out")}
    alone = after_two_steps(optim.build_optimizer(made, 10), rest, gradients)
    found = after_two_steps(optim.build_optimizer(made, 10, Around()), params, gradients)
    for leaf, start in zip(jax.tree.leaves(found.pop("base")), jax.tree.leaves(params["base"]), strict=True):
        np.testing.assert_array_equal(leaf, start)
    jax.tree.map(np.testing.assert_array_equal, found, alone)
    moments = jax.eval_shape(optim.build_optimizer(made, 10, Around()).init, params)
    assert sum(leaf.size for leaf in jax.tree.leaves(moments) if leaf.ndim) == 2 * 6  # two for each that trains


def after_two_steps(optimizer, params, gradients):
    state = optimizer.init(params)
    gradients = {name: gradients[name] for name in params}
    for _ in range(2):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params
