"""Instrumentation rules: what objtool checks in the kernel (`tools/objtool`, validate_noinstr), checked here on the syntax tree.

A `@noinstr` function calls `@noinstr` functions, or does what it likes inside of `with instrumentation():`. Outside of such a window it may
read, write and compare, take part in exceptions, and nothing else: no call, no other context manager, no generator, no import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import softkvm.host

HOST = Path(softkvm.host.__file__).parent
# Cannot be instrumented: a constructor of plain data, a clock's register, nothing that runs Python code of ours or takes a lock.
HARMLESS = frozenset({"Call", "IrqState", "_now"})
FORBIDDEN = (ast.Yield, ast.YieldFrom, ast.Await, ast.Import, ast.ImportFrom, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp)


def called(call: ast.Call) -> str:
    """The name that is called, without what it is an attribute of."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else "?"


def is_window(node: ast.AST) -> bool:
    return isinstance(node, ast.With) and all(
        isinstance(item.context_expr, ast.Call) and called(item.context_expr) == "instrumentation" for item in node.items
    )


def is_noinstr(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(decorator, ast.Name) and decorator.id == "noinstr" for decorator in node.decorator_list
    )


def noinstr_functions(*trees: ast.AST) -> dict[str, ast.FunctionDef]:
    return {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and is_noinstr(node)}


def violations(body: list[ast.stmt], allowed: frozenset[str]) -> Iterator[str]:
    """What breaks the rules in these statements, outside of windows."""
    pending: list[ast.AST] = list(body)
    while pending:
        node = pending.pop(0)
        if is_window(node):
            continue
        if isinstance(node, ast.Call) and called(node) not in allowed:
            yield f"line {node.lineno}: calls {called(node)}"
        if isinstance(node, ast.With | ast.AsyncWith):
            yield f"line {node.lineno}: a context manager"
        if isinstance(node, FORBIDDEN):
            yield f"line {node.lineno}: {type(node).__name__}"
        pending += ast.iter_child_nodes(node)


def check(*sources: str) -> list[str]:
    """All violations in modules that may call each other's `@noinstr` functions."""
    functions = noinstr_functions(*(ast.parse(source) for source in sources))
    allowed = frozenset(functions) | HARMLESS
    return [f"{name}, {found}" for name, node in functions.items() for found in violations(node.body, allowed)]


def test_the_hosts_noinstr_code_is_not_instrumented() -> None:
    sources = [path.read_text() for path in sorted(HOST.rglob("*.py"))]
    assert check(*sources) == []


@pytest.mark.parametrize(
    "name",
    [
        "syscall",
        "enter_from_user_mode",
        "exit_to_user_mode",
        "user_exit_irqoff",
        "user_enter_irqoff",
        "irqentry_enter",
        "irqentry_exit",
        "run_guest",
        "lockdep_hardirqs_on",
        "lockdep_hardirqs_off",
    ],
)
def test_the_crossings_are_noinstr(name: str) -> None:
    assert name in noinstr_functions(*(ast.parse(path.read_text()) for path in sorted(HOST.rglob("*.py"))))


BAD = {
    "a trace": "trace(1)",
    "a log": "log.info('x')",
    "a lock": "with lock: pass",
    "a call behind a window": "with instrumentation(): fine()\n    not_fine()",
    "a call in an argument": "good(bad())",
    "a lambda": "x = lambda: 1",
    "a generator": "yield",
    "an import": "import os",
    "a window shared with a lock": "with instrumentation(), lock: pass",
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_the_checker_finds(body: str) -> None:
    assert check(f"@noinstr\ndef good(x): return x\n@noinstr\ndef f():\n    {body}\n")


@pytest.mark.parametrize(
    "body", ["good(1)", "with instrumentation(): anything(you, like)", "x.y = x.z", "try:\n        good(1)\n    finally:\n        pass"]
)
def test_the_checker_lets_pass(body: str) -> None:
    assert check(f"@noinstr\ndef good(x): return x\n@noinstr\ndef f():\n    {body}\n") == []
