"""Whole recordings under the honest protocol: the blind denoiser beside filters that people use.

    python benchmarks/whole_recordings.py PHYSIONET --out results/whole

cleans the test records of mitdb (DS2), or of ludb, with noise of the second half of nstdb, and prints and writes SNR
improvement, R-peak F1, errors of QRS amplitude and ST level, and what a clean recording loses. It goes on where it was
stopped. NeuroKit2 is needed (`pip install "ralenet_jax[demo]"`).
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import scipy.signal
import wfdb

from ralenet_jax import checkpoint, filters, heartbeats, metrics, noise, provenance, readers_annotations, startup
from ralenet_jax.denoise import Denoiser

DS2 = "100 103 105 111 113 117 121 123 200 210 212 213 214 219 221 222 228 231 232 233 234".split()
LUDB = [str(number) for number in range(5, 201, 5)]
KINDS = ("bw", "ma", "em", "emb")
METHODS = ("noisy", "blind", "dwt", "neurokit", "biosppy", "butterworth")
SNRS_DB = (-6, 0, 6, 12, 18, 24)
HALF = 128


def neurokit(method):
    """NeuroKit2's `ecg_clean`, lead by lead."""
    import neurokit2

    def clean(signal, rate):
        return np.stack([neurokit2.ecg_clean(lead, sampling_rate=rate, method=method) for lead in signal.T], 1)

    return clean


def butterworth(signal, rate):
    """0.5 to 40 Hz, fourth order, both ways."""
    return scipy.signal.sosfiltfilt(scipy.signal.butter(4, (0.5, 40), "band", fs=rate, output="sos"), signal, axis=0)


def denoiser_of(model):
    """The denoiser with the weights that come along (None), of a work directory or of a file."""
    if model is None:
        return Denoiser.from_pretrained()
    return Denoiser.from_checkpoint(model, "last") if Path(model).is_dir() else Denoiser.from_file(model)


def filters_of():
    """What needs no training: name → (signal [L, leads] in mV, Hz) → the same shape."""
    return {
        "noisy": lambda signal, rate: signal,
        "dwt": lambda signal, rate: filters.dwt(signal[None])[0],
        "neurokit": neurokit("neurokit"),
        "biosppy": neurokit("biosppy"),
        "butterworth": butterworth,
    }


