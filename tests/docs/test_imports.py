"""Imports run one way: between packages, between the rooms of the RL application, and files.

Every import counts, also one inside a function or under ``TYPE_CHECKING``.  An import of a name
from a facade (``from flows import Trainer``) is an import of the file ``flows/__init__.py``, except
inside the facade's own package, whose files import from each other.
"""

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("flows", "adjoint", "applications", "benchmarks")
"""Each package imports itself and the packages before it; nothing imports benchmarks."""
ROOMS = ("environments", "data", "agents", "evaluation", "training", "report", "sweep")
"""The rooms of applications/rl, each of which imports itself and the rooms before it."""


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports(module, tree, known):
    """The files among ``known`` that the file ``module`` imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & set(known)
            if not submodules <= set(known):
                found.add(node.module)
    return found & set(known) - {module}


GRAPH = {name: imports(name, ast.parse(path.read_text()), FILES) for name, path in FILES.items()}


def circle(graph):
    """A circle of imports as a list of files, empty if there is none."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        for other in sorted(graph[name]):
            if found := visit(other):
                return found
        done.add(path.pop())
        return []

    return next((found for name in sorted(graph) if (found := visit(name))), [])


def wrong_way(graph, groups, group_of):
    """Pairs of files whose import runs from a group to a later one in ``groups``."""
    place = {name: groups.index(group_of(name)) for name in graph if group_of(name) in groups}
    return sorted(
        f"{name} imports {other}"
        for name in place
        for other in graph[name] & set(place)
        if place[other] > place[name]
    )


def room_of(name):
    parts = name.split(".")
    return parts[2] if parts[:2] == ["applications", "rl"] and len(parts) > 2 else None


FACADES = ("flows", "flows.training", "adjoint", "applications.rl")


def past_a_facade(module, tree):
    """Names that a file imports from another file than the facade that exports them."""
    return sorted(
        f"{module} imports {alias.name} from {node.module}"
        for node in ast.walk(tree)
        for facade in FACADES
        if isinstance(node, ast.ImportFrom)
        and str(node.module).startswith(f"{facade}.")
        and node.module not in FACADES
        and not f"{module}.".startswith(f"{facade}.")
        for alias in node.names
        if alias.name in import_module(facade).__all__
    )


def test_applications_and_benchmarks_import_through_the_facades():
    users = {n: p for n, p in FILES.items() if n.split(".")[0] in ("applications", "benchmarks")}
    found = {name: past_a_facade(name, ast.parse(path.read_text())) for name, path in users.items()}
    assert {name: imports for name, imports in found.items() if imports} == {}


def test_an_import_past_a_facade_is_found():
    tree = ast.parse("from flows.grid import uniform, private\nfrom flows.training import Trainer")
    assert past_a_facade("benchmarks.x", tree) == ["benchmarks.x imports uniform from flows.grid"]
    assert past_a_facade("flows.x", tree) == []


def test_no_circle_between_files():
    assert circle(GRAPH) == []


def test_packages_import_one_way():
    assert wrong_way(GRAPH, PACKAGES, lambda name: name.split(".")[0]) == []


def test_rooms_of_the_rl_application_import_one_way():
    assert all((ROOT / "applications" / "rl" / room).is_dir() for room in ROOMS)
    assert wrong_way(GRAPH, ROOMS, room_of) == []


@pytest.mark.parametrize(
    "source", ["import a.c", "from a import c", "from a.c import x", "def f():\n    import a.c"]
)
def test_a_circle_is_found(source):
    known = ("a", "a.b", "a.c")
    one, other = (
        imports(name, ast.parse(text), known) for name, text in (("a.b", source), ("a.c", ""))
    )
    assert circle({"a": set(), "a.b": one, "a.c": other}) == []
    back = imports("a.c", ast.parse("if TYPE_CHECKING:\n    from a.b import y"), known)
    assert set(circle({"a": set(), "a.b": one, "a.c": back})) == {"a.b", "a.c"}
    assert wrong_way({"a.b": {"c.d"}, "c.d": set()}, ("a", "c"), lambda name: name[0]) == [
        "a.b imports c.d"
    ]
