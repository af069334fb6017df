"""``python -m benchmarks``: the commands there are, one line each."""

from __future__ import annotations

import ast
from pathlib import Path


def commands() -> dict[str, str]:
    """Name to the first line of its docstring; nothing is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lines = (ast.get_docstring(tree) or "").splitlines()
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = lines[0] if lines else ""
    return found


def main() -> None:
    for name, line in commands().items():
        print(f"python -m benchmarks.{name:12} {line}")


if __name__ == "__main__":
    main()
