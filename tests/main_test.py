import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import ralenet
from ralenet_jax import checkpoint, main
from ralenet_jax.errors import UserError
from ralenet_jax.train import Interrupted, NonFiniteLoss

_CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def called(monkeypatch):
    """Stands in for training and evaluation; gives what they were called with."""
    calls = []
    monkeypatch.setattr(main.train, "train", lambda *arguments: calls.append(("train", *arguments)))
    monkeypatch.setattr(main.evaluate, "evaluate", lambda *arguments: calls.append(("evaluate", *arguments)))
    return calls


def lookup(config, key):
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("noise.kind=ma", "ma"),
        ("noise.kind=bw,ma", "bw,ma"),
        ("seed=7", 7),
        ("noise.snr_db=-2.5", -2.5),
        ("noise.snr_db=-2", -2.0),
        ("optim.learning_rate=3e-4", 3e-4),
        ("noise.snr_db_high=24", 24.0),
        ("noise.snr_db_high=None", None),
        ("noise.fresh=True", True),
        ("noise.fresh=true", True),
        ("noise.fresh=false", False),
        ("eval.snr_db=(-4.0,0.0)", (-4.0, 0.0)),
        ("eval.snr_db=-4,0,4", (-4, 0, 4)),
        ("eval.snr_db=[1.5]", (1.5,)),
        ("eval.kinds=", ""),
        ("data.dir=some where/with=sign", "some where/with=sign"),
        ("data.dir='123'", "123"),
        ("model.local_enhancement=none", "none"),
        ("model.r_wave_attention=False", False),
    ],
)
def test_overrides_take_the_type_of_the_key(text, value):
    config = main.load_config("ralenet", [text])
    found = lookup(config, text.partition("=")[0])
    assert found == value
    assert type(found) is type(value)
    assert config.is_locked


def test_later_overrides_win_and_the_others_stay():
    config = main.load_config("ralenet", ["seed=1", "noise.kind=em", "seed=2"])
    assert (config.seed, config.noise.kind, config.noise.snr_db) == (2, "em", -4.0)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("noise.knid=ma", "noise.kind"),
        ("noise.snr=3", "noise.snr_db"),
        ("train.batchsize=3", "train.batch_size"),
        ("optim.lerning_rate=3", "optim.learning_rate"),
        ("epochs=3", "train.epochs"),
        ("sed=3", "seed"),
        ("protocoll=honest", "protocol"),
        ("noise.kind.x=3", "noise.kind"),
        ("noise=ma", "noise."),  # a section is no key
    ],
)
def test_unknown_key_names_the_nearest(text, nearest):
    with pytest.raises(UserError, match=rf"unknown configuration key '{text.partition('=')[0]}'.* '{nearest}"):
        main.load_config("ralenet", [text])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("seed=abc", "int"),
        ("seed=1.5", "int"),
        ("seed=", "int"),
        ("seed=None", "int"),
        ("seed=True", "int"),
        ("noise.snr_db=low", "float"),
        ("noise.snr_db=nan", "float"),
        ("noise.snr_db=(1,2)", "float"),
        ("noise.snr_db=True", "float"),
        ("noise.snr_db_high=high", "float"),
        ("noise.fresh=1", "bool"),
        ("noise.fresh=yes", "bool"),
        ("noise.kind=3", "str"),
        ("noise.kind=None", "str"),
        ("eval.snr_db=3", "tuple"),
        ("eval.snr_db=None", "tuple"),
        ("model.r_wave_attention=0", "bool"),
    ],
)
def test_wrong_type_is_refused_with_the_expected_one(text, kind):
    key, _, value = text.partition("=")
    with pytest.raises(UserError) as caught:
        main.load_config("ralenet", [text])
    assert str(caught.value) == f"{key}={value!r} is not of the expected type {kind}"


@pytest.mark.parametrize(
    "value",
    [
        *("-" * 100_000 + "1", "1+" * 60_000 + "1", "(" * 100_000, "not " * 30_000 + "1", "9" * 400, "{[]: 1}", "\0"),
        *("0x1for 2", "'\\d'"),
    ],
)
def test_values_that_python_does_not_take_are_text(value):
    for key in ("noise.snr_db", "noise.snr_db_high"):
        with pytest.raises(UserError, match=f"^{key}=.{{1,200}} is not of the expected type float$"):
            main.load_config("ralenet", [f"{key}={value}"])


