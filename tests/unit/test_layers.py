"""The layers: which part of imrelay may import which, and which part may know the libraries.

A part is what stands directly below the package: a module, or a folder with all that is in it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import imrelay

#: From the ground up; of two parts of one layer, either may import the other unless both are `INDEPENDENT`.
LAYERS = (
    {"imrelay", "imrelay.errors"},
    {"imrelay.settings", "imrelay.messages"},
    {"imrelay.runtime"},
    {"imrelay.broker", "imrelay.websocket", "imrelay.private_node"},
    {"imrelay.sessions"},
    {"imrelay.app", "imrelay.descriptors"},
    {"imrelay.server", "imrelay.hosting"},
    {"imrelay.cli", "imrelay.__main__", "imrelay.wsgi"},
)
#: Each of these stands alone beside the others.
INDEPENDENT = LAYERS[3]
GROUND = "imrelay.errors"
VALUES = LAYERS[1]
ENTRY_POINTS = LAYERS[-1]

#: Library -> the parts that may import it.
LIBRARIES = {
    "pika": {"imrelay.broker", "imrelay.private_node"},
    "geventwebsocket": {"imrelay.websocket", "imrelay.hosting", "imrelay.wsgi", "imrelay.server"},
    "flask": {"imrelay.app"},
    "werkzeug": {"imrelay.app"},
    "gunicorn": set(),
    # the latter only asks it for what was not patched
    "gevent.monkey": ENTRY_POINTS | {"imrelay.runtime"},
}
#: What no value may import: it waits, has a handle on something outside, or reads a clock.
OUTSIDE = {
    "asyncio", "concurrent", "datetime", "flask", "gevent", "geventwebsocket", "greenlet", "http", "pika",
    "select", "selectors", "signal", "socket", "ssl", "subprocess", "threading", "websockets", "werkzeug",
}  # fmt: skip

ROOT = Path(imrelay.__file__).parent


def imports_of(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Return the dotted names of all that a module's source imports, wherever in it that stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def part_of(name: str) -> str | None:
    """Return the part of imrelay to which a dotted name belongs; None for one that is in no layer."""
    part = ".".join(name.split(".")[:2])
    return part if any(part in layer for layer in LAYERS) else None


def _is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def layer_of(part: str) -> int:
    """Return the number of a part's layer."""
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def may_import(importer: str, imported: str) -> bool:
    """Tell whether a module may import another one of imrelay: from a layer below, or along its own."""
    upper, lower = part_of(importer), part_of(imported)
    if lower is None and imported.count(".") == 1 and not _is_module(imported):
        lower = "imrelay"  # `from imrelay import __version__`: a name of the package itself
    if upper is None or lower is None:
        return False
    if upper != lower and {upper, lower} <= INDEPENDENT:
        return False
    return layer_of(lower) <= layer_of(upper)


def is_part(name: str, package: str) -> bool:
    """Tell whether a dotted name is a package or something in it."""
    return name == package or name.startswith(package + ".")


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(_modules())
IMPORTS = {
    name: imports_of(path.read_text(encoding="utf-8"), name, is_package=path.name == "__init__.py")
    for name, path in MODULES.items()
}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_in_a_layer(module: str) -> None:
    """A new module needs a place in a layer."""
    assert part_of(module) is not None, f"{module} is on no layer"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_or_along_the_layer(module: str) -> None:
    """No module imports from a layer above, and no independent part imports another one."""
    wrong = {name for name in IMPORTS[module] if is_part(name, "imrelay") and not may_import(module, name)}
    assert not wrong, f"{module} may not import {sorted(wrong)}"


def test_nothing_goes_round_in_circles() -> None:
    """Along a layer, too, the imports have an order: no module imports itself by way of others."""
    graph = {
        module: {other for other in MODULES if other != module and any(is_part(name, other) for name in names)}
        for module, names in IMPORTS.items()
    }
    for others in graph.values():
        others.discard("imrelay")
    for package in INDEPENDENT:  # a package's __init__ names its modules; they name each other
        assert not [name for name, names in IMPORTS.items() if is_part(name, package + ".") and package in names]
        for module in graph:
            if is_part(module, package):
                graph[module].discard(package)
    while free := {module for module, others in graph.items() if not others & graph.keys()}:
        for module in free:
            del graph[module]
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_is_imported_by_its_parts_alone(library: str) -> None:
    """Only what speaks AMQP imports pika, only app.py Flask, only entry points patch."""
    wrong = {
        module
        for module, names in IMPORTS.items()
        if any(is_part(name, library) for name in names) and part_of(module) not in LIBRARIES[library]
    }
    assert not wrong, f"{sorted(wrong)} may not import {library}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if part_of(name) in VALUES))
def test_values_are_pure(module: str) -> None:
    """A value has no socket, no greenlet and no clock but one passed in."""
    wrong = {name for name in IMPORTS[module] if name.split(".")[0] in OUTSIDE}
    assert not wrong, f"{module} may not import {sorted(wrong)}"
    assert not clocks_of(MODULES[module].read_text(encoding="utf-8")), f"{module} reads a clock of its own"


