"""What one Python file holds, read with `ast`: its functions, its docstrings, its imports. Open it to change what house.py counts."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class FunctionSize:
    """A function or method: where it is, its lines from `def` to its end, and its parameters without `self` and `cls`."""

    name: str
    line: int
    lines: int
    parameters: int


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a project.

    Attributes:
        module: its dotted name, as the project's own imports spell it.
        functions: all that are not exempt (Triton kernels and click callbacks are), nested ones included.
        documented, undocumented: (name, line) of public names with and without a docstring; the module itself is "module" on line 1.
        imports: (dotted module, name or "") of every import, also inside functions and under TYPE_CHECKING. Left out are the
            imports by which a package's `__getattr__` looks a name up when somebody asks for it, and their declarations for type checkers.
    """

    path: Path
    module: str
    lines: int
    functions: tuple[FunctionSize, ...]
    documented: tuple[tuple[str, int], ...]
    undocumented: tuple[tuple[str, int], ...]
    imports: frozenset[tuple[str, str]]


def read_source(path: Path, module: str) -> SourceFile:
    """Parse a file; SyntaxError and UnicodeDecodeError are the caller's."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(path))
    public = list(_public(tree, path.stem))
    return SourceFile(
        path=path,
        module=module,
        lines=len(text.splitlines()),
        functions=tuple(_size(node, method) for node, method in _functions(tree) if not _exempt(node)),
        documented=tuple((name, getattr(node, "lineno", 1)) for name, node in public if ast.get_docstring(node)),
        undocumented=tuple((name, getattr(node, "lineno", 1)) for name, node in public if not ast.get_docstring(node)),
        imports=frozenset(_imports(tree, module, path.name == "__init__.py")),
    )


def _functions(node: ast.AST, in_class: bool = False) -> Iterator[tuple[Function, bool]]:
    """Every function below a node, and whether it stands in a class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child, in_class
        yield from _functions(child, isinstance(child, ast.ClassDef) or (in_class and not isinstance(child, Function)))


def _size(node: Function, method: bool) -> FunctionSize:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    bound = method and bool(named) and "staticmethod" not in _decorators(node)
    count = len(named) - bound + len(arguments.kwonlyargs) + bool(arguments.vararg) + bool(arguments.kwarg)
    return FunctionSize(node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1, count)


def _decorators(node: Function) -> list[str]:
    """Dotted names of a function's decorators, without their arguments."""
    return [ast.unparse(item.func if isinstance(item, ast.Call) else item) for item in node.decorator_list]


def _exempt(node: Function) -> bool:
    """A Triton kernel takes its strides one by one, and a click callback its command's options."""
    return any(name == "triton.jit" or name.endswith(("command", "group")) for name in _decorators(node))


def _public(tree: ast.Module, stem: str) -> Iterator[tuple[str, ast.Module | ast.ClassDef | Function]]:
    """The module (unless empty), its classes and functions, and methods of public classes: all without a leading underscore."""
    if tree.body and (stem == "__init__" or not stem.startswith("_")):
        yield "module", tree
    yield from _public_below(tree.body, "")


def _public_below(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    for node in body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        # The getter documents a property, and the implementation documents its overloads.
        if isinstance(node, Function) and any(name.endswith((".setter", ".deleter", "overload")) for name in _decorators(node)):
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _public_below(node.body, f"{node.name}.")


def _imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, str]]:
    lazy = is_package and any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body)
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in _walk(tree, lazy):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield from ((".".join([*above, *([node.module] if node.module else [])]), alias.name) for alias in node.names)


def _walk(tree: ast.Module, lazy: bool) -> Iterator[ast.AST]:
    """All nodes; of a package that looks names up lazily, without `__getattr__` and the TYPE_CHECKING block that declares them."""
    for node in tree.body:
        lookup = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
        declared = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (lazy and (lookup or declared)):
            yield from ast.walk(node)
