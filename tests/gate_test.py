"""The gate, on windows whose powers are known."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from ralenet_jax import gate, streaming

GRID = streaming.build_grid(360, 256)
HOP_S = GRID.hop / 180
OTHERS = 8  # drift, rest and six bands
DRIFT, REST = 0, 1
RUNS = len(gate.SECONDS) + 1  # and now
BURSTS = 2 * RUNS * OTHERS


def at(seconds, which):
    """The place of heartbeats over one of the others among the features."""
    return OTHERS * gate.SECONDS.index(seconds) + which


def empty_network(**given):
    """One of which only what is given is not 0."""
    shapes = {"hidden": (gate.FEATURES + 1, 1), "out": (1, 2), "direct": (gate.FEATURES + 1, 2)}
    shapes |= {"input": (gate.FEATURES + 1, 3), "recurrent": (1, 3), "output": (1, 2)}
    return {name: np.zeros(shape) for name, shape in shapes.items()} | given


def network(drift=None, rest=None):
    """One without a hidden layer in which only one feature counts, in dB: half goes at 6 dB."""
    direct = np.zeros((gate.FEATURES + 1, 2))
    for column, place in enumerate((drift, rest)):
        direct[-1, column] = -90.0
        if place is not None:
            direct[place, column], direct[-1, column] = -10.0, 6.0
    return empty_network(direct=direct)


def windows(count, beats_db=0.0, drift_db=-90.0, rest_db=-90.0, leads=1):
    """Heartbeats, drift and rest of so many windows `[W, 256, C]`, of these powers."""
    wave = np.sqrt(2) * np.sin(2 * np.pi * np.arange(256) / 32)[None, :, None] * np.ones((count, 1, leads))
    return wave * 10 ** (beats_db / 20) + 7, np.full_like(wave, 10 ** (drift_db / 20)), wave * 10 ** (rest_db / 20)


def wander(count, hertz):
    """A sine of amplitude 1 that goes on from window to window."""
    time = (GRID.start(np.arange(count))[:, None] + np.arange(256)) / 180
    return np.sin(2 * np.pi * hertz * time)[:, :, None]


def features(*of, of_gate=None):
    one = of_gate or gate.Gate(GRID)
    return one.features(*one.measure(*of))


def removed(beats, drift, rest, at_peaks=0.0, **options):
    """What goes, and of the rest which part."""
    return gate.Gate(GRID, **options)(beats, drift, rest, np.float32(at_peaks))


@pytest.mark.parametrize("which", [DRIFT, REST])
@pytest.mark.parametrize("seconds", gate.SECONDS)
@pytest.mark.parametrize("ratio_db, part", [(30, 0), (6, 0.5), (-20, 1)])
def test_more_goes_of_what_is_strong_against_the_heartbeats(which, seconds, ratio_db, part):
    noise_db = {("drift_db", "rest_db")[which]: 3 - ratio_db}
    chosen = network(**{("drift", "rest")[which]: at(seconds, which)})
    beats, drift, rest = windows(30, beats_db=3, **noise_db)
    found, of_rest = removed(beats, drift, rest, network=chosen)
    np.testing.assert_allclose(found, part * (drift, rest)[which], atol=1e-3)
    assert of_rest.shape == (30, 1, 1) and of_rest.dtype == np.float32
    np.testing.assert_allclose(of_rest, part if which == REST else 0, atol=1e-6)


ALL = empty_network()
ALL["direct"][-1] = 90.0


def rest_of(hertz, rest_db, count=30):
    time = np.arange(count * 256).reshape(count, 256, 1) / 180
    return np.sqrt(2) * 10 ** (rest_db / 20) * np.sin(2 * np.pi * hertz * time)


@pytest.mark.parametrize(
    "hertz, ratio_db, spared",
    [
        (3, -20, 0.4),
        (3, -6, 0.4),
        (3, -2, 0.7),
        (3, 2, 1),
        (3, 40, 1),
        (75, 8, 0),
        (75, 11, 0.5),
        (75, 14, 1),
        (75, 40, 1),
    ],
)
def test_the_fainter_the_rest_the_more_of_it_is_spared_at_r_peaks(hertz, ratio_db, spared):
    beats, drift, _ = windows(30, beats_db=3)
    rest = rest_of(hertz, 3 - ratio_db)
    # The filter between the two kinds has edges of 7 samples, and lets a little through.
    inside = slice(8, -8)
    for near in (0.0, 0.5, 1.0):
        found, of_rest = removed(beats, drift * 0, rest, near, network=ALL)
        np.testing.assert_array_equal(of_rest, 1)
        expected = (1 - near * spared) * rest
        np.testing.assert_allclose(found[:, inside], expected[:, inside], atol=0.03 * np.abs(rest).max())


def test_slow_noise_does_not_tell_how_much_is_spared_of_what_is_fast():
    beats, drift, _ = windows(30, beats_db=3)
    slow, fast = rest_of(3, 13), rest_of(75, -17)
    found, _ = removed(beats, drift * 0, slow + fast, 1.0, network=ALL)
    np.testing.assert_allclose(found[:, 8:-8], 0.6 * slow[:, 8:-8], atol=0.03 * slow.max())


def test_what_is_beyond_all_training_counts_as_its_border():
    found = features(*windows(50, drift_db=35, rest_db=-45))
    np.testing.assert_allclose(found[:, 0, [at(60.0, DRIFT), at(60.0, REST)]], [[-2, 4]] * 50, atol=1e-6)


def test_what_it_goes_by():
    found = features(*windows(100, beats_db=5, drift_db=1, rest_db=-8))
    assert found.shape == (100, 1, gate.FEATURES)
    for seconds in gate.SECONDS:
        np.testing.assert_allclose(found[:, 0, [at(seconds, DRIFT), at(seconds, REST)]], [[0.4, 1.3]] * 100, atol=1e-6)
    now = OTHERS * len(gate.SECONDS)
    np.testing.assert_allclose(found[:, 0, [now + DRIFT, now + REST]], [[0.4, 1.3]] * 100, atol=1e-6)
    np.testing.assert_allclose(found[:, :, BURSTS : BURSTS + 3], 0, atol=1e-6)
    np.testing.assert_allclose(found[:, 0, -2], 0, atol=1e-6)  # heartbeats are as ever
    np.testing.assert_allclose(found[:, 0, -1], np.minimum(np.arange(100) * HOP_S / 60, 1), atol=1e-6)


@pytest.mark.parametrize("hertz, band", [(0.02, 0), (0.14, 2), (0.57, 4), (1.3, 5)])
def test_slow_signals_are_told_by_their_pace(hertz, band):
    beats, _, rest = windows(400)
    found = features(beats, wander(400, hertz), rest)[-1, 0, at(60.0, 2) : at(60.0, 2) + 6]
    # Over a sine, of power −3 dB, heartbeats of 0 dB stand 3 dB; filters of low order let a little less through.
    assert found.argmin() == band and found[band] == pytest.approx(0.3, abs=0.12)


def test_bursts_count_less_in_the_long_run_than_what_stays():
    calm = windows(1, drift_db=-15)
    burst = windows(1, drift_db=10)
    many = [np.concatenate([(burst if n % 10 == 9 else calm)[i] for n in range(400)]) for i in range(3)]
    found = features(*many)[-1, 0]
    # A tenth of the windows is 10 dB strong: on the average 0 dB, of the decibels −12.5 dB.
    assert found[at(60.0, DRIFT)] == pytest.approx(-0.01, abs=0.06)
    assert found[BURSTS + 1] == pytest.approx(1.26, abs=0.09)


@pytest.mark.parametrize("seconds", gate.SECONDS)
def test_memory_fades_with_the_seconds(seconds):
    one = gate.Gate(GRID)
    features(*windows(1000, rest_db=-40), of_gate=one)
    found = features(*windows(60, rest_db=20), of_gate=one)[:, 0, at(seconds, REST)]
    share = 1 - np.exp(-HOP_S * np.arange(1, 61) / seconds)
    expected = -np.log10(share * 100 + (1 - share) * 1e-4)
    np.testing.assert_allclose(found, expected.clip(-2, 4), atol=1e-4)


def test_now_forgets_at_once():
    one = gate.Gate(GRID)
    features(*windows(100, rest_db=-30), of_gate=one)
    found = features(*windows(2, beats_db=-10, rest_db=10), of_gate=one)[:, 0]
    now = OTHERS * len(gate.SECONDS) + REST
    # Over the heartbeats of a minute, 0 dB but for what has just changed.
    np.testing.assert_allclose(found[:, now], -1.0, atol=0.02)
    np.testing.assert_allclose(found[:, -2], 1.0, atol=0.02)


def test_the_memory_is_a_gated_recurrent_unit():
    cell, random = nn.GRUCell(3), np.random.default_rng(0)
    given, state = random.standard_normal((20, 2, gate.FEATURES)), random.standard_normal((2, 3))
    params = jax.device_get(cell.init(jax.random.key(1), state, given[0])["params"])
    kernels = [[params[f"{side}{name}"]["kernel"] for name in "zrn"] for side in "ih"]
    offsets = np.concatenate([random.standard_normal(3) for _ in "zrn"])
    for name, offset in zip("zrn", np.split(offsets, 3), strict=True):
        params[f"i{name}"]["bias"] = offset
    one = empty_network(input=np.concatenate([np.concatenate(kernels[0], 1), offsets[None]]))
    one |= {"recurrent": np.concatenate(kernels[1], 1), "output": random.standard_normal((3, 2))}
    found, last = gate.score(given, one, state)
    for window in range(20):
        state, _ = cell.apply({"params": params}, state, given[window])
        np.testing.assert_allclose(found[window], state @ one["output"], atol=1e-5)
    np.testing.assert_allclose(last, state, atol=1e-5)
    np.testing.assert_array_equal(gate.score(given, one, None)[0], gate.score(given, one, np.zeros((2, 3)))[0])


def test_all_leads_that_are_some_are_looked_at_together():
    beats, drift, rest = windows(40, rest_db=-10, leads=3)
    rest[..., 1] *= 10 ** (-20 / 20)  # 30 dB below the heartbeats
    for dead in (beats, drift, rest):
        dead[..., 2] = 0
    found = features(beats, drift, rest)
    of_all = RUNS * OTHERS + at(10.0, REST)
    np.testing.assert_allclose(found[:, :, of_all], 2.0, atol=1e-6)
    np.testing.assert_allclose(found[:, :2, at(10.0, REST)], [[1.0, 3.0]] * 40, atol=1e-6)


def test_what_comes_at_once_and_bit_by_bit_is_the_same():
    random = np.random.default_rng(0)
    given = [random.standard_normal((40, 256, 3)) * scale for scale in (1, 0.5, 0.2)]
    given.append(random.random((40, 256, 1)))
    whole, part_of_rest = gate.Gate(GRID)(*given)
    found, one = [], gate.Gate(GRID)
    for cut in (slice(0, 1), slice(1, 2), slice(2, 17), slice(17, 40)):
        found.append(one(*(part[cut] for part in given)))
    np.testing.assert_allclose(np.concatenate([part for part, _ in found]), whole, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([part for _, part in found]), part_of_rest, atol=1e-6)


def test_unit_makes_no_difference_and_silence_is_left_alone():
    random = np.random.default_rng(0)
    given = [random.standard_normal((20, 256, 2)) * scale for scale in (1, 0.5, 0.2)]
    found = removed(*(1000 * part for part in given), 1.0)[0]
    np.testing.assert_allclose(found / 1000, removed(*given, 1.0)[0], atol=1e-6)
    np.testing.assert_array_equal(removed(*np.zeros((3, 20, 256, 2)), 1.0)[0], 0)


def test_the_network_that_comes_along_opens_to_noise_and_shuts_to_none():
    beats, _, rest = windows(100)
    np.testing.assert_array_equal(removed(beats, 0.01 * wander(100, 0.15), rest)[0][50:], 0)
    drift, rest = 3 * wander(100, 0.15), windows(100, rest_db=6)[2]
    found, of_rest = removed(beats, drift, rest)
    assert of_rest[50:].min() > 0.9
    np.testing.assert_allclose(found[50:], drift[50:] + rest[50:], atol=0.6)
