"""Trains the denoiser's gate (`ralenet_jax/gate.py`) on DS1 and the first half of the noise.

    python benchmarks/gate.py PHYSIONET --out DIR

runs the model, all open, over ten minutes from six places in 22 records of DS1, without noise and with noise of every
kind at −7.5 to 24 dB, and keeps what the gate goes by and what each part would do. Half of the recordings have, in
place of what the model would remove from them, that of another of the same fifth, stronger or fainter: 22 people's
heartbeats and drifts, but more pairs of them. Besides, each noisy recording is put together with the clean one of its
place, so that the noise comes and goes. Then it looks for the network with which the SNR is highest, in dB, and
clean stretches lose least: five times without a fifth of the records, which then tell what comes of it, and once with
all. Writes gate.safetensors and, as JSON, what came of it. A second call goes on where the first stopped.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import scipy.linalg
import whole_recordings

from ralenet_jax import checkpoint, denoise, gate, heartbeats, provenance, startup, streaming

# Without 202, which is of the same person as 201.
DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
PLACES = 6  # of each record, the first two at its beginning; every other one has another's drift and rest
KINDS = ("none", "bw", "bw", "ma", "ma", "em", "emb")  # at each place
MINUTES, ENDS_S = 10, (10, 120)  # of each case; of stretches, each of which counts as much as another
STRONG = 0.8  # of the noisy cases have 13.5 dB at most
LENT_DB = 4.0  # how much stronger or fainter another's drift and rest are
SPELL_S, ASIDE_S = (60, 360), 30  # how long the noise stays, and how long before and after
INVERSE = 0.25  # of the spells are calm ones between noise
HIDDEN, MEMORY, FOLDS = 16, 16, 5
NETWORKS = 3  # trained from other beginnings; the mean of their scores counts
STEPS, BATCH, OF_SPELLS, RATE, DECAY, CUT_NORM = 400, 40, 0.15, 1e-2, 4e-4, 20.0
WEAK_DB, WEAK = 13.5, 0.3  # fainter noise counts less
WANDER_DB, WANDER = -3, 3  # stronger wander that stays more
MUSCLE_DB, MUSCLE = 9, 2.5  # stronger muscle noise that stays, too
LARGE = 5.0  # dB that an error as strong as the signal counts besides: a burst let through is much in a long recording
SOFT = 0.05  # of the parts is never quite shut in training: what is shut would learn nothing
TINY = 1e-9


class Observer:
    """Stands where the gate stands: lets everything through and keeps what it sees."""

    def __init__(self, grid):
        self.gate, self.seen = gate.Gate(grid, {}), []

    def __call__(self, beats, drift, rest, at_peaks):
        """As `gate.Gate`."""
        self.seen.append((*self.gate.measure(beats, drift, rest), drift, rest))
        return drift + rest, np.ones((len(beats), 1, beats.shape[2]), np.float32)


def windows_of(signal, grid, denoiser):
    """All windows `[W, L, C]` that a signal is cut into."""
    blocks = denoise._Recording(signal, grid).blocks(denoiser._runner.size, np.zeros(0, np.int64))
    return np.concatenate([windows for windows, *_ in blocks])


def observe(denoiser, clean, noisy, rate):
    """What `Gate.features` takes, and inner products `[W, C, 4, 4]` of noise, removed drift, removed rest, clean."""
    grid = streaming.build_grid(rate, denoiser._window)
    observer = Observer(grid)
    denoiser._build_gate = lambda grid: observer
    denoiser(noisy, rate)
    powers, slow, drift, rest = zip(*observer.seen, strict=True)
    removed = [np.concatenate(part) for part in (drift, rest)]
    signals = [windows_of(noisy - clean, grid, denoiser), *removed, windows_of(clean, grid, denoiser)]
    # A sample is made of one window, but where two are faded.
    middle = slice(-(grid.used - grid.fade // 2), -(grid.fade // 2))
    signals = np.stack([signal[:, middle] for signal in signals])
    products = np.moveaxis(signals, (1, 3, 0, 2), (0, 1, 2, 3)) @ np.moveaxis(signals, (1, 3, 0, 2), (0, 1, 3, 2))
    return np.concatenate(powers, 1), np.concatenate(slow), products.astype(np.float32)


def read_parts(options, record, denoiser):
    """Of a record `[N, C]` in mV what the model leaves, all open, and what it removes; and its rate in Hz."""
    leads, _, rate = heartbeats.read_recording(Path(options.physionet) / "mitdb/1.0.0", record)
    leads, path = leads - np.median(leads, 0), Path(options.out) / f"removed_{record}.npy"
    if not path.exists():
        denoiser._build_gate = lambda grid: None
        part = path.with_suffix(".part.npy")
        np.save(part, (leads - denoiser(leads, rate)).astype(np.float32))
        part.rename(path)
    removed = np.load(path)
    return leads - removed, removed, rate


def lend(random, beats, lender_beats, removed):
    """What was removed from a lender, `[N, C]`, for other heartbeats `[M, C]`, as strong against them."""
    gain = beats.std(0) / lender_beats.std(0) * 10 ** (random.uniform(-LENT_DB, LENT_DB) / 20)
    return gain * np.resize(np.roll(removed, random.integers(len(removed)), 0), beats.shape)


def read_steady(options, record, denoiser, noise):
    """What was observed in a record's cases, from the file where it was kept or now: `[cases, …]` each."""
    path = Path(options.out) / f"cases_{record}.npz"
    if path.exists():
        with np.load(path) as kept:
            return dict(kept)
    random = np.random.default_rng([int(record), 11])
    beats, own, rate = read_parts(options, record, denoiser)
    length, rows = int(MINUTES * 60 * rate), []
    fold = options.records.index(record) % FOLDS
    for place in range(PLACES):
        lent, removed = bool(place % 2), own
        if lent:
            lender_beats, removed, _ = read_parts(options, random.choice(options.records[fold::FOLDS]), denoiser)
            removed = lend(random, beats, lender_beats, removed)
        leads = (beats + removed).astype(np.float32)
        start = 0 if place < 2 else random.integers(len(leads) - length)
        for kind in KINDS:
            strong = random.random() < STRONG
            ratio_db = random.choice([-6, 0, 6, 12]) + random.uniform(-1.5, 1.5) if strong else random.uniform(12, 24)
            rolled = np.roll(noise, random.integers(noise.shape[1]), 1)
            clean, noisy = heartbeats.add_noise(leads, rolled, kind, ratio_db)
            cut = slice(start, start + length)
            clean, noisy = (x[cut].astype(np.float64) - np.median(x[cut], 0) for x in (clean, noisy))
            rows.append((*observe(denoiser, clean, noisy, rate), kind, ratio_db, lent, place))
    names = ("powers", "slow", "products", "kind", "ratio_db", "lent", "place")
    found = {name: np.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    part = path.with_suffix(".part.npz")
    np.savez(part, **found)
    part.rename(path)
    print(f"{record}: {len(rows)} cases", file=sys.stderr, flush=True)
    return found


def add_spells(record, steady):
    """The cases of a record, steady ones first, then one more of each noisy one, whose noise comes and goes.

    Returns:
        features `[N, W, C, FEATURES]`, products, kind, ratio_db and lent as observed, stretch `[N, W, 3]` (which
        windows each has), clean `[N, 3]` (which of them are) and spell `[N]`: 0 for none, 1 for noise, 2 for calm.
    """
    grid = streaming.build_grid(360, 256)
    windows, hop_s = steady["slow"].shape[1], grid.hop / streaming.RATE
    random, rows = np.random.default_rng(int(record) + 5), []

    def add(of, powers, slow, products, ends, clean, spell):
        stretch = np.digitize(np.arange(windows), ends)[:, None] == np.arange(3)
        kept = [steady[name][of] for name in ("kind", "ratio_db", "lent")]
        features = gate.Gate(grid, {}).features(powers, slow).astype(np.float32)
        rows.append((features, products, *kept, stretch, np.broadcast_to(clean, 3), spell))

    signals = [steady[name] for name in ("powers", "slow", "products")]
    for n, kind in enumerate(steady["kind"]):
        add(n, *(x[n] for x in signals), [int(end / hop_s) for end in ENDS_S], kind == "none", 0)
    for n in np.flatnonzero(steady["kind"] != "none"):
        calm = np.flatnonzero((steady["place"] == steady["place"][n]) & (steady["kind"] == "none"))[0]
        aside, length = int(ASIDE_S / hop_s), int(random.uniform(*SPELL_S) / hop_s)
        start, inverse = random.integers(aside, windows - length - aside), random.random() < INVERSE
        inside = (np.arange(windows) >= start) & (np.arange(windows) < start + length)
        noisy = (inside ^ inverse)[:, None]
        powers, slow, products = (
            np.where(np.expand_dims(noisy, axes), x[n], x[calm])
            for x, axes in zip(signals, ((), 2, (2, 3)), strict=True)
        )
        clean = np.array([True, False, True]) ^ inverse
        add(n, powers, slow, products, [start, start + length], clean, 1 + inverse)
    names = ("features", "products", "kind", "ratio_db", "lent", "stretch", "clean", "spell")
    return {name: np.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def scores(network, features):
    """Those of all windows of cases `[N, W, C, FEATURES]`."""
    given = jnp.moveaxis(gate.affine(features, network["input"]), 1, 0)

    def step(state, given):
        state = gate.remember(state, given, network["recurrent"], jnp.tanh)
        return state, state

    states = jax.lax.scan(step, jnp.zeros((*given.shape[1:3], len(network["recurrent"]))), given)[1]
    return gate.momentary(features, network, jnp.tanh) + jnp.moveaxis(states, 0, 1) @ network["output"]


def errors(network, features, products, stretch, soft=0.0):
    """Power of the error over the clean signal's in each stretch, `[N, 3]`."""
    given = scores(network, features)
    part = gate.part(given, jnp.tanh)
    if soft:
        part = (1 - soft) * part + soft * gate.part(given, jnp.tanh, shut=0)
    signs = jnp.stack([jnp.ones_like(part[..., 0]), -part[..., 0], -part[..., 1]], -1)
    error = jnp.einsum("nwci,nwcj,nwcij->nw", signs, signs, products[..., :3, :3])
    return over_stretches(error, products, stretch)


def over_stretches(power, products, stretch):
    """Power `[N, W]` over the clean signal's in each stretch."""
    return (power[..., None] * stretch).sum(1) / (products[..., 3, 3].sum(2)[..., None] * stretch).sum(1)


def train(cases, chosen, clean_weight):
    """The networks that make the loss least over the chosen cases, as one."""
    features, deviation = cases["features"], cases["features"][chosen].std((0, 1, 2)) + 1e-3
    mean = features[chosen].mean((0, 1, 2))
    optimizer = optax.chain(optax.clip_by_global_norm(CUT_NORM), optax.adam(optax.cosine_decay_schedule(RATE, STEPS)))

    def loss(network, features, products, stretch, clean, weight):
        error = errors(network, features, products, stretch, SOFT)
        noisy_cost = 10 * jnp.log10(error + 1e-3) + LARGE * jnp.sqrt(error + 1e-6)
        cost = jnp.where(clean, clean_weight * 100 * jnp.sqrt(error + 1e-6), noisy_cost)
        return jnp.mean(cost * weight) + DECAY * sum(jnp.sum(x**2) for x in jax.tree.leaves(network))

    def step(network, state, *batch):
        updates, state = optimizer.update(jax.grad(loss)(network, *batch), state)
        return optax.apply_updates(network, updates), state

    networks = jax.vmap(initial)(jax.random.split(jax.random.key(0), NETWORKS))
    state, steps = jax.vmap(optimizer.init)(networks), jax.jit(jax.vmap(step))
    clean, ratio_db, spell = cases["clean"], cases["ratio_db"][:, None], cases["spell"][:, None] > 0
    weight = np.where(~clean & (ratio_db > WEAK_DB), WEAK, 1.0)
    for kind, below_db, more in (("bw", WANDER_DB, WANDER), ("ma", MUSCLE_DB, MUSCLE)):
        weight *= np.where((cases["kind"][:, None] == kind) & (ratio_db < below_db) & ~spell, more, 1.0)
    randoms = [np.random.default_rng(seed) for seed in range(NETWORKS)]
    shares = [(chosen & ~spell[:, 0], round(BATCH * (1 - OF_SPELLS))), (chosen & spell[:, 0], round(BATCH * OF_SPELLS))]
    for _ in range(STEPS):
        drawn = [[random.choice(np.flatnonzero(of), n, replace=False) for of, n in shares] for random in randoms]
        batch = np.stack([np.concatenate(one) for one in drawn])
        others = [x[batch] for x in (cases["products"], cases["stretch"], clean, weight)]
        networks, state = steps(networks, state, (features[batch] - mean) / deviation, *others)
    return joined({name: np.asarray(value) for name, value in networks.items()}, mean, deviation)


def initial(key):
    """A network that knows nothing yet, and keeps what it sees for some windows."""
    count, keys = gate.FEATURES, jax.random.split(key, 5)
    normal = lambda key, *shape: jax.random.normal(key, shape) * shape[0] ** -0.5  # noqa: E731
    with_offsets = lambda weights: jnp.pad(weights, ((0, 1), (0, 0)))  # noqa: E731
    return {
        "hidden": with_offsets(normal(keys[0], count, HIDDEN)),
        "out": normal(keys[1], HIDDEN, 2),
        "direct": jnp.zeros((count + 1, 2)),
        "input": with_offsets(normal(keys[2], count, 3 * MEMORY)).at[-1, :MEMORY].set(3.0),
        "recurrent": normal(keys[3], MEMORY, 3 * MEMORY) / 2,
        "output": normal(keys[4], MEMORY, 2) * 0.3,
    }


def joined(networks, mean, deviation):
    """Networks `[NETWORKS, …]` for features of this mean and deviation → one with the mean of their scores."""
    for name in ("hidden", "direct", "input"):
        weights = networks[name][:, :-1] / deviation[:, None]
        networks[name] = np.concatenate([weights, networks[name][:, -1:] - mean @ weights[:, None]], 1)

    def beside(name, parts):
        """Their columns, part by part."""
        return np.concatenate([np.concatenate(part, -1) for part in np.split(networks[name], parts, -1)], -1)

    recurrent = [scipy.linalg.block_diag(*part) for part in np.split(networks["recurrent"], 3, -1)]
    found = {
        "hidden": beside("hidden", 1),
        "out": np.concatenate(networks["out"]) / NETWORKS,
        "direct": networks["direct"].mean(0),
        "input": beside("input", 3),
        "recurrent": np.concatenate(recurrent, -1),
        "output": np.concatenate(networks["output"]) / NETWORKS,
    }
    return {name: value.astype(np.float32) for name, value in found.items()}


def table(cases, error):
    """{cell: mean SNR improvement in dB, or PRD in percent, in each stretch}, of recordings with their own drift."""
    own, products, ratio_db = ~cases["lent"], cases["products"], cases["ratio_db"]
    before = over_stretches(products[..., 0, 0].sum(2), products, cases["stretch"])
    gain, prd = 10 * np.log10((before + TINY) / (error + TINY)), 100 * np.sqrt(np.maximum(error, 0))
    clean = own & (cases["kind"] == "none")
    cells = {"clean: PRD": prd[clean].mean(0), "clean: median PRD": np.median(prd[clean], 0)}
    for kind in sorted(set(KINDS) - {"none"}):
        for around in (-6, 0, 6, 12):
            there = own & (cases["kind"] == kind) & (np.abs(ratio_db - around) < 2) & (cases["spell"] == 0)
            cells[f"{kind}@{around}"] = gain[there].mean(0)
    for name, spell in (("noise that comes and goes", 1), ("calm that comes and goes", 2)):
        there = own & (cases["spell"] == spell) & (ratio_db < WEAK_DB)
        cells[f"{name}: dB, or PRD"] = np.where(cases["clean"][there], prd[there], gain[there]).mean(0)
        cells[f"{name}: median"] = np.median(np.where(cases["clean"][there], prd[there], gain[there]), 0)
    return {name: np.round(np.asarray(values, np.float64), 2).tolist() for name, values in cells.items()}


def errors_of(network, cases, chosen):
    """`errors` of the chosen cases, a few at a time."""
    apply = jax.jit(errors)
    places = np.array_split(np.flatnonzero(chosen), max(chosen.sum() // BATCH, 1))
    given = [[cases[name][some] for name in ("features", "products", "stretch")] for some in places]
    return np.concatenate([np.asarray(apply(network, *some)) for some in given])


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("physionet", help="folder with mitdb/1.0.0 and nstdb/1.0.0")
    parser.add_argument("--out", required=True, help="folder for gate.safetensors, gate.json and the cases")
    parser.add_argument("--model", help="exported weights (default: the ones that come along)")
    parser.add_argument("--records", nargs="+", default=DS1)
    parser.add_argument("--clean", type=float, default=1.0, help="dB that a percent of PRD counts")
    options = parser.parse_args()
    startup.start_jax()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    denoiser = whole_recordings.denoiser_of(options.model)
    noise = whole_recordings.read_noise(options.physionet, second_half=False)
    found = [add_spells(record, read_steady(options, record, denoiser, noise)) for record in options.records]
    record = np.repeat(options.records, [len(one["kind"]) for one in found])
    cases = {name: np.concatenate([one.pop(name) for one in found]) for name in list(found[0])}

    everything = np.ones(len(record), bool)
    network = train(cases, everything, options.clean)
    safetensors.numpy.save_file(network, Path(options.out) / "gate.safetensors")
    error = np.zeros((len(record), 3))
    for fold in range(FOLDS):
        held = np.isin(record, options.records[fold::FOLDS])
        error[held] = errors_of(train(cases, ~held, options.clean), cases, held)
        print(f"fold {fold + 1} of {FOLDS}", file=sys.stderr, flush=True)
    whole = {name: np.zeros_like(values) for name, values in network.items()}
    whole["direct"][-1] = 99.0
    result = {
        "clean": options.clean,
        "cases": len(record),
        "stretches_end_at_s": [*ENDS_S, 60 * MINUTES],
        "records left out of training": table(cases, error),
        "all open": table(cases, errors_of(whole, cases, everything)),
    }
    checkpoint.write_json(Path(options.out) / "gate.json", result | {"made_by": provenance.software(1)})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
