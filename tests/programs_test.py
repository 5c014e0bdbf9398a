"""Programs that are found again without being traced, and when they are not."""

import threading

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ralenet_jax import programs

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(autouse=True)
def folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()  # or JAX stays with the folder that it has
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


class Traced:
    """A function on so many devices, and how often it was traced."""

    def __init__(self, devices=1, factor=2.0):
        self.count, self.devices = 0, devices

        def function(tree, more):
            self.count += 1
            return {"out": factor * tree["x"] + more}

        self.function = jax.pmap(function, devices=jax.devices()[:devices]) if devices > 1 else jax.jit(function)

    def kept(self, *made_of):
        return programs.kept(self.function, jax.devices()[: self.devices], *made_of)


def names(folder):
    """Those of all files, and how many files they are."""
    found = list(folder.glob("ralenet-*"))
    return found, len({path.stat().st_ino for path in found})


@pytest.mark.parametrize("devices", [1, 2])
def test_a_program_is_found_without_tracing(devices, folder):
    first, second = Traced(devices), Traced(devices)
    expected = 2 * X + X[::-1]
    for traced in (first, second):
        run = traced.kept("made of this")
        for _ in range(2):
            np.testing.assert_array_equal(run({"x": X}, X[::-1])["out"], expected)
    assert (first.count, second.count) == (1, 0)
    assert names(folder)[1] == 1


def test_it_is_known_which_programs_there_are():
    function = Traced().kept("a")
    like = {"x": jax.ShapeDtypeStruct(X.shape, X.dtype)}
    assert not programs.is_known(function, like, like["x"])
    function({"x": X}, X)
    assert programs.is_known(Traced().kept("a"), like, like["x"])
    assert not programs.is_known(Traced().kept("b"), like, like["x"])
    assert not programs.is_known(function, {"x": X[:1]}, X)
    assert not programs.is_known(Traced().function, like, like["x"])


def test_what_goes_in_may_be_what_came_out():
    run = Traced(devices=2).kept("x")
    once = run({"x": X}, X)
    np.testing.assert_array_equal(run({"x": once["out"]}, X)["out"], 2 * (3 * X) + X)


@pytest.mark.parametrize(
    ("made_of", "x", "count"), [("a", X, 0), ("b", X, 1), ("a", X[:, :2], 1), ("a", X.astype(np.int32), 1)]
)
def test_another_program_is_another(made_of, x, count):
    Traced().kept("a")({"x": X}, X)
    other = Traced()
    np.testing.assert_array_equal(other.kept(made_of)({"x": x}, x)["out"], 3 * x)
    assert other.count == count


def test_another_tree_is_another_program():
    Traced().kept("a")({"x": X}, X)
    other = Traced()
    with pytest.raises(KeyError, match="x"):
        other.kept("a")({"y": X}, X)
    assert other.count == 1


def test_another_source_is_another_program(monkeypatch):
    Traced().kept("a")({"x": X}, X)
    monkeypatch.setattr(programs, "_source", lambda: "changed")
    changed = Traced(factor=3.0)
    np.testing.assert_array_equal(changed.kept("a")({"x": X}, X)["out"], 4 * X)
    assert changed.count == 1


def test_what_another_source_makes_the_same_is_not_compiled_again(folder, monkeypatch):
    Traced().kept("a")({"x": X}, X)
    monkeypatch.setattr(programs, "_source", lambda: "changed")
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled again"))
    for count in (1, 0):  # traced to know it, and then known
        again = Traced()
        np.testing.assert_array_equal(again.kept("b")({"x": X}, X)["out"], 3 * X)
        assert again.count == count
    found, files = names(folder)
    assert (len(found), files) == (3, 1)


def test_where_a_file_has_one_name_a_program_is_traced(folder, monkeypatch):
    def refused(path, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(programs.Path, "hardlink_to", refused)
    for _ in range(2):
        traced = Traced()
        np.testing.assert_array_equal(traced.kept("a")({"x": X}, X)["out"], 3 * X)
        assert traced.count == 1
    assert len(names(folder)[0]) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("XLA_FLAGS", "--xla_other=1"),
        lambda patch: patch.setattr(programs, "_instructions", lambda: "flags: none"),
        lambda patch: patch.setattr(programs, "version", lambda name: "0.0"),
    ],
)
def test_surroundings_tell_flags_machine_and_versions(change, monkeypatch):
    surroundings = programs._surroundings.__wrapped__  # not what it found before
    before = surroundings()
    with monkeypatch.context() as patch:
        change(patch)
        assert surroundings() != before
    assert surroundings() == before


def test_source_is_that_of_all_files(monkeypatch):
    source = programs._source.__wrapped__
    before, read = source(), programs.Path.read_bytes
    for changed in ("ralenet.py", "programs.py"):
        with monkeypatch.context() as patch:
            patch.setattr(
                programs.Path, "read_bytes", lambda path, name=changed: read(path) + b"#" * (path.name == name)
            )
            assert source() != before
    assert source() == before


