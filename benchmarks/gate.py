"""Trains the denoiser's gate (`ralenet_jax/gate.py`) on DS1 and the first half of the noise.

    python benchmarks/gate.py PHYSIONET --out DIR

runs the model, all open, over ten minutes from anywhere in 22 records of DS1, with noise of every kind at −7.5 to
24 dB and without, and keeps what the gate goes by and what each part would do. Half of the recordings have, in place of
what the model would remove from them, that of another of the same fifth, stronger or fainter: 22 people's heartbeats
and drifts, but more pairs of them. Then it looks for the network with which the SNR is highest, in dB, and clean
recordings lose least: five times without a fifth of the records, which then tell what comes of it, and once with all.
Writes gate.safetensors and, as JSON, what came of it. A second call goes on where the first stopped.
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
import whole_recordings

from ralenet_jax import checkpoint, denoise, gate, heartbeats, provenance, startup, streaming

# Without 202, which is of the same person as 201.
DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
KINDS = ("bw", "ma", "em", "emb", "bw")  # wander is the hardest to tell
SETS = {"cases": (30, KINDS), "muscle": (14, ("ma",))}  # of each record; the second without clean ones
MINUTES, ENDS_S = 10, (10, 120)  # of each case; of stretches, each of which counts as much as another
CLEAN, STRONG = 0.2, 0.8  # of the cases have no noise; of the others have 13.5 dB at most
BEGINNING = 0.2  # of the cases begin where the record does
LENT, LENT_DB = 0.5, 4.0  # of the cases have another's drift and rest, and how much stronger or fainter
HIDDEN, FOLDS = 16, 5
NETWORKS = 3  # trained from other beginnings; the mean of their scores counts
STEPS, BATCH, RATE, DECAY = 600, 48, 1e-2, 4e-4
WEAK_DB, WEAK = 13.5, 0.3  # cases of fainter noise count less
WANDER_DB, WANDER = -3, 3  # of stronger wander more
LARGE = 5.0  # dB that an error as strong as the signal counts besides: a burst let through is much in a long recording
SOFT = 0.05  # of the parts is never quite shut in training: what is shut would learn nothing
TINY = 1e-9


class Observer:
    """Stands where the gate stands: lets everything through and keeps what it sees."""

    def __init__(self, grid):
        self.gate, self.seen = gate.Gate(grid, {}), []

    def __call__(self, beats, drift, rest, at_peaks):
        """As `gate.Gate`."""
        self.seen.append((self.gate.features(beats, drift, rest), drift, rest))
        return drift + rest, np.ones((len(beats), 1, beats.shape[2]), np.float32)


def windows_of(signal, grid, denoiser):
    """All windows `[W, L, C]` that a signal is cut into."""
    blocks = denoise._Recording(signal, grid).blocks(denoiser._runner.size, np.zeros(0, np.int64))
    return np.concatenate([windows for windows, *_ in blocks])


def observe(denoiser, clean, noisy, rate):
    """Features `[W, C, FEATURES]`, and inner products `[W, C, 4, 4]` of noise, removed drift, removed rest, clean."""
    grid = streaming.build_grid(rate, denoiser._window)
    observer = Observer(grid)
    denoiser._build_gate = lambda grid: observer
    denoiser(noisy, rate)
    features, drift, rest = map(np.concatenate, zip(*observer.seen, strict=True))
    signals = [windows_of(noisy - clean, grid, denoiser), drift, rest, windows_of(clean, grid, denoiser)]
    # A sample is made of one window, but where two are faded.
    middle = slice(-(grid.used - grid.fade // 2), -(grid.fade // 2))
    signals = np.stack([signal[:, middle] for signal in signals])
    return features.astype(np.float32), np.einsum("iwlc,jwlc->wcij", signals, signals), grid.hop / streaming.RATE


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


def draw_cases(random, count, kinds):
    """Kinds and ratios in dB; clean ones among all kinds alone."""
    clean = CLEAN * count if kinds == KINDS else 0
    kinds = ["none" if n < clean else kinds[n % len(kinds)] for n in range(count)]
    strong = random.random(count) < STRONG
    around = random.choice([-6, 0, 6, 12], count) + random.uniform(-1.5, 1.5, count)
    return kinds, np.where(strong, around, random.uniform(12, 24, count))


def read_cases(options, record, denoiser, noise, name):
    """What is known of a record under a set of conditions, from the file where it was kept or measured now."""
    path = Path(options.out) / f"{name}_{record}.npz"
    if path.exists():
        with np.load(path) as kept:
            return dict(kept)
    count, drawn = SETS[name]
    random = np.random.default_rng([int(record), list(SETS).index(name)])
    beats, own, rate = read_parts(options, record, denoiser)
    length, rows, lent = int(MINUTES * 60 * rate), [], random.random(count) < LENT
    fold = options.records.index(record) % FOLDS
    kinds, ratios = draw_cases(random, count, drawn)
    for kind, ratio_db, of_another in zip(kinds, ratios, lent, strict=True):
        rolled = np.roll(noise, random.integers(noise.shape[1]), 1)
        removed = own
        if of_another:
            lender_beats, removed, _ = read_parts(options, random.choice(options.records[fold::FOLDS]), denoiser)
            removed = lend(random, beats, lender_beats, removed)
        leads = (beats + removed).astype(np.float32)
        clean, noisy = heartbeats.add_noise(leads, rolled, kind, ratio_db)
        start = random.integers(len(clean) - length) * (random.random() > BEGINNING)
        cut = slice(start, start + length)
        clean, noisy = (x[cut].astype(np.float64) - np.median(x[cut], 0) for x in (clean, noisy))
        features, products, hop_s = observe(denoiser, clean, noisy, rate)
        rows.append((features, products))
    features, products = map(np.stack, zip(*rows, strict=True))
    found = {
        "features": features,
        "products": products,
        "kind": np.array(kinds),
        "ratio_db": ratios,
        "lent": lent,
        "hop_s": hop_s,
    }
    part = path.with_suffix(".part.npz")
    np.savez(part, **found)
    part.rename(path)
    print(f"{record}: {count} {name}", file=sys.stderr, flush=True)
    return found


def stretches(per_window, ends):
    """Sums `[…, W, C]` over leads and the windows of each stretch: `[…, 3]`."""
    return jnp.stack([part.sum((-2, -1)) for part in jnp.split(per_window, ends, -2)], -1)


def errors(network, features, products, ends, soft=0.0):
    """Power of the error over the clean signal's in each stretch, `[…, 3]`."""
    part = gate.parts(features, network, jnp.tanh)
    if soft:
        part = (1 - soft) * part + soft * gate.parts(features, network, jnp.tanh, shut=0)
    signs = jnp.stack([jnp.ones_like(part[..., 0]), -part[..., 0], -part[..., 1]], -1)
    error = jnp.einsum("...i,...j,...ij->...", signs, signs, products[..., :3, :3])
    return stretches(error, ends) / stretches(products[..., 3, 3], ends)


