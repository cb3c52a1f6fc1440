"""Count lines of code, docstrings, comments and blanks of a folder of Python files.

Usage
-----
::

    python tools/count_lines.py                 # the package rankkv/
    python tools/count_lines.py --path DIR      # any folder

A line counts once: as docstring if a docstring covers it, else as code if a token stands on it, else as comment or
blank.  ``end-of-line comments`` are lines of code that carry a comment too.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "rankkv"
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


def count_lines(source: str) -> Counter[str]:
    r"""Count the lines of one source text by kind.

    Parameters
    ----------
    source : str
        Python code.

    Returns
    -------
    Counter
        ``total``, ``code``, ``docstring``, ``comment``, ``blank`` and ``end-of-line comments``.

    Examples
    --------
    >>> counts = count_lines('"Add."\n\n# why\nx = 1  # one\n')
    >>> counts["code"], counts["docstring"], counts["comment"], counts["blank"]
    (1, 1, 1, 1)
    """
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            value = first.value if isinstance(first, ast.Expr) else None
            if first and isinstance(value, ast.Constant) and isinstance(value.value, str):
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in _NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    code -= docstrings
    total = len(source.splitlines())
    alone = comments - code - docstrings
    return Counter(
        {
            "total": total,
            "code": len(code),
            "docstring": len(docstrings),
            "comment": len(alone),
            "blank": total - len(code) - len(docstrings) - len(alone),
            "end-of-line comments": len(comments & code),
        }
    )


def main() -> None:
    """Print a table: one row per package, and their sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, default=PACKAGE, help="folder, default rankkv/")
    root = parser.parse_args().path
    rows: dict[str, Counter[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        row = rows.setdefault(f"{parts[0]}/" if len(parts) > 1 else "(top)", Counter())
        row.update(count_lines(path.read_text(encoding="utf-8")), files=1)
    rows["all"] = sum(rows.values(), Counter())
    kinds = ("files", "total", "code", "docstring", "comment", "blank", "end-of-line comments")
    print(f"{'':16}" + "".join(f"{kind:>{max(10, len(kind) + 2)}}" for kind in kinds))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{row[kind]:>{max(10, len(kind) + 2)},}" for kind in kinds))
    whole = rows["all"]
    shares = ", ".join(f"{kind} {whole[kind] / whole['total']:.1%}" for kind in kinds[2:6] if whole["total"])
    print(f"shares: {shares}")


if __name__ == "__main__":
    main()
