# ruff: noqa: RUF001 - Chinese has its own punctuation.
"""Run the conformance of every family, keep the results, and write the table of both READMEs.

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
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
BACKENDS = ("sdpa", "eager", "flex_attention")

WORDS: dict[str, dict[str, str]] = {
    "README.md": {
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
    },
    "README.zh-CN.md": {
        "head": "| 模型家族 | 压缩的层 | sdpa | eager | flex_attention | 说明 |",
        "all": "全部",
        "none": "无",
        "of": "{count} 层中的 {some} 层",
        "pass": "通过",
        "refused": "拒绝",
        "absent": "-",
        "bypass": "其注意力绕过了 transformers 的注意力接口",
        "own": "transformers 为其使用专有的缓存",
        "unchanged": "发出警告并照常运行：没有任何一层使用完整注意力缓存",
        "latent": '拒绝 `prefill="chunked"` 与辅助解码：注意力所见的键与缓存的不同',
        "chunks": "分块输入提示时，transformers 自身就会给出不同的文本",
        "borrows": "没有自己的键的层使用另一层保留的键",
    },
}


def collect() -> dict[str, Any]:
    """Run all rows and return the record that is kept."""
    import conformance
    import families
    import torch
    import transformers

    import rankkv

    transformers.logging.set_verbosity_error()
    record: dict[str, Any] = {
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


def make_table(record: dict[str, Any], words: dict[str, str]) -> str:
    """Return the table as Markdown, its markers included."""
    columns = words["head"].count("|") - 1
    lines = [BEGIN, words["head"], "|" + " --- |" * columns]
    for name, row in record["families"].items():
        count, some = row["layers"], len(row["compressed_layers"])
        layers = words["none"] if not some else words["all"]
        if 0 < some < count:
            layers = words["of"].format(some=some, count=count)
        cells = [_summarize(row["results"].get(backend), words) for backend in BACKENDS]
        lines.append(f"| {' | '.join([name, layers, *cells, _explain(name, row, words)])} |")
    return "\n".join([*lines, END])


def _summarize(results: dict[str, str] | None, words: dict[str, str]) -> str:
    if results is None:
        return words["absent"]
    return words["refused"] if all(r.startswith("refused") for r in results.values()) else words["pass"]


def _explain(name: str, row: dict[str, Any], words: dict[str, str]) -> str:
    import families

    if row["outcome"] == families.REFUSED:
        return words["bypass" if "interface" in families.FAMILIES[name].says else "own"]
    if row["outcome"] == families.UNCHANGED:
        return words["unchanged"]
    family = families.FAMILIES[name]
    flags = {
        "latent": family.latent_since is not None,
        "chunks": not family.chunks,
        "borrows": family.borrows,
    }
    return "; ".join(words[flag] for flag, holds in flags.items() if holds)


def write_tables(record: dict[str, Any]) -> None:
    """Put the table between the markers of both READMEs."""
    from rankkv.utils.files import write_text_atomically

    for name, words in WORDS.items():
        path = ROOT / name
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            sys.exit(f"{name} has no place for the table: put {BEGIN} and {END} where it goes.")
        write_text_atomically(path, before + make_table(record, words) + after)


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
    write_tables(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
