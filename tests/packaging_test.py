"""What a stranger meets: the README's commands and table, the packages and what they depend on, the version."""

import ast
import configparser
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

import ralenet_jax
from configs import ralenet as default_config

CHECKOUT = Path(__file__).parents[1]
PACKAGES = ("ralenet_jax", "configs", "data_prep")
SETUP = configparser.ConfigParser()
SETUP.read(CHECKOUT / "setup.cfg", encoding="utf-8")
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def requirements(text: str) -> set[str]:
    """Names of distributions, as `packages_distributions` spells them, lower case, with `-` for `_`."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    names = {re.split(r"[<>=;\[ ]", line)[0] for line in lines if line}
    return {name.lower().replace("_", "-") for name in names}


def imported_distributions() -> set[str]:
    distributions = importlib.metadata.packages_distributions()
    found = set()
    for path in (path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0] for name in names}
    found -= set(sys.stdlib_module_names) | set(PACKAGES)
    # A namespace package belongs to several distributions; ours is the one we declare.
    return {
        "orbax-checkpoint" if name == "orbax" else distributions[name][0].lower().replace("_", "-") for name in found
    }


def test_every_import_is_declared_and_every_dependency_is_used():
    declared = requirements(SETUP["options"]["install_requires"])
    extras = requirements("\n".join(SETUP["options.extras_require"].values()))
    imported = imported_distributions()
    assert imported - declared - extras == set()
    # TFDS imports two of these without asking for them, jax.export the third.
    assert declared - imported == {"array-record", "importlib-resources", "flatbuffers"}


def test_every_dependency_has_a_lower_bound_only():
    lines = SETUP["options"]["install_requires"] + "\n".join(SETUP["options.extras_require"].values())
    for line in (line.strip() for line in lines.splitlines()):
        assert not line or line.startswith(("#", "ralenet_jax[")) or re.fullmatch(r"[\w-]+>=[\d.]+", line), line


def test_every_folder_with_modules_is_a_package_in_the_wheel():
    assert SETUP["options.packages.find"]["include"].split() == [f"{name}*" for name in PACKAGES]
    folders = {path.parent for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py")}
    assert CHECKOUT / "ralenet_jax/models" in folders
    assert [folder.name for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_version_stands_in_one_place():
    assert SETUP["metadata"]["version"] == "attr: ralenet_jax.__version__"
    assert "project" not in tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    assert re.search(
        rf"^## {re.escape(ralenet_jax.__version__)}\b", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_the_command_is_declared():
    assert SETUP["options.entry_points"]["console_scripts"].split() == ["ralenet", "=", "ralenet_jax.cli:main"]


def test_the_readme_begins_with_demo_and_tests():
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert blocks[0] == 'pip install ".[demo]"\nralenet demo\n'
    assert blocks[1] == 'pip install ".[test]"\npytest\n'


def flat(config, prefix=""):
    """Keys with dots and the text of their defaults."""
    for key in config:
        value = config[key]
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, '""' if value == "" else str(value)


def test_the_readme_tells_every_configuration_key_and_its_default():
    section = README.partition("\n## Configuration\n")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", section, re.MULTILINE))
    assert told == dict(flat(default_config.get_config()))


def test_links_in_the_documents_lead_somewhere():
    for document in (CHECKOUT / "README.md", CHECKOUT / "docs/architecture.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (document.parent / link).is_file(), f"{document.name}: {link}"


@pytest.mark.parametrize("name", ["CITATION.cff", "README.md"])
def test_the_paper_is_cited(name):
    assert "10.1109/IJCNN60899.2024.10650979" in (CHECKOUT / name).read_text(encoding="utf-8")