def train(cases, chosen, ends, clean_weight):
    """The networks that make the loss least over the chosen cases, as one."""
    found = [train_one(cases, chosen, ends, clean_weight, seed) for seed in range(NETWORKS)]
    hidden, out, direct = ([network[name] for network in found] for name in ("hidden", "out", "direct"))
    joined = {"hidden": np.concatenate(hidden, 1), "out": np.concatenate(out) / NETWORKS, "direct": np.mean(direct, 0)}
    return {name: value.astype(np.float32) for name, value in joined.items()}


def train_one(cases, chosen, ends, clean_weight, seed):
    """One network of `train`."""
    features = cases["features"]
    mean, deviation = features[chosen].mean((0, 1, 2)), features[chosen].std((0, 1, 2)) + 1e-3
    keys = jax.random.split(jax.random.key(seed), 2)
    count = gate.FEATURES
    network = {
        "hidden": jnp.pad(jax.random.normal(keys[0], (count, HIDDEN)) * count**-0.5, ((0, 1), (0, 0))),
        "out": jax.random.normal(keys[1], (HIDDEN, 2)) * HIDDEN**-0.5,
        "direct": jnp.zeros((count + 1, 2)),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def loss(network, features, products, clean, weight):
        error = errors(network, (features - mean) / deviation, products, ends, SOFT)
        noisy_cost = 10 * jnp.log10(error + 1e-3) + LARGE * jnp.sqrt(error + 1e-6)
        cost = jnp.where(clean[:, None], clean_weight * 100 * jnp.sqrt(error + 1e-6), noisy_cost)
        return jnp.mean(cost * weight[:, None]) + DECAY * sum(jnp.sum(x**2) for x in jax.tree.leaves(network))

    @jax.jit
    def step(network, state, *batch):
        updates, state = optimizer.update(jax.grad(loss)(network, *batch), state)
        return optax.apply_updates(network, updates), state

    clean, ratio_db = cases["kind"] == "none", cases["ratio_db"]
    weight = np.where(~clean & (ratio_db > WEAK_DB), WEAK, 1.0)
    weight[(cases["kind"] == "bw") & (ratio_db < WANDER_DB)] = WANDER
    random, places, state = np.random.default_rng(seed), np.flatnonzero(chosen), optimizer.init(network)
    for _ in range(STEPS):
        batch = random.choice(places, BATCH, replace=False)
        given = (features[batch], cases["products"][batch], clean[batch], weight[batch])
        network, state = step(network, state, *given)
    # The features' scale goes into the first weights.
    found = {name: np.asarray(value) for name, value in network.items()}
    for name in ("hidden", "direct"):
        weights = found[name][:-1] / deviation[:, None]
        found[name] = np.concatenate([weights, found[name][-1:] - mean @ weights])
    return found


def table(cases, error, ends):
    """{cell: mean SNR improvement in dB, or PRD in percent, in each stretch}, of recordings with their own drift."""
    own, products = ~cases["lent"], cases["products"]
    clean = own & (cases["kind"] == "none")
    before = np.asarray(stretches(products[..., 0, 0], ends) / stretches(products[..., 3, 3], ends))
    gain, prd = 10 * np.log10((before + TINY) / (error + TINY)), 100 * np.sqrt(np.maximum(error[clean], 0))
    cells = {"clean: PRD": prd.mean(0), "clean: median PRD": np.median(prd, 0)}
    for kind in sorted(set(KINDS)):
        for ratio_db in (-6, 0, 6, 12):
            there = own & (cases["kind"] == kind) & (np.abs(cases["ratio_db"] - ratio_db) < 2)
            cells[f"{kind}@{ratio_db}"] = gain[there].mean(0)
    return {name: np.round(np.asarray(values, np.float64), 2).tolist() for name, values in cells.items()}


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
    found = [read_cases(options, record, denoiser, noise, name) for name in SETS for record in options.records]
    record = np.repeat(options.records * len(SETS), [len(one["kind"]) for one in found])
    ends = [int(end / found[0]["hop_s"]) for end in ENDS_S]
    names = ("features", "products", "kind", "ratio_db", "lent")
    cases = {name: np.concatenate([one[name] for one in found]) for name in names}

    network = train(cases, np.ones(len(record), bool), ends, options.clean)
    safetensors.numpy.save_file(network, Path(options.out) / "gate.safetensors")
    error = np.zeros((len(record), 1 + len(ENDS_S)))
    for fold in range(FOLDS):
        held = np.isin(record, options.records[fold::FOLDS])
        network = train(cases, ~held, ends, options.clean)
        error[held] = errors(network, cases["features"][held], cases["products"][held], ends)
        print(f"fold {fold + 1} of {FOLDS}", file=sys.stderr, flush=True)
    whole = {"hidden": np.zeros((gate.FEATURES + 1, 1)), "out": np.zeros((1, 2))}
    whole["direct"] = np.pad(np.full((1, 2), 99.0), ((gate.FEATURES, 0), (0, 0)))
    result = {
        "clean": options.clean,
        "cases": len(record),
        "stretches_end_at_s": [*ENDS_S, 60 * MINUTES],
        "records left out of training": table(cases, error, ends),
        "all open": table(cases, np.asarray(errors(whole, cases["features"], cases["products"], ends)), ends),
    }
    checkpoint.write_json(Path(options.out) / "gate.json", result | {"made_by": provenance.software(1)})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