def read_noise(physionet, second_half=True):
    """The second half of the noise recordings, or the first, `[3, N, 2]` in mV."""
    folder = Path(physionet) / "nstdb/1.0.0"
    signals = [wfdb.rdrecord(str(folder / name)).p_signal for name in noise.RECORDINGS]
    length = min(map(len, signals))
    half = slice(length // 2, length) if second_half else slice(length // 2)
    return np.stack([signal[half] for signal in signals]).astype(np.float32)


def read_recording(physionet, database, record):
    """A recording's leads `[N, C]` in mV, samples of its beats, Hz."""
    if database == "mitdb":
        return heartbeats.read_recording(Path(physionet) / "mitdb/1.0.0", record)
    path = str(Path(physionet) / "ludb/1.0.1/data" / record)
    found, annotations = wfdb.rdrecord(path), readers_annotations.read(f"{path}.ii")
    beats = annotations.sample[np.array(annotations.symbol) == "N"]
    return found.p_signal.astype(np.float32), beats, found.fs


def noise_for(recordings, record, rate, leads):
    """Noise at a recording's rate `[3, M, leads]`: more than two leads have theirs from places 40 s apart."""
    if leads == recordings.shape[2]:
        return recordings
    resampled = scipy.signal.resample_poly(recordings, int(rate), 360, axis=1)
    apart = [-int((40 * lead + 10 * int(record)) * rate) for lead in range(leads)]
    return np.stack([np.roll(resampled[:, :, lead % 2], apart[lead], 1) for lead in range(leads)], 2)


def powers(clean, output):
    """Power of the clean recording `[L, C]` and that of the error, both centred per lead, summed."""
    clean, output = clean - clean.mean(0), output - output.mean(0)
    return np.sum(np.square(clean)), max(np.sum(np.square(clean - output)), 1e-12)


def snr_db(clean, output):
    """Power of the clean recording `[L, C]` over that of the error, dB, both centred per lead."""
    signal, error = powers(clean, output)
    return float(10 * np.log10(signal / error))


def measure(clean, output, beats, rate, with_f1):
    """What a cleaned recording is worth; both centred per lead."""
    clean, output = clean - clean.mean(0), output - output.mean(0)
    signal, error = powers(clean, output)
    heart = {}
    if rate == 360:  # the measures are in samples
        inside = beats[(beats >= HALF) & (beats < len(clean) - HALF)]
        cut = inside[:, None] + np.arange(-HALF, HALF)
        for name, of in (("qrs_amplitude_error", metrics.qrs_amplitude), ("st_level_error", metrics.st_level)):
            heart[name] = float(np.mean(np.abs(np.asarray(of(output[cut]) - of(clean[cut])))))
    row = {"snr_db": float(10 * np.log10(signal / error)), "prd": float(100 * np.sqrt(error / signal)), **heart}
    if with_f1:
        matches = heartbeats.count_matches(beats, heartbeats.detect(output[:, 0], rate), rate)
        row["matches"] = matches.tolist()
    return row


def run(options, path):
    """Measures what is not in the file yet, a JSON line for each recording, condition and method."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["record"], line["condition"], line["method"]) for line in lines}
    ways, recordings = {"blind": denoiser_of(options.model)} | filters_of(), read_noise(options.physionet)
    ways = {name: ways[name] for name in options.methods}
    conditions = [("none", 0.0), *itertools.product(KINDS, options.snr)]
    with path.open("a") as file:
        for record, (kind, snr_db) in itertools.product(options.records, conditions):
            condition = "clean" if kind == "none" else f"{kind}@{snr_db:g}"
            left = [name for name in ways if (record, condition, name) not in done]
            if not left:
                continue
            leads, beats, rate = read_recording(options.physionet, options.database, record)
            noise_of_it = noise_for(recordings, record, rate, leads.shape[1])
            clean, noisy = heartbeats.add_noise(leads, noise_of_it, kind, snr_db)
            length = min(int(options.minutes * 60 * rate), len(clean))
            clean, noisy, beats = clean[:length], noisy[:length], beats[beats < length]
            for name in left:
                output = ways[name](noisy.astype(np.float64), rate)
                row = measure(clean, output, beats, rate, options.f1)
                lines.append({"record": record, "condition": condition, "method": name} | row)
                print(json.dumps(lines[-1]), file=file, flush=True)
            print(f"{record} {condition}", file=sys.stderr, flush=True)
    return lines


def summarise(lines):
    """Means over recordings: {condition: {method: measures}}, F1 from all their beats together."""
    table = {}
    for line in lines:
        table.setdefault(line["condition"], {}).setdefault(line["method"], []).append(line)
    for condition in table.values():
        noisy = {row["record"]: row["snr_db"] for row in condition["noisy"]}
        for method, rows in condition.items():
            names = [name for name in rows[0] if name not in ("record", "condition", "method", "matches")]
            means = {name: statistics.mean(row[name] for row in rows) for name in names}
            means["snr_improvement_db"] = means["snr_db"] - statistics.mean(noisy[row["record"]] for row in rows)
            if "matches" in rows[0]:
                means["f1"] = heartbeats.f1(np.sum([row["matches"] for row in rows], 0))
            means["median_prd"] = statistics.median(row["prd"] for row in rows)
            condition[method] = means | {"recordings": len(rows)}
    return table


def markdown(table):
    """A table for each measure: a row for each method, a column for each condition."""
    titles = {
        "snr_improvement_db": ("SNR improvement, dB", 2),
        "f1": ("R-peak F1 within 150 ms", 4),
        "prd": ("PRD, percent", 2),
        "median_prd": ("PRD, percent, median over recordings", 2),
        "qrs_amplitude_error": ("Error of QRS amplitude, mV", 4),
        "st_level_error": ("Error of ST level, mV", 4),
    }
    parts = []
    for measure_name, (title, digits) in titles.items():
        if measure_name not in table["clean"]["noisy"]:
            continue
        parts += [f"## {title}", "", "| | " + " | ".join(table) + " |", "|---|" + "---:|" * len(table)]
        for method in table["clean"]:
            cells = [f"{rows[method][measure_name]:.{digits}f}" for rows in table.values()]
            parts.append(f"| {method} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("physionet", help="folder with mitdb/1.0.0 and nstdb/1.0.0")
    parser.add_argument("--out", required=True, help="folder for rows.jsonl, table.json and table.md")
    parser.add_argument("--model", help="exported weights or a work directory (default: what comes along)")
    parser.add_argument("--database", choices=("mitdb", "ludb"), default="mitdb")
    parser.add_argument("--records", nargs="+", help="(default: those that test)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--snr", nargs="+", type=float, default=SNRS_DB, help="dB")
    parser.add_argument("--minutes", type=float, default=30.1, help="of each recording, from its start")
    parser.add_argument("--f1", action="store_true", help="detect R peaks too (XQRS, minutes)")
    options = parser.parse_args()
    options.records = options.records or (DS2 if options.database == "mitdb" else LUDB)
    startup.start_jax()
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    table = summarise(run(options, folder / "rows.jsonl"))
    result = {"database": options.database, "minutes": options.minutes, "conditions": table}
    checkpoint.write_json(folder / "table.json", result | {"made_by": provenance.software(1)})
    title = f"# Recordings of {options.database}: up to {options.minutes:g} minutes of each of {len(options.records)}"
    text = f"{title}\n\n{markdown(table)}"
    checkpoint.write_text(folder / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