def clocks_of(source: str) -> set[str]:
    """Return what a source uses of `time` but `gmtime`, which only converts the time that it is given."""
    used = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
    }
    used |= {name.removeprefix("time.") for name in imports_of(source, "x") if name.startswith("time.")}
    return used - {"gmtime"}


def test_errors_import_nothing() -> None:
    """errors.py is the lowest layer."""
    assert {name for name in IMPORTS[GROUND] if not name.startswith("__future__.")} == set()


@pytest.mark.parametrize("module", ["imrelay.cli", "imrelay.wsgi"])
def test_an_entry_point_patches_before_it_imports_anything_else(module: str) -> None:
    """What is imported before `monkey.patch_all()` would keep the blocking socket."""
    seen = []
    for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            seen.append(ast.unparse(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            seen.append(ast.unparse(node.value))
    assert seen[:2] == ["from gevent import monkey", "monkey.patch_all()"]


def test_nothing_is_imported_by_its_name_at_run_time() -> None:
    """`importlib.import_module` and `__import__` would go past this test."""
    for module, names in IMPORTS.items():
        hidden = {
            name for name in names if is_part(name, "importlib") and not is_part(name, "importlib.resources")
        }
        assert not hidden, f"{module} imports {sorted(hidden)}"
        calls = ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        assert not [node for node in calls if isinstance(node, ast.Name) and node.id == "__import__"], module


@pytest.mark.parametrize(
    ("line", "module", "is_package", "name"),
    [
        ("import imrelay.app", "imrelay.errors", False, "imrelay.app"),
        ("import imrelay.app as app", "imrelay.errors", False, "imrelay.app"),
        ("from imrelay import app", "imrelay.errors", False, "imrelay.app"),
        ("from .app import create_app", "imrelay.errors", False, "imrelay.app.create_app"),
        ("from . import app", "imrelay.errors", False, "imrelay.app"),
        ("from ..app import create_app", "imrelay.broker.channel", False, "imrelay.app.create_app"),
        ("from ..app import create_app", "imrelay.broker", True, "imrelay.app.create_app"),
        ("def f():\n    import imrelay.app", "imrelay.errors", False, "imrelay.app"),
        ("if TYPE_CHECKING:\n    from imrelay.app import page", "imrelay.errors", False, "imrelay.app.page"),
    ],
)
def test_every_spelling_of_an_import_is_read(line: str, module: str, is_package: bool, name: str) -> None:
    """An import counts however and wherever it is written."""
    assert imports_of(line, module, is_package=is_package) == {name}
    assert not may_import(module, name)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("imrelay.app", "imrelay.sessions.session.Session", True),
        ("imrelay.sessions.session", "imrelay.sessions.registry", True),
        ("imrelay.cli", "imrelay.__version__", True),
        ("imrelay.sessions.session", "imrelay.app", False),
        ("imrelay.broker.channel", "imrelay.broker.connection", True),
        ("imrelay.broker.channel", "imrelay.websocket.frames", False),
        ("imrelay.websocket", "imrelay.broker", False),
        ("imrelay.settings.reading", "imrelay.settings.values", True),
        ("imrelay.settings.values", "imrelay.broker.topology", False),
        ("imrelay.errors", "imrelay.settings.values", False),
        ("imrelay.nowhere", "imrelay.errors", False),
    ],
)
def test_the_rule_of_the_layers(importer: str, imported: str, allowed: bool) -> None:
    """The rule itself: down and along is allowed; up, between independent parts and from nowhere is not."""
    assert may_import(importer, imported) is allowed


#: Base classes that can be subscripted when the oldest supported Python, 3.10, imports the module.
SUBSCRIPTABLE = {"Generic", "Protocol", "defaultdict", "deque", "dict", "frozenset", "list", "set", "tuple"}


def subscripted_bases(source: str) -> set[str]:
    """Return the base classes that a source subscripts, which no checker of types holds against it."""
    bases = [base for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) for base in node.bases]
    return {ast.unparse(base.value).rpartition(".")[2] for base in bases if isinstance(base, ast.Subscript)}


@pytest.mark.parametrize("module", MODULES)
def test_base_classes_can_be_made_by_the_oldest_python(module: str) -> None:
    """`logging.LoggerAdapter[…]` as a base is right for mypy and an exception at import before Python 3.11."""
    assert subscripted_bases(MODULES[module].read_text(encoding="utf-8")) <= SUBSCRIPTABLE


def test_a_subscripted_base_is_seen() -> None:
    """The reader of base classes finds them, with the module before the name or without."""
    assert subscripted_bases("class A(logging.LoggerAdapter[Logger], B[int], C): ...") == {"LoggerAdapter", "B"}


def test_a_clock_is_seen() -> None:
    """The reader of clocks sees those that read the time, and no conversion."""
    assert clocks_of("import time\nprint(time.monotonic(), time.gmtime)") == {"monotonic"}
    assert clocks_of("from time import time") == {"time"}
