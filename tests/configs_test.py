import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from configs import demo, honest, ralenet
from ralenet_jax.main import load_config
from ralenet_jax.models import build_model

_CHECKOUT = Path(__file__).parents[1]
_NAMES = sorted(path.stem for path in (_CHECKOUT / "configs").glob("*.py") if path.stem != "__init__")


def flat(config, prefix=""):
    values = {}
    for key, value in (config if isinstance(config, dict) else config.to_dict()).items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


def read_keys(code):
    """Keys read from something called `config`: `self.config.noise.kind` gives "noise.kind"."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            parts.append(node.id)
        if "config" in parts:
            found.add(".".join(reversed(parts[: parts.index("config")])))
    return found


def test_the_reader_of_keys_sees_what_it_should():
    code = (
        "def f(config, run):\n x = config.a.b\n return run.config.c, self.config.d.e.items(), config.f['g'], other.h.i"
    )
    assert read_keys(code) >= {"a.b", "c", "d.e.items", "f"}
    assert not any("h" in key or "i" == key for key in read_keys(code))


def test_every_key_is_read():
    found = set()
    for path in (_CHECKOUT / "ralenet_jax").rglob("*.py"):
        found |= read_keys(path.read_text(encoding="utf-8"))
    # The model's options are handed over by name; the model must have them.
    model = build_model("ralenet")
    found |= {f"model.{field.name}" for field in dataclasses.fields(model)}
    assert not flat(ralenet.get_config()).keys() - found


@pytest.mark.parametrize("name", _NAMES)
def test_every_configuration_loads_by_name_and_by_path_and_is_locked(name):
    by_name, by_path = load_config(name), load_config(str(_CHECKOUT / "configs" / f"{name}.py"))
    assert flat(by_name) == flat(by_path) == flat(importlib.import_module(f"configs.{name}").get_config())
    for config in (by_name, importlib.import_module(f"configs.{name}").get_config()):
        assert config.is_locked
        with pytest.raises(AttributeError):
            config.noise.knid = "ma"


@pytest.mark.parametrize("name", _NAMES)
def test_overlays_change_only_what_is_there(name):
    default, overlay = flat(ralenet.get_config()), flat(load_config(name))
    assert overlay.keys() == default.keys()
    for key, value in overlay.items():
        if default[key] is not None:
            assert type(value) is type(default[key]), key


def test_configurations_do_not_share_their_values():
    first = ralenet.get_config()
    first.noise.kind = "ma"
    assert ralenet.get_config().noise.kind == "bw"


def test_default_is_the_paper_s_protocol():
    found = flat(ralenet.get_config())
    expected = {
        "protocol": "paper",
        "data.num_windows": 10_000,
        "data.num_train": 8_000,
        "noise.kind": "bw",
        "noise.snr_db": -4.0,
        "noise.snr_db_high": None,
        "noise.fresh": False,
        "model.name": "ralenet",
        "optim.name": "adam",
        "optim.learning_rate": 1e-3,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "optim.weight_decay": 0.0,
        "optim.clip_norm": 0.0,
        "train.batch_size": 32,
        "train.epochs": 100,
        "train.eval_every": 1,
        "eval.kinds": "",
        "eval.snr_db": (),
    }
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("config", [honest, demo])
def test_honest_protocol_draws_fresh_noise(config):
    made = config.get_config()
    assert (made.protocol, made.noise.fresh) == ("honest", True)


def test_every_key_stands_in_the_readme_with_its_default():
    text = (_CHECKOUT / "README.md").read_text(encoding="utf-8").partition("## Configuration")[2]
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| `(.*?)` \|", text, re.MULTILINE))
    shown = {key: '""' if value == "" else str(value) for key, value in flat(ralenet.get_config()).items()}
    assert rows == shown