@pytest.mark.parametrize("name", ["x" * 5000, "\0", "../configs/ralenet", "__init__"])
def test_names_that_are_no_files_are_told_in_one_line(name):
    with pytest.raises(UserError, match=r"^no configuration [^\n]{1,300}$"):
        main.load_config(name)


def test_long_keys_are_cut():
    with pytest.raises(UserError, match=r"^unknown configuration key .{1,200}$"):
        main.load_config("ralenet", ["x" * 100_000 + "=1"])


def test_key_without_value_is_refused():
    with pytest.raises(UserError, match=r"'noise.kind' has no value; write --config.noise.kind=VALUE"):
        main.load_config("ralenet", ["noise.kind"])


def test_own_configuration_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import ralenet\n\n\ndef get_config():\n"
        "    config = ralenet.get_config()\n    config.noise.kind = 'em'\n    return config\n"
    )
    assert main.load_config(str(path), ["seed=3"]).noise.kind == "em"
    path.write_text(
        "import ml_collections as c\n\n\ndef get_config():\n    return c.ConfigDict({'a': 1, 'b': {'c': None}})\n"
    )
    assert main.load_config(str(path), ["a=2"]).is_locked


@pytest.mark.parametrize("name", ["honset", "nothing.py", "configs", ""])
def test_unknown_configuration_names_those_that_come_with_it(name, monkeypatch):
    monkeypatch.chdir(_CHECKOUT)  # "configs" is a folder here
    with pytest.raises(UserError, match=rf"no configuration '{name}'; .* demo, honest, ralenet"):
        main.load_config(name)


FAILING = {  # what the file holds, what is told
    "config = {}\n": r" has no get_config\(\); see",
    "def get_config():\n    pass\n": r" has a get_config\(\) that gives NoneType; see",
    "\n\nbw = = 1\n": ", line 3: SyntaxError: invalid syntax",
    "import json\n\njson.loads('{')\n": ", line 3: JSONDecodeError: Expecting property name",
    "import nothing_there\n": ", line 1: ModuleNotFoundError: No module named 'nothing_there'",
    "def get_config():\n    return {}['seed']\n": ", line 2: KeyError: 'seed'",
    "def get_config():\n  raise ValueError('two\\nlines')\n": ", line 2: ValueError: two; mend it",
    "\0": ": [A-Za-z]+: source code string cannot contain null bytes",
}


