"""Every public name has an example in its docstring, and each does what it says."""

from __future__ import annotations

import doctest
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import fastadapters
from fastadapters import functional

pytestmark = pytest.mark.usefixtures("seeded_on_one_thread")


def public() -> Iterator[Any]:
    """What `fastadapters` and `functional` export, with the methods that a class has of its own."""
    for module in (fastadapters, functional):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value):
                continue
            yield pytest.param(value, id=name)
            if inspect.isclass(value):
                for method in ("from_module", "from_modules", "logits"):
                    if hasattr(value, method):
                        yield pytest.param(getattr(value, method), id=f"{name}.{method}")


@pytest.mark.parametrize("value", list(public()))
def test_example(value: Any) -> None:
    scope = vars(sys.modules[value.__module__])
    (test,) = doctest.DocTestFinder(recurse=False).find(value, value.__qualname__, globs=scope)
    assert test.examples, "no example"
    results = doctest.DocTestRunner(verbose=False).run(test)
    assert results.failed == 0
