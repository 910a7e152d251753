"""Abstract or final: no class overrides a concrete method of another (docs/architecture.md).

The exceptions are hooks that do nothing by default, and Python's special methods but `__call__`.
"""

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod

from helpers.pages import Page

import adjoint
import applications
import benchmarks
import flows
from flows import Callback
from flows.training import Loss, SplitLoss

PACKAGES = (flows, adjoint, applications, benchmarks)
HOOKS = {
    Loss: {"follow", "before_update", "state_dict", "load_state_dict", "phase"},
    SplitLoss: {"host_step", "updates_without_host"},
    Callback: {"on_start", "on_step", "on_end"},
}
"""Methods that do nothing by default, and that a subclass may therefore override."""


def modules():
    for package in PACKAGES:
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.endswith("__main__"):
                continue
            try:
                yield importlib.import_module(info.name)
            except ModuleNotFoundError:  # of an optional package
                continue


def methods(cls):
    """The methods and properties that the class itself defines, by name."""
    kinds = (property, staticmethod, classmethod)
    return {n: m for n, m in vars(cls).items() if inspect.isfunction(m) or isinstance(m, kinds)}


def own(cls):
    return cls.__module__.split(".")[0] in {package.__name__ for package in PACKAGES}


def overrides(cls, ours=own):
    """Concrete methods of other classes of these packages that a class overrides."""
    return [
        f"{cls.__module__}.{cls.__name__}.{name} overrides {base.__name__}.{name}"
        for base in cls.__mro__[1:]
        if ours(base)
        for name, method in methods(base).items()
        if name in methods(cls)
        and (name == "__call__" or not name.startswith("__"))
        and name not in HOOKS.get(base, ())
        and not getattr(method, "__isabstractmethod__", False)
        and not getattr(base, "_is_protocol", False)
    ]


def classes():
    found = {
        cls
        for module in modules()
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__
    }
    return sorted(found, key=lambda cls: (cls.__module__, cls.__name__))


def test_no_concrete_method_is_overridden():
    every = classes()
    assert len(every) > 150
    assert [line for cls in every for line in overrides(cls)] == []


class Base(ABC):
    @abstractmethod
    def abstract(self):
        pass

    def concrete(self):
        return 1


class Good(Base):
    def abstract(self):
        pass


class Bad(Base):
    def abstract(self):
        pass

    def concrete(self):
        return 2


def test_an_override_is_found():
    ours = {Base, Good, Bad}.__contains__
    assert overrides(Good, ours) == []
    assert overrides(Bad, ours) == [f"{__name__}.Bad.concrete overrides Base.concrete"]


def test_the_page_names_the_exceptions():
    text = " ".join(Page("docs/architecture.md").text.split())
    assert "except the hooks of `Loss`, `SplitLoss` and `Callback`, which do nothing" in text
