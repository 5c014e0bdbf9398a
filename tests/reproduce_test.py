"""`ralenet reproduce` on small real trainings: what is made, what is not made twice, what is never called done."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ralenet_jax import evaluate, reproduce, reproduce_cells, reproduce_tables, train
from ralenet_jax.errors import UserError
from ralenet_jax.reproduce_cells import Cell

ROOT = Path(__file__).parents[1]
# Eight steps an epoch, in the dispatches of `train_test`: one program for both.
SMALL = ["data.num_windows=80", "data.num_train=64", "train.batch_size=8", "train.steps_per_dispatch=2"]
CELL, OTHER = Cell("paper", "unet", "emb", -4, 0), Cell("paper", "unet", "emb", -2, 0)


def settings(data_dir, epochs=2):
    return [f"data.dir={str(data_dir)!r}", *SMALL, f"train.epochs={epochs}"]


@pytest.fixture(scope="module")
def made(data_dir, tmp_path_factory):
    """A work directory with three cells: (its path, the table, what was told)."""
    workdir, lines = tmp_path_factory.mktemp("made"), []
    only = ["unet:emb:-4", "dwt:emb:-4", "fft:emb"]
    return workdir, reproduce.reproduce("paper", workdir, settings(data_dir), only, lines.append), lines


def test_cells_are_the_published_matrix():
    paper = [cell.name for cell in reproduce_cells.cells("paper")]
    assert len(paper) == 8 * 8
    assert {"dwt:bw:-4", "acdae:emb:2", "ralenet_nra:ma:-4", "ralenet:emb:4"} < set(paper)
    honest = [cell.name for cell in reproduce_cells.cells("honest")]
    assert len(honest) == 8 * (2 + 6 * 3)  # filters have no seeds
    assert {"dwt:bw:-4", "ralenet:bw:-4:2"} < set(honest)
    assert {cell.model for cell in reproduce_cells.cells("twelve-lead")} == {"ralenet_12lead"}


def test_cells_are_chosen_by_the_beginning_of_their_name():
    names = [cell.name for cell in reproduce_cells.cells("paper", ["ralenet:emb", "unet:bw:-4"])]
    assert names == ["unet:bw:-4", *(f"ralenet:emb:{snr}" for snr in (-4, -2, 0, 2, 4))]
    with pytest.raises(UserError, match=r"--only ralenet:bw:4 fits no cell.*MODEL:KIND:SNR"):
        reproduce_cells.cells("paper", ["ralenet:bw:4"])


def test_a_cell_is_configured_by_its_name(tmp_path):
    config = reproduce_cells.config_of(Cell("honest", "danet", "ma", -4, 2), tmp_path, ["train.epochs=3"])
    assert (config.protocol, config.model.name, config.noise.kind) == ("honest", "danet", "ma")
    assert (config.noise.snr_db, config.seed, config.train.epochs) == (-4.0, 2, 3)


def test_measured_stands_beside_published(made, data_dir):
    workdir, table, _ = made
    assert table == json.loads((workdir / "paper/table.json").read_text())
    run = json.loads((workdir / "paper/unet_emb_-4/evaluation.json").read_text())
    entry = table["rows"]["unet"]["emb@-4"]
    assert entry["measured"] == run["conditions"]["emb@-4"]["denoised"]
    assert entry["published"] == {"snr_db": [7.8252], "rmse": [0.4297]}
    assert entry["difference"]["snr_db"] == [pytest.approx(entry["measured"]["snr_db"] - 7.8252)]
    assert (entry["epochs"], run["provenance"]["config"]["noise"]["kind"]) == (2, "emb")
    assert table["rows"]["unet"]["bw@-4"]["measured"] is None
    # The published SNR of the wavelets is another measure.
    assert list(table["rows"]["dwt"]["emb@-4"]["difference"]) == ["rmse"]
    assert set(table["runs"]) == {"unet:emb:-4", "dwt:emb:-4", *(f"fft:emb:{snr}" for snr in (-4, -2, 0, 2, 4))}
    for name in ("table.md", "table.png", "windows.png"):
        assert (workdir / "paper" / name).stat().st_size > 100
    assert (workdir / "paper/table.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(made, data_dir, monkeypatch):
    workdir, table, _ = made
    for name in ("evaluate", "evaluate_filter"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: pytest.fail("evaluated again"))
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    assert (
        reproduce.reproduce("paper", workdir, settings(data_dir), ["unet:emb:-4", "dwt:emb:-4"], lambda _: None)
        == table
    )
    # A shorter training than what there is counts as done too.
    reproduce.reproduce("paper", workdir, settings(data_dir, 1), ["unet:emb:-4"], lambda _: None)


def test_a_cell_that_is_not_trained_to_its_end_is_not_done(data_dir, tmp_path):
    one, three = (settings(data_dir, epochs) for epochs in (1, 3))
    reproduce_cells.make(CELL, tmp_path, one)
    config = reproduce_cells.config_of(CELL, tmp_path, three)
    assert reproduce_cells.result_of(CELL, tmp_path, reproduce_cells.config_of(CELL, tmp_path, one))
    assert reproduce_cells.result_of(CELL, tmp_path, config) is None
    assert reproduce_cells.state_of(CELL, tmp_path, config) == "after epoch 1 of 3"
    assert reproduce._written("paper", tmp_path, three)["rows"]["unet"]["emb@-4"]["measured"] is None
    assert reproduce_cells.make(CELL, tmp_path, three)["checkpoint"] == 24
    assert reproduce_cells.state_of(CELL, tmp_path, config) == "done, 3 epochs"
    # An evaluation of another checkpoint than the last is not the cell's figure.
    path = CELL.folder(tmp_path) / evaluate.RESULT
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint": 16}))
    assert reproduce_cells.result_of(CELL, tmp_path, config) is None


def test_a_damaged_or_foreign_evaluation_is_not_done(made, data_dir, tmp_path):
    config = reproduce_cells.config_of(CELL, tmp_path, settings(data_dir))
    path = CELL.folder(tmp_path) / evaluate.RESULT
    path.parent.mkdir(parents=True)
    whole = (CELL.folder(made[0]) / evaluate.RESULT).read_text()
    path.write_text(whole)
    assert reproduce_cells.result_of(CELL, tmp_path, config)
    path.write_text(whole[:500])
    assert reproduce_cells.result_of(CELL, tmp_path, config) is None
    path.write_text(whole.replace('"learning_rate": 0.001', '"learning_rate": 0.002'))
    assert reproduce_cells.result_of(CELL, tmp_path, config) is None


def test_killed_is_not_done_and_ends_in_the_same_bits(made, data_dir, tmp_path):
    command = [sys.executable, "-u", "-m", "ralenet_jax.cli", "reproduce", "--only", CELL.name]
    command += ["--workdir", str(tmp_path), *(f"--config.{text}" for text in settings(data_dir, 2))]
    environment = os.environ | {"NPROC": "2"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert any(line.startswith("epoch 1") for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    overrides = settings(data_dir, 2)
    config = reproduce_cells.config_of(CELL, tmp_path, overrides)
    assert reproduce_cells.result_of(CELL, tmp_path, config) is None
    table = json.loads((tmp_path / "paper/table.json").read_text())
    assert table["runs"] == {}
    reproduce.reproduce("paper", tmp_path, overrides, [CELL.name], lambda _: None)
    folders = (CELL.folder(made[0]), CELL.folder(tmp_path))
    first, second = (evaluate.restore_state(config, folder, jax.devices()[:2], "last")[1] for folder in folders)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_list_tells_states_and_time(made, data_dir):
    lines = []
    only = ["unet:emb:-4", "unet:emb:-2", "dwt:emb:-4"]
    reproduce.list_cells("paper", made[0], settings(data_dir, 2_000_000), only, lines.append)
    assert [" ".join(line.split()[:5]) for line in lines[:2]] == ["dwt:emb:-4 done", "unet:emb:-4 after epoch 2 of"]
    assert "not begun" in lines[2] and " h " in lines[2] and lines[2].endswith("to go")
    assert lines[3].endswith("of training to go in all")


def test_a_figure_outlives_its_weights(made, data_dir, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(made[0], workdir, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "*.png"))
    table = reproduce.reproduce("paper", workdir, settings(data_dir), ["dwt:emb:-4"], lambda _: None)
    assert CELL.name in table["runs"]
    assert (workdir / "paper/table.png").is_file() and (workdir / "paper/windows.png").is_file()


def test_time_is_told_by_trainings_on_the_same_device_only(made, tmp_path, monkeypatch):
    workdir = tmp_path / "work"
    folder = workdir / "paper" / "unet_emb_-4"
    shutil.copytree(CELL.folder(made[0]), folder, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(99 * '{"step": 17, "train/windows_per_s": 7.0}\n')
    monkeypatch.setattr(reproduce_cells, "_measured", lambda *_: 5.0)
    config = reproduce_cells.config_of(OTHER, workdir, ["train.epochs=10"])
    assert reproduce_cells.seconds_left(OTHER, workdir, config, 70) == 10 * 70 / 7.0
    starts = json.loads((folder / "starts.json").read_text())
    starts[0]["device"]["kind"] = "NVIDIA H200"
    (folder / "starts.json").write_text(json.dumps(starts))
    assert reproduce_cells.seconds_left(OTHER, workdir, config, 70) == 10 * 70 / 5.0


def measured(snr_db):
    return {"snr_db": snr_db, "pooled_snr_db": snr_db - 1, "rmse": 0.5}


def test_seeds_give_mean_and_deviation():
    provenance = {"provenance": {"config": {"train": {"epochs": 20}}}, "learning_curve": []}
    runs = {
        Cell("honest", "unet", "bw", -4, seed): provenance
        | {"conditions": {"bw@-4": {"denoised": measured(snr_db), "noisy": measured(-4.0)}}}
        for seed, snr_db in enumerate((7.0, 8.0, 10.0))
    }
    table = reproduce_tables.collect("honest", runs, 1)
    entry = table["rows"]["unet"]["bw@-4"]
    assert entry["measured"]["snr_db"] == pytest.approx(25 / 3)
    assert entry["deviation"]["snr_db"] == pytest.approx(statistics.stdev([7, 8, 10]))
    text = reproduce_tables.markdown(table, 20)
    assert "8.33 ± 1.53 (20 ep.)" in text and "SNR pooled" in text
    assert "for 20 epochs only" in reproduce_tables.markdown(table, 50)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "uent"], "--only uent fits no cell"),
        (["--data-dir", "nowhere"], "no prepared mitdb below nowhere"),
        (["--config.noise.kid=ma"], "unknown configuration key 'noise.kid'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["--workdir", str(tmp_path / "work"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
