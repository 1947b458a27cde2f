"""Which of torch's names a body of Python code uses, found without running it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

# name -> the keywords passed where it is called
Uses = dict[str, set[str]]
OWN = "torch.ops.normnorm"  # what the project itself registers with torch


def uses_of(sources: Iterable[str]) -> Uses:
    """The dotted names rooted at torch in these sources, under whatever alias they were imported.

    A call ``super().method(...)`` counts as a use of the method of each base class that is torch's
    (of the class itself for ``__init__``); a method called on anything else counts as Tensor's
    where Tensor has a method of that name.
    """
    found: Uses = defaultdict(set)
    for source in sources:
        _File(ast.parse(source), found)
    return {name: words for name, words in found.items() if not name.startswith(OWN)}


def package_uses(package: Path) -> Uses:
    """The same for every Python file under a folder, links followed."""
    folders = [package, *(p for p in package.iterdir() if p.is_symlink() and p.is_dir())]
    files = {f.resolve() for folder in folders for f in folder.rglob("*.py")}
    return uses_of(f.read_text(encoding="utf-8") for f in sorted(files))


class _File(ast.NodeVisitor):
    def __init__(self, tree: ast.Module, found: Uses) -> None:
        self.found = found
        self.aliases: dict[str, str] = {}
        self.bases: list[list[str]] = []  # torch's among the base classes, a list a nesting level
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._import(node)
            elif isinstance(node, ast.ImportFrom) and _is_torch(node.module):
                for name in node.names:
                    self.aliases[name.asname or name.name] = f"{node.module}.{name.name}"
                    self.found[f"{node.module}.{name.name}"]
        self.visit(tree)

    def _import(self, node: ast.Import) -> None:
        for name in node.names:
            if _is_torch(name.name):
                self.found[name.name]
                self.aliases[name.asname or "torch"] = name.name if name.asname else "torch"

    def _dotted(self, node: ast.expr) -> str | None:
        """torch's full name of an expression such as ``F.batch_norm``; None if it is not one."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._dotted(node.value)
            return f"{owner}.{node.attr}" if owner else None
        return None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        names = [self._dotted(base) for base in node.bases]
        self.bases.append([name for name in names if name])
        self.generic_visit(node)
        self.bases.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self._dotted(node)
        if name:
            self.found[name]
            return
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        keywords = {k.arg for k in node.keywords if k.arg}
        for name in self._callees(node.func):
            self.found[name] |= keywords
        self.generic_visit(node)

    def _callees(self, function: ast.expr) -> list[str]:
        name = self._dotted(function)
        if name:
            return [name]
        if not isinstance(function, ast.Attribute):
            return []
        if _is_super(function.value) and self.bases:
            method = "" if function.attr == "__init__" else f".{function.attr}"
            return [base + method for base in self.bases[-1]]
        if hasattr(torch.Tensor, function.attr) and not hasattr(object, function.attr):
            self.found[f"torch.Tensor.{function.attr}"]  # its keywords may be another class's
        return []


def _is_torch(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "torch"


def _is_super(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    )
