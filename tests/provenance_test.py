import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from configs import ralenet
from ralenet_jax import provenance
from ralenet_jax.errors import UserError


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, in which the module seems to stand; gives (folder, git)."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")

    def git(*command):
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        done = subprocess.run(["git", "-C", tmp_path, *identity, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "provenance.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    return tmp_path, git


def test_revision_is_the_commit(repository):
    folder, git = repository
    assert provenance.revision() == git("rev-parse", "HEAD")
    (folder / "untracked").write_text("of no account")
    assert provenance.revision() == git("rev-parse", "HEAD")


def test_revision_tells_of_changes(repository):
    folder, git = repository
    (folder / "provenance.py").write_text("2")
    assert provenance.revision() == git("rev-parse", "HEAD") + "+changes"


def test_another_repository_around_an_installed_package_is_not_its_revision(repository, monkeypatch):
    folder, _ = repository
    installed = folder / "venv" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "provenance.py").write_text("1")
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    assert provenance.revision() is None


def test_no_repository_and_no_git_give_no_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.revision() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.revision() is None


def test_description_names_config_versions_device_and_data(data_dir):
    config = ralenet.get_config()
    config.data.dir = str(data_dir)
    config.model.base = "/home/somebody/runs/emb"
    config.distributed.coordinator = "somebody.example:1234"
    found = json.loads(json.dumps(provenance.describe(config, 2)))  # it goes into a JSON file
    expected = json.loads(config.to_json())
    del expected["data"]["dir"], expected["model"]["base"], expected["distributed"]
    assert found["config"] == expected
    assert str(data_dir) not in json.dumps(found) and "somebody" not in json.dumps(found)
    assert found["revision"] == provenance.revision()
    assert found["versions"]["python"] == platform.python_version()
    for package in ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets"):
        assert found["versions"][package] == importlib.metadata.version(package)
    assert "ralenet_jax" in found["versions"]
    assert found["device"] == {"kind": jax.devices()[0].device_kind, "platform": "cpu", "count": 2}
    for name in ("mitdb", "nstdb"):
        on_disk = json.loads((Path(data_dir) / name / "1.0.0" / "metadata.json").read_text())
        assert found["data"][name]["source"] == f"{name} 1.0.0"
        assert found["data"][name]["digest"] == on_disk["digest"]
        assert len(on_disk["digest"]) == 64


def test_description_names_the_configured_database(data_dir):
    config = ralenet.get_config()
    config.data.dir, config.data.database = str(data_dir), "ludb"
    found = provenance.describe(config, 1)["data"]
    digest = json.loads((data_dir / "ludb/1.0.1/metadata.json").read_text())["digest"]
    assert found.keys() == {"ludb", "nstdb"}
    assert found["ludb"] == {"source": "ludb 1.0.1", "digest": digest}


def test_missing_data_is_a_user_s_error(tmp_path):
    config = ralenet.get_config()
    config.data.dir = str(tmp_path)
    with pytest.raises(UserError, match="no prepared mitdb"):
        provenance.describe(config, 1)
