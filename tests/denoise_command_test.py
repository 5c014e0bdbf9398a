"""`ralenet denoise` on real files; but for one test, a stand-in halves the signal in place of the model."""

import json

import numpy as np
import pytest
import wfdb

from ralenet_jax import cli, denoise_command

RATE = 360
SAMPLES = 4 * RATE


class Halves:
    """A denoiser whose work is easily told."""

    def __init__(self):
        self.given = []

    def __call__(self, signal, sampling_rate, report):
        self.given.append((signal.shape, sampling_rate))
        for _ in range(4):
            report(len(signal) // 4)
        return signal / 2

    def find_r_peaks(self, signal, sampling_rate):
        return np.arange(100, len(signal), 300)


@pytest.fixture
def halves(monkeypatch):
    denoiser = Halves()
    monkeypatch.setattr(denoise_command, "_denoiser", lambda options: denoiser)
    return denoiser


@pytest.fixture
def folder(tmp_path):
    """A WFDB record with an ECG lead and a pressure, a CSV file, and a file that is neither."""
    time = np.arange(SAMPLES) / RATE
    signal = np.stack([np.sin(9 * time), 80 + np.cos(time)], 1)
    wfdb.wrsamp(
        "one",
        fs=RATE,
        units=["mV", "mmHg"],
        sig_name=["II", "ABP"],
        p_signal=signal,
        fmt=["16"] * 2,
        write_dir=tmp_path,
    )
    rows = "\n".join(f"{t:.6f},{value:.4f}" for t, value in zip(time, signal[:, 0], strict=True))
    (tmp_path / "two.csv").write_text(f"time,II\n{rows}\n")
    return tmp_path


def run(*arguments):
    return cli.main(["denoise", *map(str, arguments)])


def test_only_ecg_leads_are_cleaned_and_the_output_stands_beside(folder, halves):
    assert run(folder / "one") == 0
    before, after = (wfdb.rdrecord(str(folder / name)) for name in ("one", "one_denoised"))
    assert halves.given == [((SAMPLES, 1), RATE)]
    assert after.sig_name == ["II", "ABP"] and after.units == ["mV", "mmHg"]
    np.testing.assert_allclose(after.p_signal[:, 0], before.p_signal[:, 0] / 2, atol=1e-3)
    np.testing.assert_array_equal(after.p_signal[:, 1], before.p_signal[:, 1])


def test_second_name_that_is_not_there_is_the_output(folder, halves):
    assert run(folder / "two.csv", folder / "out.csv") == 0
    assert len((folder / "out.csv").read_text().splitlines()) == SAMPLES + 1
    np.testing.assert_allclose(
        np.loadtxt(folder / "out.csv", delimiter=",", skiprows=1)[:, 1],
        np.loadtxt(folder / "two.csv", delimiter=",", skiprows=1)[:, 1] / 2,
        atol=1e-4,
    )


def test_leads_are_chosen(folder, halves):
    assert run(folder / "one", "--leads", "abp", "--out", folder / "out.hea") == 0
    before, after = (wfdb.rdrecord(str(folder / name)).p_signal for name in ("one", "out"))
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    np.testing.assert_allclose(after[:, 1], before[:, 1] / 2, rtol=1e-2)


def test_a_long_recording_tells_how_far_it_is(folder, halves, monkeypatch, capsys):
    np.save(folder / "long.npy", np.sin(np.arange(40 * 60 * RATE) / 9))
    monkeypatch.setattr(denoise_command, "_SECONDS_BETWEEN_LINES", 0)
    assert run(folder / "long.npy", "--rate", RATE) == 0
    captured = capsys.readouterr()
    lines = [f"{folder / 'long.npy'}: {minutes} of 40 minutes" for minutes in (10, 20, 30, 40)]
    assert captured.err.splitlines() == lines
    assert captured.out.splitlines() == [f"{folder / 'long.npy'}: {folder / 'long_denoised.npy'}"]


def test_a_terminal_gets_a_bar_and_no_lines(folder, halves, monkeypatch, capsys):
    np.save(folder / "long.npy", np.sin(np.arange(40 * 60 * RATE) / 9))
    monkeypatch.setattr(denoise_command, "_SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(denoise_command, "_SECONDS_UNTIL_BAR", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run(folder / "long.npy", "--rate", RATE) == 0
    error = capsys.readouterr().err
    assert "long.npy:" in error and "/40 min [" in error and "\n" not in error


def test_one_bad_file_does_not_stop_the_rest(folder, halves, capsys):
    (folder / "bad.npy").write_bytes(b"no array")
    assert run(folder, "--out", folder / "clean", "--report", folder / "pages") == 1
    captured = capsys.readouterr()
    assert {path.name for path in (folder / "clean").iterdir()} == {"one.hea", "one.dat", "two.csv"}
    assert {path.name for path in (folder / "pages").iterdir()} == {"one.html", "two.html"}
    assert "bad.npy" in captured.err and "1 of 3 recordings failed" in captured.err
    assert "Traceback" not in captured.err


def test_resumed_it_leaves_alone_what_is_whole(folder, halves, capsys):
    arguments = (folder, "--out", folder / "clean", "--report", folder / "pages", "--resume")
    assert run(*arguments) == 0
    first = {path: path.read_bytes() for path in (folder / "clean").iterdir()}
    assert len(first) == 3 and len(halves.given) == 2
    for name in ("one.dat", "one.hea"):  # as if it had stopped between the two
        (folder / "clean" / name).unlink()
    (folder / "clean" / "two.csv").write_text("kept")
    capsys.readouterr()
    assert run(*arguments) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"{folder / 'two.csv'}: done already"
    assert len(halves.given) == 3 and (folder / "clean" / "two.csv").read_text() == "kept"
    assert (folder / "clean" / "one.dat").read_bytes() == first[folder / "clean" / "one.dat"]
    (folder / "pages" / "two.html").unlink()  # the page is missing: all of it once more
    assert run(*arguments) == 0
    assert len(halves.given) == 4
    assert (folder / "clean" / "two.csv").read_bytes() == first[folder / "clean" / "two.csv"]
    assert run(*arguments[:-1]) == 0 and len(halves.given) == 6


def test_plot_and_report_of_one_recording(folder, halves):
    assert run(folder / "one", "--plot", folder / "p.png", "--report", folder / "r.html") == 0
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "one" in (folder / "r.html").read_text(encoding="utf-8")


def test_a_lead_without_samples_stays_as_it_is(folder, halves):
    signal = np.stack([np.sin(np.arange(SAMPLES) / 9), np.full(SAMPLES, np.nan)], 1)
    np.save(folder / "gap.npy", signal)
    assert run(folder / "gap.npy", "--rate", RATE) == 0
    after = np.load(folder / "gap_denoised.npy")
    assert np.isnan(after[:, 1]).all()
    np.testing.assert_allclose(after[:, 0], signal[:, 0] / 2)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere.csv"], "nowhere.csv"),
        (["two.csv", "--leads", "V9"], "no channel 'V9'"),
        (["one", "--rate", "-3"], "sampling rate -3"),
        (["one", "two.csv", "--out", "two.csv"], "two.csv is a file"),
        (["one", "--out", "missing/folder/out.xyz"], "out.xyz"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(folder, halves, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(folder)
    there = sorted(folder.rglob("*"))
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(folder.rglob("*")) == there


def test_bundled_weights_clean_a_recording(physionet, tmp_path):
    record, noise = (
        wfdb.rdrecord(str(physionet / name), sampfrom=400_000, sampto=400_000 + 20 * RATE).p_signal
        for name in ("mitdb/1.0.0/101", "nstdb/1.0.0/em")
    )
    clean = record - record.mean(0)
    noise = noise - noise.mean(0)
    noisy = clean + noise * np.sqrt(np.mean(clean**2) / np.mean(noise**2))
    np.save(tmp_path / "noisy.npy", noisy)
    assert run(tmp_path / "noisy.npy", tmp_path / "out.npy", "--rate", RATE) == 0
    output = np.load(tmp_path / "out.npy")
    error = output - output.mean(0) - clean
    assert 10 * np.log10(np.mean(clean**2) / np.mean(error**2)) > 4, json.dumps(error.std(0).tolist())
