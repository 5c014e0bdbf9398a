"""`ralenet reproduce --check` passes on what is right, and fails on what was tampered with."""

import itertools
import shutil

import jax
import made_databases
import numpy as np
import pytest

from data_prep import prepare
from ralenet_jax import checkpoint, determinism, evaluate, main, reproduce, train

DATA = ("mitdb", "mitdb_recordings", "nstdb", "ludb")
# As in `train_test`: one program for both.
SMALL = ["model.name=unet", "train.batch_size=8", "train.steps_per_dispatch=2"]


def overrides(data_dir):
    return [f"data.dir={str(data_dir)!r}", *SMALL]


def small_config(data_dir):
    config = main.load_config("ralenet", overrides(data_dir))
    return main.override(config, determinism._small(config))


def test_everything_passes(data_dir, capsys, monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    arguments = ["--check", "--source", str(data_dir.parent / "simulated")]
    code = reproduce.main([*arguments, *(f"--config.{text}" for text in overrides(data_dir))])
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.split()[:1] in (["PASS"], ["FAIL"], ["SKIP"])
    ]
    told = [line.partition(":")[0].split(maxsplit=1) for line in lines]
    training = ["trained twice", "killed and resumed", "on 1 and on 2 devices"]
    data = [f"shards of {name}{more}" for name in DATA for more in ("", " built anew")]
    assert told == [*(["PASS", name] for name in training + data), ["SKIP", "published models"]]
    assert code == 0


def first_line(config, folder, monkeypatch, tamper):
    """What is told of training twice when `tamper(train, config, workdir)` stands for the second training."""
    real, calls = train.train, itertools.count()
    monkeypatch.setattr(
        train, "train", lambda config, workdir: tamper(real, config, workdir) if next(calls) else real(config, workdir)
    )
    return next(determinism._training(config, folder))


def test_another_seed_fails(data_dir, tmp_path, monkeypatch):
    def tamper(real, config, workdir):
        real(main.override(config.copy_and_resolve_references().lock(), ["seed=1"]), workdir)

    line = first_line(small_config(data_dir), tmp_path, monkeypatch, tamper)
    assert line.state == determinism.FAIL and "numbers differ" in line.text


def test_one_changed_parameter_fails(data_dir, tmp_path, monkeypatch):
    def tamper(real, config, workdir):
        real(config, workdir)
        _, state = evaluate.restore_state(config, workdir, jax.devices()[:1], "last")
        leaf = state.params["decoder0"]["bias"] if "decoder0" in state.params else jax.tree.leaves(state.params)[0]
        changed = np.asarray(leaf).copy()
        changed.flat[0] = np.nextafter(changed.flat[0], np.float32(9))
        params = jax.tree.map(lambda other: changed if other is leaf else other, state.params)
        shutil.rmtree(workdir / "checkpoints")
        with checkpoint.Checkpointer(workdir) as saved:
            saved.save(state.replace(params=params), None)

    line = first_line(small_config(data_dir), tmp_path, monkeypatch, tamper)
    assert line.state == determinism.FAIL and line.text.startswith("1 of ")


@pytest.fixture
def copied(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    return tmp_path / "data"


def test_a_flipped_byte_in_a_shard_fails(copied):
    (path,) = copied.glob("nstdb/*/*bw*array_record*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    line = determinism._shards_read(small_config(copied), "nstdb")
    assert line.state == determinism.FAIL and "cannot be read" in line.text


def test_other_examples_than_were_written_fail(copied, tmp_path):
    config = small_config(copied)
    made_databases.write_nstdb(tmp_path / "other")
    prepare.prepare(tmp_path / "others", databases=("nstdb",), source=tmp_path / "other")
    (ours,), (theirs,) = (list(folder.glob("nstdb/*")) for folder in (copied, tmp_path / "others"))
    for path in theirs.glob("*array_record*"):
        shutil.copy(path, ours / path.name)
    line = determinism._shards_read(config, "nstdb")
    assert line.state == determinism.FAIL and "when they were written" in line.text
    # Whole shards of another source are in order by themselves, but not the ones that the source gives.
    shutil.copy(theirs / "metadata.json", ours / "metadata.json")
    assert determinism._shards_read(config, "nstdb").state == determinism.PASS
    line = determinism._shards_rebuilt(config, "nstdb", copied.parent.parent / "nowhere", tmp_path / "anew")
    assert line.state == determinism.SKIP


def test_shards_of_another_source_fail(data_dir, tmp_path):
    made_databases.write_nstdb(tmp_path)
    line = determinism._shards_rebuilt(small_config(data_dir), "nstdb", tmp_path, tmp_path / "anew")
    assert line.state == determinism.FAIL


def test_published_numbers(shared, tmp_path):
    original = shared / "parity" / "unet.npz"
    assert determinism._parity(original).state == determinism.PASS
    with np.load(original) as data:
        arrays = dict(data)
    key = next(name for name in arrays if name.endswith("weight") and name.startswith("state_dict/"))
    arrays[key] = arrays[key] + 1e-3
    np.savez(tmp_path / "unet.npz", **arrays)
    assert determinism._parity(tmp_path / "unet.npz").state == determinism.FAIL
    np.savez(tmp_path / "other.npz", **arrays)
    assert determinism._parity(tmp_path / "other.npz").state == determinism.SKIP
