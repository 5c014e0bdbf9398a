"""Who may import whom: the table in docs/architecture.md against the imports in the source."""

import ast
import fnmatch
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGES = ("ralenet_jax", "configs", "data_prep")
FILES = {  # dotted name, packages without `.__init__` → file
    ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((CHECKOUT / package).rglob("*.py"))
}
ONLY_IN = {  # who may import a library
    "flax": ("ralenet_jax.models*", "ralenet_jax.state", "ralenet_jax.export", "ralenet_jax.torch_weights"),
    "grain": ("ralenet_jax.input_pipeline",),
    "orbax": ("ralenet_jax.checkpoint", "ralenet_jax.hosts"),
    "tensorflow": (),
    "torch": (),
}


def dotted(name: str) -> str:
    """A name of the table as a dotted one: `models/ralenet` → `ralenet_jax.models.ralenet`."""
    name = name.replace("/", ".")
    name = name if name.partition(".")[0] in PACKAGES else f"ralenet_jax.{name}"
    return name.removesuffix(".__init__")


def read_table(text: str) -> dict[str, set[str]]:
    (block,) = re.findall(r"^```imports\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rules = dict(line.split(" → ") for line in block.splitlines())
    return {dotted(module): {dotted(name) for name in names.split(", ")} for module, names in rules.items()}


TABLE = read_table((CHECKOUT / "docs/architecture.md").read_text(encoding="utf-8"))


def imported(tree: ast.AST, modules=FILES) -> set[str]:
    """Dotted names a module imports; strings that are a module's full name count (lazy imports)."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import; write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules or whole == "ralenet_jax.__version__" else node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            found |= {node.value} & set(modules)
    return found


def allowed(module: str, target: str, table=TABLE) -> bool:
    package, _, _ = module.partition(".")
    if target in ("ralenet_jax.errors", "ralenet_jax.__version__"):
        return package == "ralenet_jax"
    if package == target.partition(".")[0] == "configs":
        return True
    rights = [right for left, names in table.items() if fnmatch.fnmatch(module, left) for right in names]
    return any(fnmatch.fnmatch(target, right) for right in rights)


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_table(module):
    names = imported(ast.parse(FILES[module].read_text(encoding="utf-8"))) - {module}
    ours = {name for name in names if name.partition(".")[0] in PACKAGES}
    wrong = sorted(name for name in ours if not allowed(module, name))
    assert not wrong, f"{module} imports {wrong}; docs/architecture.md allows {sorted(TABLE.get(module, ()))}"


@pytest.mark.parametrize("module", FILES)
def test_libraries_stay_in_their_rooms(module):
    names = {name.partition(".")[0] for name in imported(ast.parse(FILES[module].read_text(encoding="utf-8")))}
    for library, rooms in ONLY_IN.items():
        if not any(fnmatch.fnmatch(module, room) for room in rooms):
            assert library not in names, f"{module} imports {library}, which belongs to {rooms or 'nobody'}"


@pytest.mark.parametrize("module", sorted(FILES.keys() - {"ralenet_jax.steps"}))
def test_the_only_pmap_stands_in_steps(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "pmap"]


def test_the_table_goes_downwards_only():
    remaining = {left: {right for right in rights if right in TABLE} for left, rights in TABLE.items()}
    while remaining:
        free = [left for left, rights in remaining.items() if not rights & remaining.keys()]
        assert free, f"a circle among {sorted(remaining)}"
        for left in free:
            del remaining[left]


def test_the_rules_see_what_they_should():
    code = """
import flax.linen as nn
from ralenet_jax import __version__, noise
from ralenet_jax.state import create
from data_prep import physionet
def main():
    import optax
    return importlib.import_module("ralenet_jax.train"), "ralenet_jax.train is a sentence", "configs"
"""
    modules = {f"ralenet_jax.{name}" for name in ("noise", "state", "train")} | {"data_prep.physionet", "configs"}
    ours = {"ralenet_jax.__version__", "ralenet_jax.noise", "ralenet_jax.state", "ralenet_jax.train"}
    assert imported(ast.parse(code), modules) == ours | {"flax.linen", "data_prep.physionet", "optax"}
    table = read_table("```imports\ntrain → steps, data_prep.prepare\nmodels/* → models/batch_norm\n```\n")
    assert allowed("ralenet_jax.train", "ralenet_jax.steps", table)
    assert allowed("ralenet_jax.train", "data_prep.prepare", table)
    assert allowed("ralenet_jax.models.unet", "ralenet_jax.models.batch_norm", table)
    assert allowed("ralenet_jax.steps", "ralenet_jax.errors", table)
    assert not allowed("ralenet_jax.steps", "ralenet_jax.train", table)
    assert not allowed("ralenet_jax.models.unet", "ralenet_jax.noise", table)
    assert not allowed("data_prep.windows", "ralenet_jax.errors", table)
    assert not allowed("configs.demo", "data_prep.simulate", table)
    assert not allowed("ralenet_jax.train", "ralenet_jax", table)
    with pytest.raises(AssertionError, match="relative"):
        imported(ast.parse("from . import noise"))
