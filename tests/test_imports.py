"""Imports run one way, from the commands down to files and errors, and never in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the top down; a module may import from its own layer and from those below it.
LAYERS = (
    ("segdeformer.cli", "segdeformer.__main__"),
    ("segdeformer", "segdeformer.api", "segdeformer.protocols"),
    ("segdeformer.ablation", "segdeformer.measure", "segdeformer.report"),
    ("segdeformer.training",),
    ("segdeformer.inference",),
    ("segdeformer.weights",),
    ("segdeformer.models",),
    ("segdeformer.data",),
    ("segdeformer.runtime",),
    ("segdeformer.kernels",),
    ("segdeformer.paper",),
    ("segdeformer.config",),
    ("segdeformer.plugins", "segdeformer.refusals"),
    (
        "segdeformer.errors",
        "segdeformer.files",
        "segdeformer.commit",
        "segdeformer.cores",
        "segdeformer.version",
    ),
)


def modules() -> dict[str, Path]:
    """The package's modules by name; kernels and cli lie at the top and are linked into it."""
    found = {}
    for folder, prefix in (("segdeformer", ""), ("kernels", "segdeformer."), ("cli", "segdeformer.")):
        for path in (ROOT / folder).rglob("*.py"):
            if not any(parent.is_symlink() for parent in path.parents):
                name = prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> Iterator[str]:
    """What a module imports, in functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [full if full in MODULES else str(node.module) for full in inside]
        else:
            continue
        yield from (found for found in names if found in MODULES and found != name)


GRAPH = {name: sorted(set(imports(name, path))) for name, path in sorted(MODULES.items())}


def layer(name: str) -> int:
    """The index of the layer whose prefix is the longest."""
    fitting = [
        (len(prefix), index)
        for index, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if name == prefix or (name.startswith(f"{prefix}.") and prefix != "segdeformer")
    ]
    assert fitting, f"{name} has no layer"
    return max(fitting)[1]


def test_no_module_imports_from_a_layer_above_it():
    upward = [f"{name} -> {found}" for name in GRAPH for found in GRAPH[name] if layer(found) < layer(name)]
    assert upward == []


def test_no_imports_go_in_a_circle():
    done: set[str] = set()
    circles = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            circles.append(" -> ".join((*trail[trail.index(name) :], name)))
        elif name not in done:
            for found in GRAPH[name]:
                visit(found, (*trail, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())
    assert circles == []