def test_surroundings_tell_the_settings_of_jax():
    surroundings = programs._surroundings.__wrapped__
    before = surroundings()
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert surroundings() != before
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    assert surroundings() == before


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_file_is_not_used(folder, damage):
    Traced().kept("a")({"x": X}, X)
    path = names(folder)[0][0]
    path.write_bytes(damage(path.read_bytes()))
    traced = Traced()
    np.testing.assert_array_equal(traced.kept("a")({"x": X}, X)["out"], 3 * X)
    assert traced.count == 1


def test_a_full_disk_costs_no_more_than_the_file(folder, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(programs.Path, "write_bytes", full)
    np.testing.assert_array_equal(Traced().kept("a")({"x": X}, X)["out"], 3 * X)
    assert not list(folder.glob("ralenet-*"))


def test_old_programs_go(folder, monkeypatch):
    monkeypatch.setattr(programs, "_MOST", 2)
    for number in range(4):
        Traced(factor=number).kept(str(number))({"x": X}, X)
    assert len(list(folder.glob("ralenet-*"))) == 2
    last = Traced(factor=3)
    last.kept("3")({"x": X}, X)
    assert last.count == 0


def test_what_jax_has_kept_is_not_kept_twice(folder):
    np.testing.assert_array_equal(Traced().function({"x": X}, X)["out"], 3 * X)
    assert list(folder.glob("*-cache"))
    for _ in range(2):
        again = Traced()
        np.testing.assert_array_equal(again.kept("a")({"x": X}, X)["out"], 3 * X)
        assert again.count == 1
    assert names(folder)[0] == []


def test_what_is_kept_jax_does_not_keep_too(folder):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    Traced().kept("a")({"x": X}, X)
    assert not list(folder.glob("*-cache"))
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before
    # So what has been lost can be kept anew.
    for path in names(folder)[0]:
        path.unlink()
    for count in (1, 0):
        again = Traced()
        np.testing.assert_array_equal(again.kept("a")({"x": X}, X)["out"], 3 * X)
        assert again.count == count


@pytest.mark.parametrize("cache", [None, "no/such/folder"])
def test_without_a_folder_nothing_is_kept(cache):
    jax.config.update("jax_compilation_cache_dir", cache)
    function = Traced().function
    assert programs.kept(function, jax.devices(), "a") is function


def test_what_was_begun_is_waited_for_by_its_first_call(folder, monkeypatch):
    compile_it, may_end, threads = jax.stages.Lowered.compile, threading.Event(), []

    def compile_later(lowered):
        threads.append(threading.current_thread())
        assert may_end.wait(60)
        return compile_it(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_later)
    traced = Traced(devices=2)
    run = traced.kept("a")
    like = {"x": jax.ShapeDtypeStruct(X.shape, X.dtype)}
    programs.begin(run, like, X)
    assert traced.count == 1  # here and now, and what follows is not waited for
    may_end.set()
    for _ in range(2):
        np.testing.assert_array_equal(run({"x": X}, X)["out"], 3 * X)
    assert traced.count == len(threads) == 1
    assert threads != [threading.main_thread()]
    again = Traced(devices=2)
    found = again.kept("a")
    programs.begin(found, like, X)
    np.testing.assert_array_equal(found({"x": X}, X)["out"], 3 * X)
    assert (again.count, len(threads)) == (0, 1)


def test_what_fails_when_begun_is_told_by_the_first_call(folder, monkeypatch):
    def refuse(lowered):
        raise MemoryError("none is left")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    run = Traced().kept("a")
    programs.begin(run, {"x": X}, X)
    with pytest.raises(MemoryError, match="none is left"):
        run({"x": X}, X)


def test_begun_with_a_damaged_file_a_program_is_made_again(folder):
    Traced().kept("a")({"x": X}, X)
    path = names(folder)[0][0]
    path.write_bytes(path.read_bytes()[:-1])
    traced = Traced()
    run = traced.kept("a")
    programs.begin(run, {"x": X}, X)
    np.testing.assert_array_equal(run({"x": X}, X)["out"], 3 * X)
    assert traced.count == 1


def test_a_function_that_is_not_kept_is_not_begun():
    traced = Traced()
    programs.begin(traced.function, {"x": X}, X)
    assert traced.count == 0


def test_shapes_are_told_without_running_and_of_a_known_program_without_tracing():
    expected = {"out": jax.ShapeDtypeStruct(X.shape, X.dtype)}
    for traced, count in ((Traced(), 1), (Traced(), 0)):
        for function in (traced.kept("a"), traced.function)[: 1 + count]:
            found = programs.shapes(function, {"x": X}, X)
            assert jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found) == expected
        assert traced.count == count
        traced.kept("a")({"x": X}, X)
    run = traced.kept("a")
    programs.shapes(run, {"x": X}, X)
    np.testing.assert_array_equal(run({"x": X}, X)["out"], 3 * X)


def test_jax_keeps_programs_again_once_nobody_compiles():
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[setting]
    with programs._jax_keeps_none:
        with programs._jax_keeps_none:
            assert jax.config.values[setting] == np.inf
        assert jax.config.values[setting] == np.inf
    assert jax.config.values[setting] == before != np.inf
