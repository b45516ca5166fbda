"""What a forward computes, as a hash of its syntax tree: the same in every Python that runs it.

A class is known by this, never by its name. So another version of it, or a copy with a change, is
not taken for what it was.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

_STRIPPED = {"annotation", "returns", "defaults", "kw_defaults", "type_comment", "type_params"}


def _plain(node: object) -> object:
    """The tree as tuples, without annotations, defaults and what Pythons write differently."""
    if isinstance(node, ast.AST):
        fields = [
            (name, _plain(value))
            for name, value in ast.iter_fields(node)
            if name not in _STRIPPED and name not in ("ctx", "kind") and value not in (None, [])
        ]
        return (type(node).__name__, *fields)
    if isinstance(node, list):
        return [_plain(n) for n in node]
    return node


def _definition(function: FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of the function, where its source is what runs."""
    try:
        source = textwrap.dedent(inspect.getsource(function.__code__))
        module = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return None
    definition = module.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    compiled = compile(module, "", "exec", dont_inherit=True).co_consts
    runs = _code(function.__code__)
    is_source = any(isinstance(c, CodeType) and _code(c) == runs for c in compiled)
    return definition if is_source else None


def _code(code: CodeType) -> tuple[object, ...]:
    """What a function names and says; its bytecode depends on the imports around it, too."""
    constants = tuple(c for c in code.co_consts if not isinstance(c, CodeType))
    return code.co_names, code.co_varnames, code.co_freevars, constants


@functools.cache
def tree_hash(function: Callable[..., Any]) -> str | None:
    """16 hex digits for what ``function`` computes; None where that can't be read.

    Its name, docstring, annotations and defaults don't count.
    """
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    definition = _definition(function)
    if definition is None:
        return None
    body = definition.body[ast.get_docstring(definition) is not None :]
    tree = (_plain(definition.args), _plain(definition.decorator_list), _plain(body))
    return hashlib.sha256(repr(tree).encode()).hexdigest()[:16]
