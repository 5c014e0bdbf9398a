"""The gate, on windows whose powers are known."""

import numpy as np
import pytest

from ralenet_jax import gate

HOP_S = 0.5
# Only one feature counts: heartbeats over drift, over the rest, in the short run; half goes at 6 dB.
SHORT = np.array([[6.0, 0, -1, 0, 0], [6.0, 0, -1, 0, 0], [-90.0, 0, 0, 0, 0]])


def windows(count, beats_db=0.0, drift_db=-90.0, rest_db=-90.0, leads=1):
    """Heartbeats, drift and rest of so many windows `[W, 256, C]`, of these powers."""
    wave = np.sqrt(2) * np.sin(2 * np.pi * np.arange(256) / 32)[None, :, None] * np.ones((count, 1, leads))
    return wave * 10 ** (beats_db / 20) + 7, np.full_like(wave, 10 ** (drift_db / 20)), wave * 10 ** (rest_db / 20)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("ratio_db, part", [(30, 0), (6, 0.5), (-20, 1)])
def test_more_goes_of_what_is_strong_against_the_heartbeats(which, ratio_db, part):
    noise_db = {("drift_db", "rest_db")[which]: 3 - ratio_db}
    found = gate.Gate(HOP_S, SHORT)(*windows(30, beats_db=3, **noise_db))
    assert found.shape == (2, 30, 1, 1) and found.dtype == np.float32
    np.testing.assert_allclose(found[which], part, atol=1e-6)
    np.testing.assert_array_equal(found[1 - which], 0)


def test_drift_goes_with_a_noisy_rest():
    together = np.array([[-90.0, 0, 0, 0, 0], [-90.0, 0, 0, 0, 0], [6.0, 0, -1, 0, 0]])
    for rest_db, part in ((-90, 0), (-6, 0.5), (20, 1)):
        found = gate.Gate(HOP_S, together)(*windows(30, rest_db=rest_db))
        np.testing.assert_allclose(found[0], part, atol=1e-6)
        np.testing.assert_array_equal(found[1], 0)


def test_what_is_beyond_all_training_counts_as_its_border():
    drift, rest = features(*windows(50, beats_db=0, drift_db=45, rest_db=-45))
    np.testing.assert_allclose(drift[-1, 0], [1, -20, -20, 0, 20], atol=1e-6)
    np.testing.assert_allclose(rest[-1, 0], [1, 20, 20, 0, -20], atol=1e-6)


def features(*of):
    return gate.Gate(HOP_S).features(gate.powers(*of))


def test_what_it_goes_by():
    drift, rest = features(*windows(50, beats_db=5, drift_db=1, rest_db=-8))
    np.testing.assert_allclose(drift, np.broadcast_to([1, 4, 4, 0, 13], drift.shape), atol=1e-6)
    np.testing.assert_allclose(rest, np.broadcast_to([1, 13, 13, 0, 4], rest.shape), atol=1e-6)


def test_bursts_count_less_in_the_long_run_than_what_stays():
    calm = windows(1, drift_db=-15)
    burst = windows(1, drift_db=10)
    many = [np.concatenate([(burst if n % 10 == 9 else calm)[i] for n in range(200)]) for i in range(3)]
    drift, _ = features(*many)
    # A tenth of the windows is 10 dB strong: on the average 0 dB, of the decibels −14 dB.
    assert drift[-1, 0, 1] == pytest.approx(12.5, abs=0.7)
    assert drift[-1, 0, 3] == pytest.approx(12.6, abs=0.9)


def test_memory_fades_with_the_seconds():
    one = gate.Gate(HOP_S, SHORT)
    one.features(gate.powers(*windows(1000, rest_db=-40)))
    short = one.features(gate.powers(*windows(60, rest_db=20)))[1, :, 0, 2]
    share = 1 - np.exp(-HOP_S * np.arange(1, 61) / gate._SHORT_S)
    expected = -10 * np.log10(share * 100 + (1 - share) * 1e-4)
    np.testing.assert_allclose(short, expected.clip(-20, 20), atol=1e-3)
    assert short[0] > -10 and short[-1] < -19


def test_what_comes_at_once_and_bit_by_bit_is_the_same():
    random = np.random.default_rng(0)
    given = [random.standard_normal((40, 256, 3)) * scale for scale in (1, 0.5, 0.2)]
    whole = gate.Gate(HOP_S)(*given)
    parts, one = [], gate.Gate(HOP_S)
    for cut in (slice(0, 1), slice(1, 2), slice(2, 17), slice(17, 40)):
        parts.append(one(*(part[cut] for part in given)))
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-7)


def test_unit_makes_no_difference_and_silence_is_left_alone():
    random = np.random.default_rng(0)
    given = [random.standard_normal((20, 256, 2)) * scale for scale in (1, 0.5, 0.2)]
    np.testing.assert_allclose(gate.Gate(HOP_S)(*(1000 * part for part in given)), gate.Gate(HOP_S)(*given), atol=1e-6)
    assert np.isfinite(gate.Gate(HOP_S)(*np.zeros((3, 20, 256, 2)))).all()
