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
    noisy, target, offset, scale = (np.asarray(value, np.float64) for value in mixture[:4])
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


@pytest.fixture(scope="module")
def twelve_leads():
    """`[300, 16, 12]` mV, with an offset in each lead."""
    rng = np.random.default_rng(4)
    return (rng.standard_normal((300, _LENGTH, 12)) + rng.standard_normal(12)).astype(np.float32)


@pytest.mark.parametrize("protocol", ["paper", "honest"])
@pytest.mark.parametrize("kind", ["bw", "emb"])
def test_each_of_twelve_leads_has_a_channel_and_starts_of_its_own(protocol, kind, recordings, twelve_leads):
    _, _, noisy, target = mix(protocol, recordings, kind, -6.0, twelve_leads)
    added = noisy - target
    names = ["bw", "ma", "em"] if kind == "emb" else [kind]
    drawn = []
    for lead in range(12):
        # Up to its offset and size, a lead is a sum of windows of one channel.
        of_lead = added[:, :, lead : lead + 1] - added[:, :, lead : lead + 1].mean(1, keepdims=True)
        sums = {
            (channel, *starts): column
            for channel in range(2)
            for starts, column in sums_of_windows(recordings[..., channel : channel + 1], names, per_lead=True).items()
        }
        flat = of_lead[:, :, 0] / np.linalg.norm(of_lead[:, :, 0], axis=1, keepdims=True)
        match = flat @ np.array(list(sums.values())).T
        assert np.all(match.max(1) > 1 - 1e-4)
        keys = list(sums)
        drawn.append([keys[best] for best in match.argmax(1)])
    drawn = np.array(drawn)  # [leads, windows, channel and starts]
    for lead in drawn:
        assert 100 < lead[:, 0].sum() < 200  # of 300: both channels as often
        assert all(set(column) == set(_STARTS) for column in lead[:, 1:].T)
    # No lead tells what another has: by chance the same start in 33 of 300 windows, with a deviation of 5.4.
    for one, other in itertools.combinations(range(12), 2):
        assert np.all(np.sum(drawn[one] == drawn[other], 0)[1:] < 33 + 5 * 5.4)


@pytest.mark.parametrize("protocol", ["paper", "honest"])
def test_noise_of_twelve_leads_has_one_scale_and_the_protocol_s_mean(protocol, recordings, twelve_leads):
    _, _, noisy, target = mix(protocol, recordings, "bw", 3.0, twelve_leads)
    added = noisy - target
    found = 10 * np.log10(np.mean(target**2, (1, 2)) / np.mean(added**2, (1, 2)))
    np.testing.assert_allclose(found, 3.0, atol=1e-3)
    of_leads = 10 * np.log10(np.mean(target**2, 1) / np.mean(added**2, 1))
    assert np.all(np.ptp(of_leads, axis=1) > 0.5)  # the leads' own ratios differ
    np.testing.assert_allclose(added.mean((1, 2)), 0, atol=1e-5)
    per_lead = np.abs(added.mean(1)).max(1)
    assert np.all(per_lead < 1e-5) if protocol == "honest" else np.all(per_lead > 0.05)


def test_noise_of_two_leads_is_the_one_it_always_was():
    # Written down at 3bafe30, before there were other leads: results of that time must stay what they are.
    place = jnp.broadcast_to(jnp.arange(650_000, dtype=jnp.float32)[None, :, None], (3, 650_000, 2))
    first = {"bw": [406327, 645447, 375179, 340738], "ma": [593151, 386918, 571461, 429329]}
    first |= {"em": [632837, 207582, 586916, 601055]}
    for kind, starts in first.items():
        chosen = noise.condition(kind, -6.0, 24.0, (0, 650_000))
        drawn = [noise.draw(place, chosen, key, (256, 2)) for key in keys(4)]
        assert [float(window[0, lead]) for window, _ in drawn for lead in (0, 1)] == np.repeat(starts, 2).tolist()
        ratios = [float(ratio) for _, ratio in drawn]
        np.testing.assert_allclose(ratios, [0.8545, 16.5491, 16.2804, 21.8292], atol=1e-4)


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
