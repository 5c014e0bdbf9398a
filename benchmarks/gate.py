"""Weights of the denoiser's gate (`ralenet_jax/gate.py`), from training records and the first half of the noise.

    python benchmarks/gate.py PHYSIONET --out results/gate

runs a model over two minutes of 22 records of DS1 with noise of every kind at −6 to 18 dB and without, and looks for
the weights with which the SNR improves most, a cell leads the filters of `whole_recordings.py` by 0.3 dB, and clean
recordings lose least. Prints and writes the weights and what comes of them, as JSON. NeuroKit2 is needed
(`pip install "ralenet_jax[demo]"`).
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import scipy.optimize
import whole_recordings

from ralenet_jax import augment, checkpoint, denoise, gate, heartbeats, provenance, startup, streaming

# Without 202, which is of the same person as 201.
DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
SNRS_DB = (-6, 0, 6, 12, 18)
START = [[1.0, -0.4, 0.05, 0, 0], [8.0, -0.3, -0.3, 0, 0], [5.0, -0.3, -0.3, 0, 0]]  # weights, by eye
FROM = 100_000  # samples: recordings begin calm
LEAD_DB = 0.3  # over the best filter


class Observer:
    """Stands where the gate stands: lets everything through and keeps what it sees."""

    def __init__(self):
        self.seen = []

    def __call__(self, beats, drift, rest):
        """As `gate.Gate`."""
        self.seen.append((gate.powers(beats, drift, rest), drift, rest))
        return np.ones((2, len(beats), 1, beats.shape[2]), np.float32)


def windows_of(signal, rate, denoiser):
    """All windows `[W, L, C]` that a signal is cut into."""
    grid = streaming.build_grid(rate, denoiser._window)
    blocks = denoise._Recording(signal, grid).blocks(denoiser._runner.size, np.zeros(0, np.int64))
    return np.concatenate([windows for windows, *_ in blocks]), grid


def observe(denoiser, clean, noisy, rate):
    """Powers `[3, W, C]`, and inner products `[5, 5, W, C]` of true drift, rest and removed drift, rest, clean."""
    observer = Observer()
    denoiser._build_gate = lambda grid: observer
    denoiser(noisy, rate)
    powers, drift, rest = zip(*observer.seen, strict=True)
    powers, drift, rest = np.concatenate(powers, 1), np.concatenate(drift), np.concatenate(rest)
    added, grid = windows_of(noisy - clean, rate, denoiser)
    true_drift = augment.wander(added)
    signals = [true_drift, added - true_drift, drift, rest, windows_of(clean, rate, denoiser)[0]]
    # A sample is made of one window, but where two are faded.
    middle = slice(-(grid.used - grid.fade // 2), -(grid.fade // 2))
    signals = np.stack([signal[:, middle] for signal in signals])
    return powers, np.einsum("iwlc,jwlc->ijwc", signals, signals), grid.hop / streaming.RATE


def errors(products, parts):
    """Energy of the error `[W, C]` when these parts of drift and rest are removed."""
    signs = np.stack([np.ones_like(parts[0]), np.ones_like(parts[0]), -parts[0], -parts[1]])
    return np.einsum("iwc,jwc,ijwc->wc", signs, signs, products[:4, :4])


class Cases:
    """What is known of every record under every condition."""

    def __init__(self, options, denoiser):
        self.features, self.products, self.filters = {}, {}, {}
        filters = {n: f for n, f in whole_recordings.filters_of().items() if n != "noisy"}
        noise = whole_recordings.read_noise(options.physionet, second_half=False)
        conditions = [("none", 0.0), *itertools.product(whole_recordings.KINDS, SNRS_DB)]
        for record, (kind, snr_db) in itertools.product(options.records, conditions):
            leads, _, rate = heartbeats.read_recording(Path(options.physionet) / "mitdb/1.0.0", record)
            clean, noisy = heartbeats.add_noise(leads, noise, kind, snr_db)
            cut = slice(FROM, FROM + int(options.minutes * 60 * rate))
            clean, noisy = (x[cut].astype(np.float64) - np.median(x[cut], 0) for x in (clean, noisy))
            powers, products, hop_s = observe(denoiser, clean, noisy, rate)
            case = (kind, snr_db, record)
            self.features[case], self.products[case] = gate.Gate(hop_s).features(powers), products
            noisy_db = whole_recordings.snr_db(clean, noisy)
            self.filters[case] = {
                n: whole_recordings.snr_db(clean, f(noisy, rate)) - noisy_db for n, f in filters.items()
            }
            print(*case, file=sys.stderr, flush=True)
        self.records, self.conditions = options.records, conditions

    def best_filter(self, kind, snr_db):
        """SNR improvement of the filter that does most for a cell, dB."""
        of_records = [self.filters[kind, snr_db, record] for record in self.records]
        return max(np.mean([filters[name] for filters in of_records]) for name in of_records[0])

    def table(self, weights):
        """{(kind, snr_db): (mean SNR improvement in dB, mean PRD in percent, median PRD)}."""
        rows = {}
        for kind, snr_db in self.conditions:
            gains, prds = [], []
            for record in self.records:
                case = (kind, snr_db, record)
                products = self.products[case]
                left = errors(products, gate.parts(self.features[case], weights)).sum()
                before = errors(products, np.zeros((2, *products.shape[2:]))).sum()
                gains.append(10 * np.log10(max(before, 1e-12) / max(left, 1e-12)) if kind != "none" else 0.0)
                prds.append(100 * np.sqrt(max(left, 0) / products[4, 4].sum()))
            rows[kind, snr_db] = float(np.mean(gains)), float(np.mean(prds)), float(np.median(prds))
        return rows


def constrained(flat):
    """Weights `[3, 5]` of any numbers `[15]`: more noise never shuts the gate, and steady noise goes as bursts do."""
    weights = flat.reshape(3, -1).copy()
    weights[1:, 1:3] = -np.abs(weights[1:, 1:3])
    weights[1:, 3] = 0
    return weights


def fit(cases, clean_weight, evaluations):
    """The weights `[3, 5]` that make the loss least."""
    best = {condition: cases.best_filter(*condition) for condition in cases.conditions if condition[0] != "none"}

    def loss(flat):
        total = 1e-3 * np.sum(np.square(flat))
        for (kind, snr_db), (gain, prd, _) in cases.table(constrained(flat)).items():
            if kind == "none":
                total += clean_weight * prd
            else:
                # At 12 dB and more no filter helps: to do nothing is better than all but the mildest of them.
                behind = max(LEAD_DB + max(best[kind, snr_db], 0.5 if snr_db <= 6 else -0.6) - gain, 0.0)
                total += (1.0 if snr_db <= 12 else 0.3) * (3 * behind - 0.1 * gain)
        return total

    start = np.array(START).ravel()
    steps = np.diag(np.tile([0.5, 0.08, 0.08, 0.08, 0.08], 3))
    options = {"maxfev": evaluations, "initial_simplex": start + np.concatenate([0 * start[None], steps])}
    found = scipy.optimize.minimize(loss, start, method="Nelder-Mead", options=options)
    return constrained(found.x), best


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("physionet", help="folder with mitdb/1.0.0 and nstdb/1.0.0")
    parser.add_argument("--out", required=True, help="folder for gate.json")
    parser.add_argument("--model", help="exported weights (default: the ones that come along)")
    parser.add_argument("--records", nargs="+", default=DS1)
    parser.add_argument("--minutes", type=float, default=2.0, help="of each recording")
    parser.add_argument("--clean", type=float, default=0.1, help="dB that a percent of PRD counts")
    parser.add_argument("--evaluations", type=int, default=1600)
    options = parser.parse_args()
    startup.start_jax()
    cases = Cases(options, whole_recordings.denoiser_of(options.model))
    weights, best = fit(cases, options.clean, options.evaluations)
    cells = {
        f"{kind}@{snr_db:g}": {"snr_improvement_db": gain, "prd": prd, "median_prd": median}
        | ({} if kind == "none" else {"best_filter_db": best[kind, snr_db]})
        for (kind, snr_db), (gain, prd, median) in cases.table(weights).items()
    }
    result = {"weights": np.round(weights, 3).tolist(), "clean": options.clean, "cells": cells}
    Path(options.out).mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(Path(options.out) / "gate.json", result | {"made_by": provenance.software(1)})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
