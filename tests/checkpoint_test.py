import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ralenet
from ralenet_jax import checkpoint, steps
from ralenet_jax.errors import UserError
from ralenet_jax.state import TrainState

_CHECKOUT = Path(__file__).parents[1]


def state_at(step):
    """A small state whose values tell its step."""
    params = {"dense": {"kernel": jnp.full((3, 2), float(step)), "bias": jnp.arange(3) + 0.1 * step}}
    return TrainState(jnp.asarray(step, jnp.int32), params, {"mean": jnp.full(2, -1.5 * step)}, (jnp.asarray(step),))


def save(workdir, *scores):
    """Saves steps 10, 20, … with these validation SNRs."""
    with checkpoint.Checkpointer(workdir) as saved:
        for index, snr_db in enumerate(scores, 1):
            saved.save(state_at(10 * index), snr_db)


def steps_on_disk(workdir):
    return {int(path.name) for path in (Path(workdir) / "checkpoints").iterdir() if path.name.isdecimal()}


def assert_equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, expected)


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ((5.0, 9.0, 7.0, 8.0), {20, 40}, 20),  # the best and the newest
        ((-3.0, -5.0), {10, 20}, 10),
        ((1.0, 2.0, 3.0), {30}, 30),
        ((4.0, None, None), {10, 30}, 10),  # saved without a validation, as on an interruption
        ((None, None), {20}, None),
    ],
)
def test_newest_and_best_are_kept(tmp_path, scores, kept, best):
    save(tmp_path, *scores)
    assert steps_on_disk(tmp_path) == kept
    with checkpoint.Checkpointer(tmp_path) as saved:
        assert saved.latest_step == max(kept) == 10 * len(scores)
        assert saved.best_step == best


def test_what_is_restored_is_what_was_saved(tmp_path):
    save(tmp_path, 5.0, 4.0)
    with checkpoint.Checkpointer(tmp_path) as saved:
        assert_equal(saved.restore(state_at(0)), state_at(20))
        assert_equal(saved.restore(state_at(0), 10), state_at(10))


def test_what_happens_to_the_state_afterwards_is_not_saved(tmp_path):
    spoil = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 7, state), donate_argnums=0)
    with checkpoint.Checkpointer(tmp_path) as saved:
        for state in (steps.replicate(state_at(10), jax.devices()), jax.tree.map(np.array, state_at(20))):
            saved.save(state, 5.0)
            if state.step == 10:
                state = spoil(state)
            else:
                state.params["dense"]["kernel"][:] = -7
            saved.wait()
            assert_equal(saved.restore(state_at(0)), state_at(saved.latest_step))


def test_position_of_the_input_is_of_the_newest_checkpoint(tmp_path):
    for step, position in ((10, {"next_index": 10}), (20, {"next_index": 20}), (30, None)):
        with checkpoint.Checkpointer(tmp_path) as saved:
            saved.save(state_at(step), None, position)
        with checkpoint.Checkpointer(tmp_path) as saved:
            assert saved.input_position == position
            assert_equal(saved.restore(state_at(0)), state_at(step))


def test_a_new_work_directory_has_no_checkpoint(tmp_path):
    with checkpoint.Checkpointer(tmp_path / "new" / "run") as saved:
        assert saved.latest_step is None
        assert saved.best_step is None
        with pytest.raises(UserError, match=r"no checkpoint of step None .*there: none"):
            saved.restore(state_at(0))


def test_one_run_goes_on_with_another_number_of_devices(tmp_path):
    devices = jax.devices()
    assert len(devices) == 2
    with checkpoint.Checkpointer(tmp_path) as saved:
        saved.save(steps.replicate(state_at(10), devices), 1.0)
    with checkpoint.Checkpointer(tmp_path) as saved:
        for there in (devices[:1], devices[1:], devices):
            restored = saved.restore(steps.replicate(state_at(0), there))
            assert_equal(restored, state_at(10))
            assert restored.params["dense"]["kernel"].devices() == set(there)


def test_saving_goes_on_after_a_restart(tmp_path):
    save(tmp_path, 5.0, 9.0, 7.0)
    with checkpoint.Checkpointer(tmp_path) as saved:
        saved.save(state_at(40), 6.0)
        saved.wait()
        assert steps_on_disk(tmp_path) == {20, 40}
        assert (saved.latest_step, saved.best_step) == (40, 20)


def test_interrupted_save_is_ignored_and_cleaned_up(tmp_path):
    save(tmp_path, 5.0)
    whole, half = tmp_path / "checkpoints/10", tmp_path / "checkpoints/15.orbax-checkpoint-tmp"
    shutil.copytree(whole, half)
    next(path for path in half.rglob("*") if path.is_file()).unlink()
    with checkpoint.Checkpointer(tmp_path) as saved:
        assert saved.latest_step == 10
        assert_equal(saved.restore(state_at(0)), state_at(10))
        saved.save(state_at(20), 6.0)
    assert not half.exists()
    assert steps_on_disk(tmp_path) == {20}


