import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ralenet_jax import checkpoint, evaluate, export, input_pipeline, main, models, optim, steps
from ralenet_jax import state as train_state
from ralenet_jax.errors import UserError
from ralenet_jax.main import load_config

_MEASURES = {
    *("snr_db", "snr_improvement_db", "pooled_snr_db", "rmse", "prd", "ssd", "mad", "cosine"),
    *("qrs_amplitude_error", "st_level_error"),
}


def configure(data_dir, *overrides):
    small = ["data.num_windows=80", "data.num_train=64", "eval.batch_size=6"]  # tests on 16 = 6 + 6 + 4 windows
    config = load_config("ralenet", [f"data.dir={str(data_dir)!r}", *small, *overrides])
    config.model.name = config.model.name if "model.name" in str(overrides) else "half"
    return config


class Half(nn.Module):
    """Gives back half of what it gets: what comes out is known, and compiled in a moment."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, r_peak=None, train=False):
        return x * self.param("gain", nn.initializers.constant(0.5), ())


@pytest.fixture(scope="module", autouse=True)
def half_is_a_model():
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(models._MODELS, "half", (Half, {}))
        yield


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """The work directory of a run that stands at step 8."""
    workdir = tmp_path_factory.mktemp("run")
    config = configure(data_dir)
    state = train_state.create_state(Half(), optim.build_optimizer(config, 8), 0, (256, 2))
    save(workdir, config, state, 1.5)
    return workdir


def save(workdir, config, state, snr_db):
    checkpoint.claim(workdir, config)
    with checkpoint.Checkpointer(workdir) as saved:
        saved.save(state.replace(step=jnp.asarray(8, jnp.int32)), snr_db)


@pytest.fixture(scope="module")
def paper(data_dir, run):
    """The run evaluated under four conditions: (configuration, result, what was printed)."""
    config = configure(data_dir, "eval.kinds=bw,em", "eval.snr_db=-4,2")
    lines = []
    return config, evaluate.evaluate(config, run, log=lines.append), "\n".join(lines)


def test_exported_weights_give_the_same_figures(paper, run, data_dir, tmp_path, capsys):
    file = tmp_path / "half.safetensors"
    export.write(export.restore(paper[0], run), "safetensors", file)
    arguments = ["--mode=evaluate", f"--weights={file}", f"--workdir={tmp_path / 'again'}", f"--data-dir={data_dir}"]
    arguments += ["--config.eval.kinds=bw,em", "--config.eval.snr_db=-4,2"]
    assert main.main(arguments) == 0
    again = json.loads((tmp_path / "again/evaluation.json").read_text())
    assert again["conditions"] == paper[1]["conditions"]
    assert main.main([*arguments, "--records=."]) == 2
    assert "leave it or --weights out" in capsys.readouterr().err


def test_every_kind_and_ratio_with_every_measure_of_input_and_output(paper):
    conditions = paper[1]["conditions"]
    assert list(conditions) == ["bw@-4", "bw@2", "em@-4", "em@2"]
    for name, rows in conditions.items():
        assert rows.keys() == {"noisy", "denoised"}
        for row in rows.values():
            assert row.keys() == _MEASURES | {"windows"}
            assert row["windows"] == 16
        noisy = rows["noisy"]
        assert noisy["snr_db"] == pytest.approx(float(name.partition("@")[2]), abs=1e-3)
        # All clean windows have unit power, so the other figures of the input follow from the ratio.
        assert noisy["pooled_snr_db"] == pytest.approx(noisy["snr_db"], abs=1e-3)
        assert noisy["snr_improvement_db"] == pytest.approx(0, abs=1e-4)
        assert noisy["rmse"] == pytest.approx(10 ** (-noisy["snr_db"] / 20), rel=1e-4)
        assert noisy["prd"] == pytest.approx(100 * noisy["rmse"], rel=1e-4)
        assert noisy["ssd"] == pytest.approx(512 * noisy["rmse"] ** 2, rel=1e-4)
        assert rows["denoised"]["snr_improvement_db"] == pytest.approx(rows["denoised"]["snr_db"] - noisy["snr_db"])


def test_figures_of_the_output_are_those_of_the_denoised_windows(paper, run):
    config, result, _ = paper
    shown = evaluate.example_windows(config, run, count=16)  # all test windows, under the first condition
    clean, noisy, denoised = (shown[name].astype(np.float64) for name in ("clean", "noisy", "denoised"))
    np.testing.assert_allclose(denoised, noisy / 2, rtol=1e-5)
    assert clean.shape == (16, 256, 2)
    test = input_pipeline.read_split(config, "test").millivolts().astype(np.float64)
    np.testing.assert_allclose(
        clean, (test - test.mean((1, 2), keepdims=True)) / test.std((1, 2), keepdims=True), atol=1e-4
    )
    found, error = result["conditions"]["bw@-4"]["denoised"], denoised - clean
    power, error_power = np.sum(clean**2, (1, 2)), np.sum(error**2, (1, 2))
    assert found["snr_db"] == pytest.approx(np.mean(10 * np.log10(power / error_power)), abs=1e-3)
    assert found["pooled_snr_db"] == pytest.approx(10 * np.log10(power.sum() / error_power.sum()), abs=1e-3)
    assert found["rmse"] == pytest.approx(np.mean(np.sqrt(np.mean(error**2, (1, 2)))), rel=1e-4)
    assert found["mad"] == pytest.approx(np.mean(np.abs(error).max((1, 2))), rel=1e-4)
    assert np.mean(10 * np.log10(power / np.sum((noisy - clean) ** 2, (1, 2)))) == pytest.approx(-4, abs=1e-3)


def test_result_file_tells_where_it_came_from(paper, run, data_dir):
    config, result, _ = paper
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert (result["split"], result["checkpoint"], result["units"]) == ("test", 8, "z-scored")
    assert result["parameters"] == result["trainable_parameters"] == 1
    assert result["learning_curve"] == [] and result["trained_from"] == []  # nothing but a checkpoint was made here
    origin = result["provenance"]
    assert origin["config"]["eval"]["kinds"] == "bw,em"
    assert origin["versions"]["jax"] == jax.__version__
    assert origin["device"]["count"] == 2
    metadata = json.loads((data_dir / "mitdb/1.0.0/metadata.json").read_text())
    assert origin["data"]["mitdb"] == {"source": "mitdb 1.0.0", "digest": metadata["digest"]}


def test_table_has_the_noisy_row_beside_the_denoised_one(paper, run):
    _, result, printed = paper
    table = evaluate.format_table(result)
    assert table in printed and str(run / "evaluation.json") in printed
    head, *rows, foot = table.splitlines()
    cells = [row.split() for row in rows]
    assert [row[:2] for row in cells] == [
        [name, part] for name in result["conditions"] for part in ("noisy", "denoised")
    ]
    assert head.split()[:5] == ["condition", "snr_db", "snr_improvement_db", "pooled_snr_db", "rmse"]
    assert float(cells[0][2]) == pytest.approx(-4.0, abs=1e-3)
    assert float(cells[1][2]) == pytest.approx(result["conditions"]["bw@-4"]["denoised"]["snr_db"], rel=1e-3)
    assert len({len(line) for line in (head, *rows)}) == 1  # columns stand under each other
    assert "z-scored" in foot


def test_honest_evaluation_is_in_millivolts_on_records_of_its_own(data_dir, run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(run / "checkpoints")
    config = configure(data_dir, "protocol=honest", "noise.kind=bw,em", "noise.snr_db_high=4")
    result = evaluate.evaluate(config, tmp_path / "run", "8", "validation", log=lambda line: None)
    (name, rows), *others = result["conditions"].items()
    assert (name, others) == ("bw,em@-4..4", [])
    windows = input_pipeline.read_split(config, "validation")
    assert set(windows.record) == {"109", "116"}
    assert rows["denoised"]["windows"] == len(windows)
    assert -4 < rows["noisy"]["snr_db"] < 4
    assert (result["units"], result["split"]) == ("mV", "validation")
    assert "mV" in evaluate.format_table(result)
    # Noise of a certain power in mV: RMSE² = power of the centred window / ratio, between the two ratios.
    centred = windows.millivolts() - windows.millivolts().mean(1, keepdims=True)
    rms = np.mean(np.sqrt(np.mean(centred.astype(np.float64) ** 2, (1, 2))))
    assert rms * 10 ** (-4 / 20) < rows["noisy"]["rmse"] < rms * 10 ** (4 / 20)


def test_whole_recordings_are_searched_for_heartbeats(data_dir, run, tmp_path):
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    config = configure(data_dir, "protocol=honest", "eval.kinds=none,ma", "eval.snr_db=(-10.0,)")
    recordings = data_dir.parent / "simulated" / "mitdb" / "1.0.0"
    result = evaluate.evaluate(config, tmp_path, records=recordings, log=lambda line: None)
    none, strong = result["heartbeats"]["none@-10"], result["heartbeats"]["ma@-10"]
    assert none["recordings"] == strong["recordings"] == 3  # 100, 103 and 105, whose windows test
    assert none["noisy"] == none["clean"] == strong["clean"] > 0.9
    assert strong["noisy"] < strong["clean"] - 0.02
    # Half of the signal has the heartbeats of the whole.
    assert none["denoised"] == pytest.approx(none["clean"], abs=0.02)


@pytest.mark.parametrize(
    ("overrides", "folder", "said"),
    [
        ((), "", "needs a run of the honest protocol"),
        (("protocol=honest", "noise.snr_db_high=4"), "", "one SNR at a time"),
        (("protocol=honest",), "nothing", "is no folder"),
        (("protocol=honest", "data.database=ludb"), "", "needs a run on mitdb, this one is on ludb"),
    ],
)
def test_recordings_that_cannot_be_searched_are_refused(data_dir, run, tmp_path, overrides, folder, said):
    with pytest.raises(UserError, match=said):
        evaluate.evaluate(configure(data_dir, *overrides), run, records=tmp_path / folder)


def test_example_windows_under_the_honest_protocol_are_centred_millivolts(data_dir, run):
    config = configure(data_dir, "protocol=honest")
    shown = evaluate.example_windows(config, run, count=3)
    windows = input_pipeline.read_split(config, "test")
    chosen = windows[np.array([0, (len(windows) - 1) // 2, len(windows) - 1])].millivolts()
    np.testing.assert_allclose(shown["clean"], chosen - chosen.mean(1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_every_window_counts_once_whatever_the_batches(data_dir, num_devices):
    config = configure(data_dir, "protocol=honest")
    windows = input_pipeline.read_split(config, "validation")[np.arange(23)]
    source = evaluate.noise_source(config, input_pipeline.read_noise(config), "validation", "emb", -4.0, None)
    step = steps.build_eval_step(Half(), "honest", jax.devices()[:num_devices])
    results = [
        evaluate.evaluate_windows(
            step, {"params": {"gain": 0.5}}, input_pipeline.eval_batches(windows, size, num_devices), source
        )
        for size in (23, 7)
    ]
    for result in results:
        for row, first in zip(result.values(), results[0].values(), strict=True):
            assert row["windows"] == 23
            assert row == pytest.approx(first, rel=1e-5, abs=1e-6)
    assert results[0]["noisy"]["snr_db"] == pytest.approx(-4, abs=1e-3)


def test_the_published_model_is_evaluated(data_dir, tmp_path):
    config = configure(data_dir, "model.name=ralenet", "num_devices=1", "eval.batch_size=16")
    model, optimizer = train_state.model_from_config(config), optim.build_optimizer(config, 8)
    state = train_state.create_state(model, optimizer, 0, (256, 2))
    save(tmp_path, config, state, None)
    result = evaluate.evaluate(config, tmp_path, log=lambda line: None)
    assert (result["parameters"], result["checkpoint"], list(result["conditions"])) == (1_087_282, 8, ["bw@-4"])
    rows = result["conditions"]["bw@-4"]
    assert all(np.isfinite(list(row.values())).all() for row in rows.values())
    assert rows["denoised"]["snr_db"] != pytest.approx(rows["noisy"]["snr_db"], abs=0.1)


def test_pooled_snr_is_of_the_summed_powers():
    # Two windows of power 100 and 1 with errors of 1 and 1: 20 and 0 dB, mean 10; pooled 10·log10(101/2).
    sums = {"count": 2.0, "snr_db": 20.0, "signal_energy": 101.0, "error_energy": 2.0}
    found = evaluate.summarise(sums)
    assert found == {"snr_db": 10.0, "pooled_snr_db": pytest.approx(10 * np.log10(50.5)), "windows": 2}


def test_validation_noise_is_the_training_half_and_test_noise_the_other(data_dir):
    config = configure(data_dir, "protocol=honest")
    recordings = np.zeros((3, 1000, 2), np.float32)
    spans = {
        split: evaluate.noise_source(config, recordings, split, "bw", 0.0, None).condition.span.tolist()
        for split in ("train", "validation", "test")
    }
    assert spans == {"train": [0, 500], "validation": [0, 500], "test": [500, 1000]}


def test_checkpoint_is_chosen_by_name_or_step(data_dir, run):
    config, devices = configure(data_dir), jax.devices()[:1]
    states = [evaluate.restore_state(config, run, devices, which)[1] for which in ("last", "best", "8")]
    for state in states:
        assert int(state.step) == 8
        assert state.step.devices() == set(devices)
    for which, said in (
        ("newest", "'newest'; expected last, best or the number of a step"),
        ("7", "step 7 .*there: 8"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate.restore_state(config, run, devices, which)


def test_best_of_a_run_that_never_validated_is_refused(data_dir, run, tmp_path):
    config = configure(data_dir)
    _, state = evaluate.restore_state(config, run, jax.devices()[:1], "last")
    with checkpoint.Checkpointer(tmp_path) as saved:
        saved.save(state, None)  # as on an interruption
    with pytest.raises(UserError, match="validated"):
        evaluate.restore_state(config, tmp_path, jax.devices()[:1], "best")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["eval.kinds=bw,bv"], "noise kind 'bv'"),
        (["eval.snr_db=('a',)"], "eval.snr_db"),
        (["eval.snr_db=(True,)"], "eval.snr_db"),
        (["eval.snr_db=(1e999,)"], "inf"),
        (["eval.batch_size=0"], "eval.batch_size is 0"),
        (["num_devices=3"], "num_devices is 3"),
        (["num_devices=-1"], "num_devices is -1"),
        (["model.name=ralenet_mlp"], "cannot be read"),
        (["model.name=ralent"], "unknown model 'ralent'"),
        (["data.dir=nowhere"], "no prepared mitdb"),
        (["protocol=honets"], "protocol is 'honets'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(data_dir, run, overrides, said):
    before = (run / "evaluation.json").exists() and (run / "evaluation.json").read_text()
    with pytest.raises(UserError, match="^[^\n]+$") as caught:
        evaluate.evaluate(configure(data_dir, *overrides), run, log=lambda line: None)
    assert said in str(caught.value)
    assert ((run / "evaluation.json").exists() and (run / "evaluation.json").read_text()) == before


def test_no_run_is_a_user_s_error(data_dir, tmp_path):
    with pytest.raises(UserError, match="there: none"):
        evaluate.evaluate(configure(data_dir), tmp_path / "nothing")


@pytest.mark.parametrize(
    ("num_devices", "batch_sizes", "used"),
    [(0, (), 2), (0, (8,), 2), (0, (7,), 1), (1, (7,), 1), (2, (32, 6), 2)],
)
def test_devices_share_a_batch_evenly(data_dir, num_devices, batch_sizes, used):
    chosen = evaluate.choose_devices(configure(data_dir, f"num_devices={num_devices}"), *batch_sizes)
    assert chosen == jax.devices()[:used]


def test_devices_that_cannot_share_a_batch_are_refused(data_dir):
    with pytest.raises(UserError, match="batch of 7 windows does not divide by 2 devices"):
        evaluate.choose_devices(configure(data_dir, "num_devices=2"), 7)
