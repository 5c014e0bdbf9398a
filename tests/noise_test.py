import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ralenet_jax import noise
from ralenet_jax.errors import UserError

# Short windows of short recordings: every sum of windows can be tried.
_LENGTH, _SAMPLES = 16, 24
_MIX = jax.jit(noise.mix, static_argnums=0)
_STARTS = range(_SAMPLES - _LENGTH + 1)


def keys(count, seed=0):
    return noise.window_keys(jax.random.key(seed), jnp.arange(count, dtype=jnp.int32), None)


def mix(protocol, recordings, kinds, ratio, clean, key_seed=0, span=None, high=None):
    """Float64 arrays: what the model sees and its target, and both after undoing the normalisation."""
    chosen = noise.condition(kinds, ratio, high, span or (0, recordings.shape[1]))
    mixture = _MIX(protocol, recordings, chosen, clean, keys(len(clean), key_seed))
    noisy, target, offset, scale = (np.asarray(value, np.float64) for value in mixture)
    return noisy, target, noisy * scale + offset, target * scale + offset


@pytest.fixture(scope="module")
def recordings():
    """`[3, 24, 2]`: bw, ma, em of unlike size, each lead with an offset of its own."""
    rng = np.random.default_rng(1)
    sizes = np.array([1.0, 0.5, 2.0])[:, None, None]
    return (rng.standard_normal((3, _SAMPLES, 2)) * sizes + rng.standard_normal((3, 1, 2))).astype(np.float32)


@pytest.fixture(scope="module")
def clean():
    """`[300, 16, 2]` mV, with an offset in each lead."""
    rng = np.random.default_rng(2)
    return (rng.standard_normal((300, _LENGTH, 2)) * [0.8, 0.3] + [2.0, -1.0]).astype(np.float32)


def sums_of_windows(recordings, names, per_lead):
    """Every sum of one window each of the named recordings, centred, of unit norm: {starts: float64 `[L·C]`}."""
    chosen = [recordings[noise.RECORDINGS.index(name)].astype(np.float64) for name in names]
    sums = {}
    for starts in itertools.product(_STARTS, repeat=len(names)):
        total = sum(signal[start : start + _LENGTH] for signal, start in zip(chosen, starts, strict=True))
        total = total - total.mean(0 if per_lead else None)
        sums[starts] = (total / np.linalg.norm(total)).ravel()
    return sums


def starts_of(added, recordings, names, per_lead):
    """The starts whose sum of windows is what was added, for each window; fails where none is."""
    sums = sums_of_windows(recordings, names, per_lead)
    flat = added.reshape(len(added), -1)
    match = (flat / np.linalg.norm(flat, axis=1, keepdims=True)) @ np.array(list(sums.values())).T
    assert np.all(match.max(1) > 1 - 1e-4)
    assert np.all(np.sort(match, 1)[:, -2] < 1 - 1e-3)  # and no other is
    starts = list(sums)
    return np.array([starts[best] for best in match.argmax(1)])


@pytest.mark.parametrize("kind", ["bw", "ma", "em", "emb", "ma,emb"])
@pytest.mark.parametrize("ratio", [-6.0, 0.0, 24.0])
@pytest.mark.parametrize("protocol", ["paper", "honest"])
def test_power_ratio_is_exactly_the_snr(protocol, ratio, kind, recordings, clean):
    _, _, noisy, target = mix(protocol, recordings, kind, ratio, clean)
    added = noisy - target
    found = 10 * np.log10(np.mean(target**2, (1, 2)) / np.mean(added**2, (1, 2)))
    np.testing.assert_allclose(found, ratio, atol=1e-3)


def test_paper_clean_window_has_one_mean_and_unit_power(recordings, clean):
    noisy, target, same_noisy, same_target = mix("paper", recordings, "bw", -4.0, clean)
    exact = clean.astype(np.float64)
    expected = (exact - exact.mean((1, 2), keepdims=True)) / exact.std((1, 2), keepdims=True)
    np.testing.assert_allclose(target, expected, atol=1e-5)
    np.testing.assert_array_equal(noisy, same_noisy)  # measured as it is, in z-scored units
    np.testing.assert_array_equal(target, same_target)


def test_paper_noise_is_centred_with_one_mean_over_both_leads(recordings, clean):
    noisy, target, *_ = mix("paper", recordings, "bw", -4.0, clean)
    added = noisy - target
    np.testing.assert_allclose(added.mean((1, 2)), 0, atol=1e-6)
    assert np.all(np.abs(added.mean(1)) > 0.1)  # the leads' own offsets stay


def test_honest_windows_are_centred_per_lead(recordings, clean):
    _, _, noisy, target = mix("honest", recordings, "emb", 0.0, clean)
    np.testing.assert_allclose(target, clean - clean.mean(1, keepdims=True, dtype=np.float64), atol=1e-5)
    np.testing.assert_allclose((noisy - target).mean(1), 0, atol=1e-6)