@pytest.mark.parametrize("step", [15, 30])
def test_missing_step_is_refused_with_what_is_there(tmp_path, step):
    save(tmp_path, 5.0, 4.0)
    with checkpoint.Checkpointer(tmp_path) as saved:
        with pytest.raises(UserError, match=rf"no checkpoint of step {step} in .* \(there: 10, 20\)"):
            saved.restore(state_at(0), step)


_RESTORE = """
import jax.numpy as jnp
from ralenet_jax import checkpoint
from ralenet_jax.errors import UserError
with checkpoint.Checkpointer({workdir!r}) as saved:
    try:
        saved.restore({{"step": jnp.zeros((), jnp.int32), "kernel": jnp.zeros({shape})}})
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("damaged, shape", [(True, (3, 2)), (False, (4, 2))])
def test_damaged_or_unlike_checkpoint_is_a_user_s_error(tmp_path, damaged, shape):
    @flax.struct.dataclass
    class State:
        step: jax.Array
        kernel: jax.Array

    with checkpoint.Checkpointer(tmp_path) as saved:
        saved.save(State(jnp.asarray(10), jnp.ones((3, 2))), 5.0)
    arrays = [path for path in (tmp_path / "checkpoints/10").rglob("d/*") if path.is_file()]
    assert arrays
    for path in arrays if damaged else ():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    # In a process of its own: Orbax's threads go on complaining after the error.
    code = _RESTORE.format(workdir=str(tmp_path), shape=shape)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_CHECKOUT)
    assert done.stdout.startswith(f"the checkpoint of step 10 in {tmp_path}/checkpoints cannot be read ("), done.stderr
    assert done.stdout.count("\n") == 1


def test_a_changed_number_is_not_taken_for_what_was_saved(tmp_path):
    """Orbax alone reads most of them without a word."""
    state = TrainState(jnp.asarray(10), {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}, {}, ())
    with checkpoint.Checkpointer(tmp_path) as saved:
        saved.save(state, 5.0)
    path = max((tmp_path / "checkpoints/10").rglob("d/*"), key=lambda path: path.stat().st_size)
    sound, refused = path.read_bytes(), 0
    for place in range(200, len(sound), 2000):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with checkpoint.Checkpointer(tmp_path) as saved:
            try:
                found = saved.restore(state)
                jax.tree.map(np.testing.assert_array_equal, found, state)  # a byte that means nothing
            except UserError as error:
                refused += re.search("step 10 in .* cannot be read", str(error)) is not None
    assert refused > 3
    path.write_bytes(sound)
    scores = tmp_path / "checkpoints/10/metrics/metrics"
    scores.write_text(scores.read_text().replace("5", "9"))
    with checkpoint.Checkpointer(tmp_path) as saved, pytest.raises(UserError, match=r"\(it is not what was saved\)"):
        saved.restore(state)


def test_a_checkpoint_of_before_there_were_digests_is_taken(tmp_path):
    save(tmp_path, 5.0)
    path = tmp_path / "checkpoints/10/_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
    with checkpoint.Checkpointer(tmp_path) as saved:
        assert_equal(saved.restore(state_at(0)), state_at(10))


def test_damaged_measures_are_a_user_s_error(tmp_path):
    save(tmp_path, 5.0)
    for text in ('{"snr_db": 5', '{"snr_da": 5.0}'):
        (tmp_path / "checkpoints/10/metrics/metrics").write_text(text)
        with pytest.raises(UserError, match="^a metrics/metrics in .*checkpoints cannot be read [^\n]*$"):
            checkpoint.Checkpointer(tmp_path)


def test_who_only_reads_leaves_a_training_s_unfinished_checkpoint_alone(tmp_path):
    save(tmp_path, 5.0)
    (tmp_path / "checkpoints/20.orbax-checkpoint-tmp").mkdir()
    with checkpoint.Checkpointer(tmp_path, read_only=True) as saved:
        assert (saved.latest_step, saved.best_step) == (10, 10)
        assert_equal(saved.restore(state_at(0)), state_at(10))
    assert (tmp_path / "checkpoints/20.orbax-checkpoint-tmp").exists()
    with checkpoint.Checkpointer(tmp_path / "new", read_only=True) as saved:
        assert saved.latest_step is None
    assert not (tmp_path / "new").exists()


def test_full_disk_is_a_user_s_error(tmp_path, monkeypatch):
    with checkpoint.Checkpointer(tmp_path) as saved:
        for error in (
            ValueError("RESOURCE_EXHAUSTED: Error writing: Failed to write 9 bytes: … [os_error_code='28']"),
            OSError(28, "No space left on device", "file"),
        ):
            monkeypatch.setattr(saved._manager, "save", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            with pytest.raises(UserError, match=f"^cannot write in {tmp_path}/checkpoints: No space left on device; "):
                saved.save(state_at(10), 5.0)


def test_checkpoint_of_another_model_is_a_user_s_error(tmp_path):
    save(tmp_path, 5.0)
    target = state_at(0)
    target.params["dense"]["more"] = jnp.zeros(3)
    with checkpoint.Checkpointer(tmp_path) as saved, pytest.raises(UserError, match="cannot be read"):
        saved.restore(target)


def test_configuration_is_written_and_read_back_locked(tmp_path):
    config = ralenet.get_config()
    config.noise.kind = "emb"
    checkpoint.claim(tmp_path / "new", config)
    found = checkpoint.read_config(tmp_path / "new")
    assert found.noise.kind == "emb"
    assert json.loads(found.to_json()) == json.loads(config.to_json())
    assert found.is_locked
    with pytest.raises(AttributeError):
        found.noise.snr = 3.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("protocol", "honest"),
        ("noise.snr_db", -3.0),
        ("noise.snr_db_high", 3.0),
        ("model.name", "ralenet_nra"),
        ("optim.learning_rate", 2e-3),
        ("train.batch_size", 64),
        ("train.steps_per_dispatch", 5),
        ("data.num_train", 7000),
    ],
)
def test_another_configuration_is_refused_by_the_key_that_differs(tmp_path, key, value):
    checkpoint.claim(tmp_path, ralenet.get_config())
    before = (tmp_path / "config.json").read_text()
    changed = ralenet.get_config()
    was = changed[key] if "." not in key else changed[key.split(".")[0]][key.split(".")[1]]
    changed.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=rf"{key}={was}, now {value} was given"):
        checkpoint.claim(tmp_path, changed)
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.epochs", 200),
        ("train.eval_every", 5),
        ("train.checkpoint_every", 5),
        ("data.dir", "elsewhere"),
        ("model.base", "elsewhere"),
        ("num_devices", 1),
        ("eval.kinds", "bw,ma"),
        ("eval.snr_db", (0.0, 4.0)),
        ("eval.batch_size", 7),
    ],
)
def test_what_may_change_between_a_run_and_its_continuation(tmp_path, key, value):
    checkpoint.claim(tmp_path, ralenet.get_config())
    changed = ralenet.get_config()
    changed.update_from_flattened_dict({key: value})
    checkpoint.claim(tmp_path, changed)
    found = json.loads((tmp_path / "config.json").read_text())
    for part in key.split("."):
        found = found[part]
    assert found == (list(value) if isinstance(value, tuple) else value)
    checkpoint.claim(tmp_path, changed)  # and the same one is no other


def test_what_is_saved_is_found_without_a_trace(tmp_path):
    assert not checkpoint.is_saved(tmp_path / "nothing") and not checkpoint.is_saved(tmp_path)
    unfinished = tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    assert not checkpoint.is_saved(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints", unfinished.name]
    save(tmp_path, 1.0)
    assert checkpoint.is_saved(tmp_path)


def test_missing_or_broken_configuration_is_a_user_s_error(tmp_path):
    with pytest.raises(UserError, match=f"no run in {tmp_path}"):
        checkpoint.read_config(tmp_path)
    for text in ('{"seed": 0, "proto', "[1, 2]", ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json is not readable"):
            checkpoint.read_config(tmp_path)


def test_work_directory_that_cannot_be_is_a_user_s_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run"):
        checkpoint.claim(tmp_path / "file" / "run", ralenet.get_config())


def test_a_file_is_the_old_one_or_whole(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "config.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": 2, "b": object()})

    def cut(self, text, encoding):
        with open(self, "w") as file:
            file.write(text[:3])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", cut)
        with pytest.raises(OSError, match="No space"):
            checkpoint.write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
    with path.open() as reader:  # who reads while it is replaced reads the old one
        checkpoint.write_json(path, {"a": 4})
        assert json.load(reader) == {"a": 1}
    assert json.loads(path.read_text()) == {"a": 4}


def test_a_lost_process_is_not_told_as_a_full_disk(tmp_path, monkeypatch):
    def saves():
        with checkpoint._saving(tmp_path):
            raise jax.errors.JaxRuntimeError("Gloo AllGather failed")

    with pytest.raises(UserError, match="cannot write"):
        saves()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="AllGather"):
        saves()
