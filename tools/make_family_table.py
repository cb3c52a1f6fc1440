"""Run the conformance of every family, keep the results, and write the table of docs/models.md.

python tools/make_family_table.py                 # runs everything: about ten minutes on one core
python tools/make_family_table.py --table-only    # writes the table from results/families.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
RESULTS = ROOT / "results" / "families.json"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
BACKENDS = ("sdpa", "eager", "flex_attention")

WORDS = {
    "head": "| family | compressed layers | sdpa | eager | flex_attention | remark |",
    "all": "all",
    "none": "none",
    "of": "{some} of {count}",
    "pass": "passes",
    "refused": "refused",
    "absent": "-",
    "bypass": "its attention bypasses transformers' attention interface",
    "own": "transformers gives it a cache of its own",
    "unchanged": "warns and runs unchanged: no layer has a full-attention cache",
    "latent": '`prefill="chunked"` and assisted decoding are refused: attention sees other keys than are cached',
    "chunks": "transformers itself gives another text for a prompt in chunks",
    "borrows": "layers without keys of their own attend to those another layer keeps",
}


def collect() -> dict[str, Any]:
    """Run all rows and return the record that is kept."""
    import conformance
    import families
    import torch
    import transformers

    import rankkv
    from rankkv.evaluation.results import describe_origin

    transformers.logging.set_verbosity_error()
    record: dict[str, Any] = {
        **describe_origin(),
        "versions": {
            "rankkv": rankkv.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "ways": {name: " ".join((check.__doc__ or "").split()) for name, check in conformance.WAYS.items()},
        "families": {},
    }
    for name, family in families.FAMILIES.items():
        results: dict[str, dict[str, str]] = {}
        for backend, way in conformance.list_rows(name):
            result = conformance.run_way(name, backend, way)
            results.setdefault(backend, {})[way] = result
        layers = families.build(name, family.backends[0]).config.get_text_config().num_hidden_layers
        compressed = list(range(layers)) if family.compressible is None else list(family.compressible)
        record["families"][name] = {
            "model": family.model,
            "layers": layers,
            "compressed_layers": [] if family.outcome == families.REFUSED else compressed,
            "outcome": family.outcome,
            "results": results,
        }
        print(
            f"{name}: {'; '.join(sorted({r for ways in results.values() for r in ways.values()}))}",
            flush=True,
        )
    return record


def make_table(record: dict[str, Any]) -> str:
    """Return the table as Markdown, its markers included."""
    columns = WORDS["head"].count("|") - 1
    lines = [BEGIN, WORDS["head"], "|" + " --- |" * columns]
    for name, row in record["families"].items():
        count, some = row["layers"], len(row["compressed_layers"])
        layers = WORDS["none"] if not some else WORDS["all"]
        if 0 < some < count:
            layers = WORDS["of"].format(some=some, count=count)
        cells = [_summarize(row["results"].get(backend)) for backend in BACKENDS]
        lines.append(f"| {' | '.join([name, layers, *cells, _explain(name, row)])} |")
    return "\n".join([*lines, END])


def _summarize(results: dict[str, str] | None) -> str:
    if results is None:
        return WORDS["absent"]
    return WORDS["refused"] if all(r.startswith("refused") for r in results.values()) else WORDS["pass"]


def _explain(name: str, row: dict[str, Any]) -> str:
    import families

    if row["outcome"] == families.REFUSED:
        return WORDS["bypass" if "interface" in families.FAMILIES[name].says else "own"]
    if row["outcome"] == families.UNCHANGED:
        return WORDS["unchanged"]
    family = families.FAMILIES[name]
    flags = {
        "latent": family.latent_since is not None,
        "chunks": not family.chunks,
        "borrows": family.borrows,
    }
    return "; ".join(WORDS[flag] for flag, holds in flags.items() if holds)


def write_page(record: dict[str, Any]) -> None:
    """Put the table between its markers."""
    from rankkv.utils.files import write_text_atomically

    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{PAGE.name} has no place for the table: put {BEGIN} and {END} where it goes.")
    write_text_atomically(PAGE, before + make_table(record) + after)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table-only", action="store_true", help="do not run anything")
    arguments = parser.parse_args()
    if not arguments.table_only:
        from rankkv.utils.files import write_text_atomically

        warnings.simplefilter("ignore")
        text = json.dumps(collect(), indent=1, ensure_ascii=False) + "\n"
        write_text_atomically(RESULTS, text)
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
