"""Counts of what makes code hard to change, of any commit: `git` and `ast` alone, nothing is imported or run.

python tests/census.py            # the working tree's commit
python tests/census.py v0.1 HEAD  # a column a commit
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("smi", "smi_kernels")
LONG_FUNCTION, LONG_FILE = 50, 300  # lines
WIDE_FUNCTION = 7  # parameters
CACHES = {"cache", "lru_cache"}
Tree = dict[str, str]


def files_of(commit: str) -> Tree:
    """Path to content of every text file of a commit."""
    listed = _git("ls-tree", "-r", "--name-only", "-z", commit).decode().split("\0")
    kept = [path for path in listed if path.endswith((".py", ".json", ".jsonl"))]
    ask = "".join(f"{commit}:{path}\n" for path in kept).encode()
    out, tree = _git("cat-file", "--batch", input=ask), {}
    at = 0
    for path in kept:
        end = out.index(b"\n", at)
        size = int(out[at:end].split()[2])
        tree[path] = out[end + 1 : end + 1 + size].decode()
        at = end + 2 + size
    return tree


def census(tree: Mapping[str, str]) -> dict[str, int]:
    """What is counted, by name."""
    code = {path: ast.parse(text) for path, text in tree.items() if path.endswith(".py")}
    ours = {path: parsed for path, parsed in code.items() if path.split("/")[0] in PACKAGES}
    functions = [node for parsed in ours.values() for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef)]
    found = {f"rooms at the top of {package}": len(rooms(tree, package)) for package in PACKAGES}
    return found | {
        "context variables": sum(_calls(parsed, "ContextVar") for parsed in ours.values()),
        "functions that cache for the process": sum(_is_cached(node) for node in functions),
        f"functions over {LONG_FUNCTION} lines": sum(_lines(node) > LONG_FUNCTION for node in functions),
        f"functions over {WIDE_FUNCTION} parameters": sum(_parameters(node) > WIDE_FUNCTION for node in functions),
        f"files over {LONG_FILE} lines": sum(tree[path].count("\n") > LONG_FILE for path in ours),
        "modules in import circles": sum(len(circle) for circle in circles(ours)),
        "lines of code": sum(tree[path].count("\n") for path in ours),
        "lines of tests": sum(tree[path].count("\n") for path in code if path.startswith("tests/")),
        "lines of JSON": sum(text.count("\n") for path, text in tree.items() if not path.endswith(".py")),
    }


def rooms(tree: Mapping[str, str], package: str) -> set[str]:
    """Modules and packages directly in a package."""
    inside = [PurePosixPath(path).parts[1:] for path in tree if path.endswith(".py") and path.startswith(package + "/")]
    return {parts[0].removesuffix(".py") for parts in inside} - {"__init__", "__main__"}


def circles(parsed: Mapping[str, ast.Module]) -> list[set[str]]:
    """Sets of modules each of which needs all others when it is imported. Imports in functions do not count."""
    modules = {_module(path): node for path, node in parsed.items()}
    needs = {name: set(_imports(node, modules)) - {name} for name, node in modules.items()}
    reach = {name: _reachable(name, needs) for name in needs}
    left, found = set(needs), []
    while left:
        name = left.pop()
        circle = {other for other in reach[name] if name in reach[other]} | {name}
        left -= circle
        if len(circle) > 1:
            found.append(circle)
    return found


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _reachable(start: str, needs: Mapping[str, set[str]]) -> set[str]:
    seen, todo = set[str](), [start]
    while todo:
        for other in needs[todo.pop()] - seen:
            seen.add(other)
            todo.append(other)
    return seen


def _imports(module: ast.Module, ours: Mapping[str, ast.Module]) -> Iterator[str]:
    """Which of our modules a module needs when it is imported. A module of a package needs no more of the package."""
    for node in _outside_functions(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in ours)
        elif isinstance(node, ast.ImportFrom) and node.module in ours:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in ours else node.module for name in names)


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _outside_functions(child)


def _calls(parsed: ast.Module, name: str) -> int:
    return sum(isinstance(node, ast.Call) and _name(node.func) == name for node in ast.walk(parsed))


def _is_cached(node: ast.FunctionDef) -> bool:
    return any(_name(d.func if isinstance(d, ast.Call) else d) in CACHES for d in node.decorator_list)


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return (
        node.value.id
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
        else getattr(node, "id", "")
    )


def _lines(node: ast.FunctionDef) -> int:
    """Of a function, its docstring left out."""
    last = node.end_lineno or node.lineno
    text = node.body[0] if ast.get_docstring(node) is not None else None
    return last - node.lineno + 1 - (0 if text is None else (text.end_lineno or 0) - text.lineno + 1)


def _parameters(node: ast.FunctionDef) -> int:
    return len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)


def _git(*arguments: str, input: bytes | None = None) -> bytes:
    return subprocess.run(["git", "-C", ROOT, *arguments], input=input, stdout=subprocess.PIPE, check=True).stdout


def main(commits: list[str]) -> None:
    """Print a table with a column a commit."""
    columns = [census(files_of(commit)) for commit in commits]
    width = max(map(len, columns[0]))
    print(" " * width, *(f"{commit[:12]:>12}" for commit in commits))
    for name in columns[0]:
        print(f"{name:<{width}}", *(f"{column[name]:>12}" for column in columns))


if __name__ == "__main__":
    main(sys.argv[1:] or ["HEAD"])