@pytest.mark.parametrize("text", FAILING)
def test_file_that_fails_is_one_line_with_the_place(tmp_path, capsys, text):
    (tmp_path / "mine.py").write_text(text)
    assert main.main([f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"]) == 2
    assert re.fullmatch(rf"ralenet: error: {tmp_path}/mine.py{FAILING[text]}[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_folder_of_a_configuration_s_name_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main.load_config("demo").protocol == "honest"


def test_train_gets_the_configuration_and_the_folder(called):
    argv = [
        "--mode=train",
        "--workdir",
        "w",
        "--config=honest",
        "--config.noise.kind=ma",
        "--data-dir",
        "d 'x",
        "--config.seed=3",
    ]
    assert main.main(argv) == 0
    ((what, config, workdir),) = called
    assert (what, workdir) == ("train", "w")
    assert (config.protocol, config.noise.kind, config.seed, config.data.dir) == ("honest", "ma", 3, "d 'x")
    assert main.main(["--workdir=w", "--data-dir=2024"]) == 0  # the mode that python -m ralenet_jax.main has
    assert called[1][0] == "train"
    assert (called[1][1].protocol, called[1][1].data.dir) == ("paper", "2024")


def test_evaluate_gets_the_run_s_own_configuration(called, tmp_path):
    trained = main.load_config("honest", ["noise.kind=em", "eval.snr_db=1.0,", "model.r_wave_attention=False"])
    checkpoint.claim(tmp_path, trained)
    assert main.main(["--mode=evaluate", f"--workdir={tmp_path}"]) == 0
    assert called[0] == ("evaluate", trained, str(tmp_path), "last", "test", None)
    options = ["--checkpoint=best", "--split=validation", "--records=wfdb", "--data-dir=elsewhere"]
    more = ["--config.eval.kinds=bw,ma", "--config.eval.snr_db=-4,0", "--config.noise.snr_db_high=6"]
    assert main.main(["--mode=evaluate", f"--workdir={tmp_path}", *options, *more]) == 0
    _, config, *rest = called[1]
    assert rest == [str(tmp_path), "best", "validation", "wfdb"]
    assert (config.data.dir, config.eval.kinds) == ("elsewhere", "bw,ma")
    assert (config.eval.snr_db, config.noise.snr_db_high, config.noise.kind) == ((-4, 0), 6.0, "em")
    assert config.model.r_wave_attention is False


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--config.eval.knids=bw", "the nearest known one is 'eval.kinds'"),
        ("--config.noise.snr_db_high=x", "not of the expected type float"),
        ("--config.eval.snr_db=3", "not of the expected type tuple"),
    ],
)
def test_evaluate_refuses_what_train_refuses(called, capsys, tmp_path, option, said):
    checkpoint.claim(tmp_path, ralenet.get_config())
    assert main.main(["--mode=evaluate", f"--workdir={tmp_path}", option]) == 2
    assert said in capsys.readouterr().err
    assert not called


def test_configuration_of_another_version_is_refused(called, capsys, tmp_path):
    checkpoint.claim(tmp_path, ralenet.get_config())
    path = tmp_path / "config.json"
    for change in ({"depth": 3}, {"seed": "x"}):
        path.write_text(json.dumps(json.loads(ralenet.get_config().to_json()) | change))
        assert main.main(["--mode=evaluate", f"--workdir={tmp_path}"]) == 2
        error = capsys.readouterr().err
        assert "not of this version" in error and error.count("\n") == 1
    assert not called


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--workdir=w", "--config=nothing"], "no configuration 'nothing'"),
        (["--workdir=w", "--config.sede=3"], "unknown configuration key 'sede'"),
        (["--workdir=w", "--config.seed=x"], "seed='x' is not of the expected type int"),
        (["--mode=evaluate", "--workdir=w/nothing"], "no run in w/nothing"),
        (["--workdir=w", "--data-dir=w/nothing"], "no prepared mitdb below w/nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ralenet: error: ") and said in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # and no trace of a run


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--workdir"),
        (["--workdir=w", "--confg=demo"], "unknown argument '--confg=demo'"),
        (["--workdir=w", "--config.noise.kind", "ma"], "unknown argument 'ma'"),
        (["--workdir=w", "--mode=test"], "invalid choice: 'test'"),
        (["--mode=evaluate", "--workdir=w", "--config=demo"], "unknown argument '--config=demo'"),
        (["--mode=evaluate", "--workdir=w", "--split=train"], "invalid choice: 'train'"),
        (["--workdir=w", "--checkpoint=best"], "unknown argument '--checkpoint=best'"),
    ],
)
def test_wrong_arguments_exit_with_2(argv, said, capsys, called):
    with pytest.raises(SystemExit) as stop:
        main.main(argv)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not called


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no shards; prepare them"), 2, "ralenet: error: no shards; prepare them"),
        (NonFiniteLoss("the loss is nan at step 7"), 1, "ralenet: stopped: the loss is nan at step 7"),
        (Interrupted(2, "stopped at step 9, saved"), 130, "ralenet: stopped at step 9, saved"),
        (Interrupted(15, "stopped at step 9, saved"), 143, "ralenet: stopped at step 9, saved"),
        (KeyboardInterrupt(), 130, "ralenet: interrupted"),
    ],
)
def test_how_a_run_ends_is_told_by_code_and_line(monkeypatch, capsys, error, code, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(main.train, "train", fail)
    assert main.main(["--workdir=w"]) == code
    assert capsys.readouterr().err == line + "\n"


def test_as_a_module():
    command = [
        sys.executable,
        "-m",
        "ralenet_jax.main",
        "--workdir=w",
        "--config=configs/ralenet.py",
        "--config.sede=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_CHECKOUT)
    assert done.returncode == 2
    assert done.stderr == "ralenet: error: unknown configuration key 'sede'; the nearest known one is 'seed'\n"
    assert done.stdout == ""
