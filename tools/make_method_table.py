"""Write the tables of selectors and strategies in docs/choosing.md from the registries.

python tools/make_method_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "choosing.md"
HEADS = {
    "selectors": ("selector", "options", "what it does", "reads", "cost", "source"),
    "strategies": ("strategy", "options", "weight of a layer", "reads", "cost", "source"),
}


def list_methods(kind: str) -> list[dict[str, object]]:
    """Return the records of a registry, as ``rankkv methods --json`` shows them."""
    from rankkv.cli.known import describe_methods

    return describe_methods()[kind]


def make_table(kind: str) -> str:
    """Return one table as Markdown, its markers included."""
    head = HEADS[kind]
    lines = [f"<!-- {kind}:begin -->", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for method in list_methods(kind):
        options = method["options"]
        assert isinstance(options, dict)
        shown = ", ".join(f"{option}={value!r}" for option, value in options.items())
        rest = [str(method[column]) for column in ("needs", "cost", "source")]
        cells = [
            f"`{method['name']}`",
            f"`{shown}`" if shown else "",
            str(method["description"]).rstrip("."),
            *rest,
        ]
        lines.append("|" + "".join(f" {cell} |" if cell else " |" for cell in cells))
    return "\n".join([*lines, f"<!-- {kind}:end -->"])


def main() -> None:
    """Put the tables between their markers."""
    from rankkv.utils.files import write_text_atomically

    text = PAGE.read_text(encoding="utf-8")
    for kind in HEADS:
        begin, end = f"<!-- {kind}:begin -->", f"<!-- {kind}:end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            sys.exit(f"{PAGE.name} has no place for the table: put {begin} and {end} where it goes.")
        text = before + make_table(kind) + after
    write_text_atomically(PAGE, text)


if __name__ == "__main__":
    main()