def test_honest_statistics_are_those_of_the_noisy_window(recordings, clean):
    noisy, target, noisy_mv, target_mv = mix("honest", recordings, "em", -4.0, clean)
    np.testing.assert_allclose(noisy.mean((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(noisy.std((1, 2)), 1, rtol=1e-5)
    mean, deviation = noisy_mv.mean((1, 2), keepdims=True), noisy_mv.std((1, 2), keepdims=True)
    np.testing.assert_allclose(target, (target_mv - mean) / deviation, atol=1e-5)  # one normalisation for both


@pytest.mark.parametrize("kind", ["bw", "ma", "em", "emb"])
@pytest.mark.parametrize("protocol", ["paper", "honest"])
def test_noise_is_a_window_of_each_recording_with_both_leads_from_one_start(protocol, kind, recordings, clean):
    _, _, noisy, target = mix(protocol, recordings, kind, -6.0, clean)
    names = ["bw", "ma", "em"] if kind == "emb" else [kind]
    starts = starts_of(noisy - target, recordings, names, per_lead=protocol == "honest")
    for column in starts.T:
        assert set(column) == set(_STARTS)  # the first and the last one too
    if kind == "emb":  # independent starts: far more pairs than there are starts
        assert all(len({*zip(starts[:, i], starts[:, j], strict=True)}) > 60 for i, j in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.parametrize("protocol", ["paper", "honest"])
def test_no_noise_leaves_the_clean_window(protocol, recordings, clean):
    noisy, target, *_ = mix(protocol, recordings, "none", -6.0, clean)
    np.testing.assert_array_equal(noisy, target)
    np.testing.assert_allclose(noisy.std((1, 2)), 1, rtol=1e-5)


def test_noise_stays_in_its_span(recordings, clean):
    first, end = 3, 3 + _LENGTH + 2
    poisoned = recordings.copy()
    poisoned[:, :first], poisoned[:, end:] = np.nan, np.nan
    _, _, noisy, target = mix("paper", poisoned, "emb", -6.0, clean, span=(first, end))
    assert np.isfinite(noisy).all()
    for starts in starts_of(noisy - target, recordings, ["bw", "ma", "em"], per_lead=False).T:
        assert set(starts) == {3, 4, 5}


def test_key_decides_the_noise(recordings, clean):
    first, again, other = (mix("honest", recordings, "emb", 0.0, clean, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.abs(first - other)) > 0.1


def test_window_keeps_its_noise_wherever_it_stands_unless_the_step_counts():
    def data(identity, step):
        drawn = noise.window_keys(jax.random.key(0), jnp.array(identity, jnp.int32), step)
        return [tuple(key) for key in np.asarray(jax.random.key_data(drawn)).tolist()]

    at_five = data([5, 6, 7], None)
    assert data([7, 9, 5], None) == [at_five[2], data([9], None)[0], at_five[0]]
    assert data([5, 6], 3) == data([5, 6], 3)
    every = [*at_five, *data([5, 6, 7], 0), *data([5, 6, 7], 1), *data([5, 6, 7], 2)]
    assert len(set(every)) == 12


def test_several_kinds_all_occur_and_no_other(clean):
    # bw moves lead 0, ma moves lead 1, em both, equally: the leads tell what was added.
    signal = np.random.default_rng(3).standard_normal(_SAMPLES)
    recordings = np.stack([np.outer(signal, lead) for lead in ((1, 0), (0, 1), (1, -1))]).astype(np.float32)
    _, _, noisy, target = mix("honest", recordings, "bw, em", 0.0, clean)
    power = np.mean((noisy - target) ** 2, 1)
    share = power[:, 1] / power.sum(1)
    is_bw, is_em = share < 1e-6, np.abs(share - 0.5) < 1e-3
    assert np.all(is_bw | is_em)
    assert 100 < is_bw.sum() < 200  # of 300


def test_ratio_is_uniform_over_a_range(recordings, clean):
    _, _, noisy, target = mix("honest", recordings, "bw", -6.0, clean, high=24.0)
    ratio = 10 * np.log10(np.mean(target**2, (1, 2)) / np.mean((noisy - target) ** 2, (1, 2)))
    assert -6.001 <= ratio.min() < -5
    assert 23 < ratio.max() <= 24.001
    # 300 draws: a tenth of them is 30 with a deviation of 5.2.
    counts, _ = np.histogram(ratio, 10, (-6.001, 24.001))
    assert np.all(np.abs(counts - 30) < 4.5 * 5.2)


@pytest.mark.parametrize("protocol", ["paper", "honest"])
def test_window_or_noise_without_power_stays_finite(protocol, recordings, clean):
    flat = np.ones_like(clean[:2])
    for given, signal in ((flat, recordings), (clean[:2], np.ones_like(recordings)), (flat, np.ones_like(recordings))):
        assert all(np.isfinite(part).all() for part in mix(protocol, signal, "bw", -4.0, given))


def test_kinds_are_named_and_unknown_ones_refused():
    assert noise.parse_kinds("bw") == ("bw",)
    assert noise.parse_kinds("bw, ma,emb") == ("bw", "ma", "emb")
    for kinds, wrong in (("bv", "bv"), ("bw,em2", "em2"), ("", "")):
        with pytest.raises(UserError, match=f"noise kind '{wrong}' is not known; choose from bw, ma, em, emb"):
            noise.parse_kinds(kinds)


@pytest.mark.parametrize("low, high", [(3.0, -3.0), (float("nan"), None), (float("inf"), None), (0.0, float("inf"))])
def test_impossible_ratios_are_refused(low, high):
    with pytest.raises(UserError, match="finite numbers, the lower first"):
        noise.condition("bw", low, high, (0, 100))


def test_unknown_protocol_is_refused(recordings, clean):
    with pytest.raises(ValueError, match="protocol 'fair'"):
        mix("fair", recordings, "bw", 0.0, clean)
