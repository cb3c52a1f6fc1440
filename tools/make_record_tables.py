# ruff: noqa: RUF001 - Chinese has its own punctuation.
"""Write the tables of measurements in both READMEs and in docs/ from the records in results/.

python tools/make_record_tables.py          # after a record has changed
python tools/make_record_tables.py --check  # exit status 1 if a table is not that of its record

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; ``TABLES`` says which function makes it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from make_results import describe_command, read_records

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"

#: Column heads of the small table of the READMEs and the home page.
MEASURED_HEADS = {
    "README.md": (
        "kept", "loss, nats per token", "with uniform budgets", "KV cache", "time to first token", "decode step",
    ),
    "README.zh-CN.md": ("保留", "损失，每 token 奈特", "均匀预算", "KV 缓存", "首 token 时间", "每步解码"),
}  # fmt: skip


def read_record(name: str) -> Any:
    """Read a JSON record of ``results/``."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def read_rows(folder: str) -> list[dict[str, Any]]:
    """Read the rows of an experiment's folder."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(RESULTS / folder / "rows.parquet").to_pylist()


def read_summary(folder: str, heading: str) -> str:
    """Return the table below the heading of a folder's summary that starts with ``heading``."""
    text = (RESULTS / folder / "summary.md").read_text(encoding="utf-8") + "\n\n"
    found = re.search(rf"^### {re.escape(heading)}.*?\n\n(\|.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    if found is None:
        sys.exit(f"results/{folder}/summary.md has no table {heading!r}.")
    return found[1]


def write_table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """Return rows of cells as a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)])


def name_interval(found: dict[str, float | None], digits: int = 3) -> str:
    """Return a ratio with its interval, if there is one that says something."""
    ratio, low, high = found["ratio"], found["low"], found["high"]
    if low is None or high is None or low == high:
        return f"{ratio:.{digits}f}"
    return f"{ratio:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def make_measured(page: str) -> str:
    """Make the small table of loss, memory and time by the share of the cache kept."""
    excess: dict[tuple[str, float], list[float]] = defaultdict(list)
    for row in read_rows("ablation"):
        if row["selector"] == "snapkv":
            excess[row["strategy"], row["ratio"]].append(row["excess"])
    mean = {key: sum(values) / len(values) for key, values in excess.items()}
    cache = {
        row["compression_ratio"]: row["cache_bytes"]
        for row in read_record("quality_speed.json")["rows"]
        if row["way"].startswith("default")
    }
    heads = {
        row["compression_ratio"]: row
        for row in read_record("bench.json")["heads"]["rows"]
        if row["heads"] == "distortion"
    }
    rows: list[tuple[object, ...]] = [("100 %", "0", "0", f"{cache[1.0] / 1e6:.1f} MB", "1.00", "1.00")]
    for ratio in sorted(heads, reverse=True):
        times = [heads[ratio][name]["ratio"] for name in ("prefill_cpu_ratio", "step_cpu_ratio")]
        losses = [mean[strategy, ratio] for strategy in ("default", "uniform")]
        row = [f"{ratio:.0%}".replace("%", " %"), *(f"{loss:.3f}" for loss in losses)]
        rows.append((*row, f"{cache[ratio] / 1e6:.1f} MB", *(f"{time:.2f}" for time in times)))
    return write_table(MEASURED_HEADS.get(page, MEASURED_HEADS["README.md"]), rows)


def make_shares() -> str:
    """Make the table of the share of the cache that loses what uniform budgets lose at 20 %."""
    rows = []
    for tokens, selector, folder in (
        ("1,024", "snapkv", "ablation"),
        ("1,024", "h2o", "ablation"),
        ("3,072", "snapkv", "ablation_long"),
        ("4,096", "snapkv", "ablation_4096"),
    ):
        table = read_summary(folder, f"{selector}: share of the cache")
        shares = dict(re.findall(r"^\| (\S+) \| (.*?) \|$", table, re.MULTILINE))
        rows.append((tokens, f"`{selector}`", shares["default"], shares["auto"]))
    return write_table(("tokens of context", "selector", "default", "default with the profile"), rows)


def make_needles() -> str:
    """Make the table of needles found."""
    found: dict[tuple[str, float], list[bool]] = defaultdict(list)
    for row in read_rows("needle"):
        found[row["strategy"], row["ratio"]].append(row["found"])
    rows = []
    names = {
        "uniform": "uniform",
        "RankKV": "default",
        "RankKV, profile": "default with the profile",
        "RankKV, layers": "default with equal heads (`head_budgets=None`)",
    }
    for strategy, name in names.items():
        counts = [found[strategy, ratio] for ratio in (0.1, 0.2)]
        rows.append((name, *(f"{sum(values)} of {len(values)}" for values in counts)))
    full = found["full", 1.0]
    rows.append(("full cache", *[f"{sum(full)} of {len(full)}"] * 2))
    return write_table(("budgets from", "10 % kept", "20 % kept"), rows)


def make_selectors_quality() -> str:
    """Make the table of the excess loss of every selector with every way to spread the budget, at 20 %."""
    excess: dict[tuple[str, str], list[float]] = defaultdict(list)
    strategies: dict[str, None] = {}
    for row in read_rows("method_quality"):
        if row["task"] == "continuation" and row["ratio"] == 0.2:
            excess[row["selector"], row["strategy"]].append(row["excess"])
            strategies.setdefault(row["strategy"])
    selectors = list(dict.fromkeys(selector for selector, _ in excess))
    rows = []
    for selector in selectors:
        means = [sum(excess[selector, s]) / len(excess[selector, s]) for s in strategies]
        rows.append((f"`{selector}`", *(f"{mean:.3f}" for mean in means)))
    return write_table(("selector", *strategies), rows)


def make_shares_of_uniform() -> str:
    """Make the table of the mean loss over selectors as a share of that with uniform budgets."""
    excess: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for row in read_rows("method_quality"):
        if row["task"] == "continuation":
            excess[row["selector"], row["strategy"], row["ratio"]].append(row["excess"])
    ratios = sorted({ratio for _, _, ratio in excess})
    strategies = list(dict.fromkeys(strategy for _, strategy, _ in excess))
    total: dict[tuple[str, float], float] = defaultdict(float)
    for (_, strategy, ratio), values in excess.items():
        total[strategy, ratio] += sum(values) / len(values)
    rows = [
        (s, *(f"{total[s, ratio] / total['uniform', ratio]:.2f}" for ratio in ratios)) for s in strategies
    ]
    return write_table(("budgets from", *(f"{ratio:.0%} kept".replace("%", " %") for ratio in ratios)), rows)


def make_storages() -> str:
    """Return the table of storages beside transformers' quantized cache."""
    text = (RESULTS / "unproven" / "storage" / "summary.md").read_text(encoding="utf-8")
    return text[text.index("| cache |") :].strip()


#: What selector `echo` was in records made before it had far keys.
EARLIER_ECHO = "echo:chunk_size=256,far_keys=0"


def make_asked_later(folder: str, today: str | None = None, renames_echo: bool = True) -> str:
    """Return the tables of questions that come after the compression, as the records' summaries have them.

    ``today`` is a folder with the same contexts and the `echo` of today, whose row is added to each table.
    ``renames_echo`` is False for a record that was made with today's.
    """
    summary = (RESULTS / folder / "summary.md").read_text(encoding="utf-8")
    if renames_echo:
        summary = summary.replace("| echo:expected=0 |", f"| {EARLIER_ECHO},expected=0 |")
        summary = summary.replace("| echo |", f"| {EARLIER_ECHO} |")
    if today is not None:
        for heading in re.findall(r"^### (\w+):", summary, re.MULTILINE):
            row = read_summary(today, f"{heading}:").splitlines()[-1]
            summary = re.sub(
                rf"(^### {heading}:.*?\n\n\|.*?)(\n\n|\n*\Z)",
                lambda found, row=row: f"{found[1]}\n{row}{found[2]}",  # type: ignore[misc]
                summary,
                count=1,
                flags=re.MULTILINE | re.DOTALL,
            )
    # One level lower than the headings of the page.
    return "\n" + summary.strip().replace("### ", "#### ") + "\n"


def make_drift(folder: str) -> str:
    """Return the tables of a record of `experiments/decode_drift.py`, one level lower than the page's headings."""
    summary = (RESULTS / folder / "summary.md").read_text(encoding="utf-8")
    return "\n" + summary.strip().replace("### ", "#### ") + "\n"


def make_peers(name: str) -> str:
    """Make the table of questions asked later, by kvpress' own code and by RankKV."""
    rows: list[tuple[object, ...]] = []
    found = read_record("peers.json")[name]["rows"]
    plain = next(row for row in found if not row["library"])
    for row in found:
        time = f"{row['cpu_seconds']:.1f} s ({row['cpu_seconds'] / plain['cpu_seconds']:.2f})"
        scores = f"{row['right']:.2f} / {row['loss']:.3f}"
        rows.append((row["method"], row["library"] or "-", scores, time, f"{row['bytes_of_full']:.3f}"))
    head = ("method", "library", "right / loss", "CPU time (over plain)", "bytes over full")
    asked = f"{plain['contexts']} contexts of {plain['tokens']} tokens, four questions each.\n\n"
    return "\n" + asked + write_table(head, rows) + "\n"


def make_quality_bound(*folders: str) -> str:
    """Make the tables of what each `max_loss` kept and lost, one for each model and selector."""
    lines: list[str] = []
    for folder in folders:
        model = str(read_record(f"{folder}/manifest.json")["config"]["model"])
        name = "SmolLM2-135M-Instruct" if model == "embedded" else model
        for line in (RESULTS / folder / "summary.md").read_text(encoding="utf-8").splitlines():
            if line.startswith("### "):
                lines.append(f"**{name}, {line.removeprefix('### ')}**")
            elif " kept | " not in line or line.startswith("| asked"):
                lines.append(line)
    return "\n".join(lines).strip()


def make_demo() -> str:
    """Make the table of the recorded demo."""
    rows = []
    for run in read_record("demo.json")["runs"]:
        answer = " ".join(run["answer"].split()).replace("|", "\\|")
        times = f"{run['ttft_seconds']:.1f} s", f"{1e3 * run['tpot_seconds']:.0f} ms"
        fact = "yes" if run["has_fact"] else "no"
        rows.append((run["name"], f"{run['cache_bytes'] / 1e6:.1f} MB", *times, fact, answer))
    return write_table(
        ("cache", "KV cache", "first token", "later tokens", "code given back", "answer"), rows
    )


def make_sweep() -> str:
    """Make the table of the example sweep: loss above the full cache and needles found."""
    scores: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for row in read_rows("sweep"):
        scores[row["label"], row["method"], row["ratio"]].append(row["score"])
    full = scores["continuation", "full", 1.0]
    rows = []
    for label, method, ratio in scores:
        if label == "needle" and method not in ("full", "blank"):
            losses = scores["continuation", method, ratio]
            found = scores[label, method, ratio]
            excess = sum(losses) / len(losses) - sum(full) / len(full)
            shown = f"{ratio:.0%}".replace("%", " %"), f"{excess:.3f}", f"{sum(found):.0f} of {len(found)}"
            rows.append((method, *shown))
    found = scores["needle", "full", 1.0]
    rows.append(("full cache", "100 %", "0.000", f"{sum(found):.0f} of {len(found)}"))
    return write_table(("method", "kept", "loss above the full cache", "needles found"), rows)


def make_targets() -> str:
    """Make the table of targets of time and memory, met or not."""
    rows = []
    for row in read_record("bench.json")["targets"]["rows"]:
        bound = f"{row['target']}{'' if row['met'] else ', not met'}"
        rows.append((row["what"], row["against"], name_interval(row), bound))
    return write_table(("what", "over", "measured", "target"), rows)


def make_speed(what: str) -> str:
    """Make the table of paired ratios of CPU time, with quartiles, of prefills or of decode steps."""
    names = {
        "everything kept": "everything kept",
        "default without a profile": "default, no profile",
        "the shipped profile": "the shipped profile",
    }
    rows, columns = [], ("over_plain", "over_plain_of_kept_length") if what == "decode" else ("over_plain",)
    for name, part in read_record("speed.json").items():
        for row in part["rows"] if name.startswith(what) else ():
            kept = f"{row['kept']:.0%}".replace("%", " %")
            cache = names.get(row["cache"], f"`{row['cache']}`")
            rows.append(
                (f"{row['tokens']:,}", kept, cache, *(name_interval(row[column]) for column in columns))
            )
    heads = ("over plain", "over plain, as long as what is kept")[: len(columns)]
    return write_table(("tokens", "kept", "cache", *heads), rows)


def make_head_times() -> str:
    """Make the table of the CPU time of equal heads and of heads with budgets of their own."""
    names = {"equal": "`head_budgets=None`", "distortion": "default"}
    rows = []
    for row in read_record("bench.json")["heads"]["rows"]:
        kept = f"{row['compression_ratio']:.0%}".replace("%", " %")
        times = (name_interval(row[name]) for name in ("prefill_cpu_ratio", "step_cpu_ratio"))
        rows.append((kept, names[row["heads"]], *times))
    return write_table(("kept", "heads", "prefill over plain", "decode step over plain"), rows)


def make_quality_speed() -> str:
    """Make the table of loss, decode step and bytes of the quality benchmark."""
    rows = []
    for row in read_record("quality_speed.json")["rows"]:
        if row["compression_ratio"] < 1:
            kept = f"{row['compression_ratio']:.0%}".replace("%", " %")
            size = f"{row['cache_bytes'] / 1e6:.1f} MB"
            rows.append((row["way"], kept, f"{row['excess_loss']:.3f}", f"{row['tpot_cpu_ratio']:.2f}", size))
    return write_table(
        ("budgets from", "kept", "loss, nats per token", "decode step over plain", "KV cache"), rows
    )


def make_parity() -> str:
    """Make the table of sets of kept tokens beside kvpress."""
    total = read_record("parity.json")["total"]
    head = (
        "sets of kept tokens",
        "equal",
        "equal but for ties",
        "different as documented",
        "different otherwise",
    )
    return write_table(
        head, [tuple(f"{total[key]:,}" for key in ("sets", "equal", "tie", "stated", "different"))]
    )


def make_commands() -> str:
    """Make the table of subcommands with the first sentence of their help."""
    import typer

    from rankkv.cli import app

    rows = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        first = " ".join((command.help or "").split("\n\n")[0].split())
        rows.append((f"`rankkv {name}`", first.replace("|", "\\|")))
    return write_table(("command", "what it does"), rows)


def make_origins() -> str:
    """Make the table of where each record comes from: command and commit."""
    rows = []
    for name, entry in read_records().items():
        if name.endswith(".json"):
            record = read_record(name)
            parts = [record, *(part for part in record.values() if isinstance(part, dict))]
            commits = {str(part.get("commit")) for part in parts if part.get("commit")}
            commits |= {
                str(p["machine"]["commit"])
                for p in parts
                if isinstance(p.get("machine"), dict) and p["machine"].get("commit")
            }
        else:
            environment = read_record(f"{name}/manifest.json")["environment"]
            commits = {str(environment["commit"])} if environment.get("commit") else set()
        shown = ", ".join(f"`{commit[:7]}`" for commit in sorted(commits)) or "not recorded"
        rows.append((f"`results/{name}`", f"`{describe_command(entry)}`", shown))
    return write_table(("record", "command", "commit"), rows)


def name_number(value: float | None, digits: int = 2) -> str:
    """Return a number with so many digits; a dash where none was measured."""
    return "-" if value is None or value != value else f"{value:,.{digits}f}"


def make_gpu(part: str) -> str:
    """Make a table of what was measured on a GPU, "ttft", "tpot", "waits" or "backends", or the sentence "correct"."""
    record = read_record("gpu/h100.json")["rows"]
    rows = [row for row in record if row["part"] == part]
    if part == "correct":
        return describe_agreement(record)
    if part == "ttft":
        head = ("shape", "tokens", "cache", "ms", "over plain", "peak, GiB", "held after it, GiB")
        return write_table(head, [
            (
                row["shape"], f"{row['tokens']:,}", name_cache(row["cache"]), name_number(row.get("ms"), 0),
                name_number(row.get("over_plain")), name_number(row.get("peak_GiB")), name_number(row.get("held_GiB")),
            )
            for row in rows
            if "ms" in row
        ])  # fmt: skip
    if part == "tpot":
        head = (
            "rows", "tokens", "cache", "kept", "ms", "over plain", "over plain without cuDNN", "bytes held over plain",
        )  # fmt: skip
        return write_table(head, [
            (
                row["rows"], f"{row['tokens']:,}", name_cache(row["cache"]), f"{row['kept']:.0%}",
                name_number(row["ms"], 1), name_number(row["over_plain"]),
                name_number(row.get("over_plain_without_cudnn")), name_number(row["held_over_plain"]),
            )
            for row in rows
            if "ms" in row
        ])  # fmt: skip
    if part == "waits":
        head = ("cache", "waits a layer of a prefill", "waits of a decode step")
        return write_table(head, [
            (name_cache(row["cache"]), name_number(row["prefill_a_layer"]), row["step"])
            for row in rows
            if "step" in row and row["cache"] != "plain"
        ])  # fmt: skip
    return write_table(("backend", "cache", "ms a step of four layers"), [
        (f"`{row['backend']}`", name_cache(row.get("cache", "-")), name_number(row["ms"], 1))
        for row in rows
        if "ms" in row
    ])  # fmt: skip


def describe_agreement(rows: list[dict[str, Any]]) -> str:
    """Say how many settings gave on the GPU what they give on a CPU, and by how much half precision differs."""
    compared = [row for row in rows if row["part"] == "correct" and "skipped" not in row]
    same = [row for row in compared if row.get("same_counts") and row.get("same_tokens")]
    error = round_up(max(row["logit_error"] for row in compared if "logit_error" in row))
    ways = [row for row in rows if row["part"] == "ways"]
    half = {
        row["selector"]: row["same_kept"]
        for row in rows
        if row["part"] == "numerics" and row["device"] == "bfloat16"
    }
    kept = ", ".join(f"{share:.1%} with `{name}`" for name, share in half.items())
    texts = sum(row.get("same_tokens", False) for row in ways)
    return (
        f"A small model in float32, beside a CPU: {len(same)} of {len(compared)} settings keep the same tokens of\n"
        f"every head, and logits differ by at most {error:.0e}. {texts} of {len(ways)} ways of generating give the\n"
        "same text. "
        f"In bfloat16 both keep the same {kept}."
    )


def round_up(value: float) -> float:
    """Return the smallest number of one digit that is not below a positive value.

    Examples
    --------
    >>> round_up(1.4e-5)
    2e-05
    """
    digit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / digit - 1e-9) * digit:.0e}")


def name_cache(name: str) -> str:
    """Return a cache's name, as code where it is an option."""
    return f"`{name}`" if "=" in name else name


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    **{page: {"measured": lambda page=page: make_measured(page)} for page in MEASURED_HEADS},
    "docs/index.md": {"measured": lambda: make_measured("docs/index.md")},
    "docs/results.md": {
        "shares": make_shares,
        "snapkv": lambda: read_summary("ablation", "snapkv, all texts"),
        "h2o": lambda: read_summary("ablation", "h2o, all texts"),
        "others": lambda: read_summary("ablation_others", "snapkv, all texts"),
        "long": lambda: read_summary("ablation_long", "snapkv, all texts"),
        "longer": lambda: read_summary("ablation_4096", "snapkv, all texts"),
        "needles": make_needles,
        "selectors-quality": make_selectors_quality,
        "shares-of-uniform": make_shares_of_uniform,
        "storages": make_storages,
        "demo": make_demo,
        "asked-later": lambda: make_asked_later("asked_later", "asked_later_echo"),
        "asked-later-qwen": lambda: make_asked_later("asked_later_qwen", "asked_later_echo_qwen"),
        "asked-later-weighed": lambda: make_asked_later("asked_later_weighed", renames_echo=False),
        "asked-later-weighed-qwen": lambda: make_asked_later("asked_later_weighed_qwen", renames_echo=False),
        "asked-later-same-loss": lambda: make_asked_later("asked_later_same_loss", renames_echo=False),
        "asked-later-qwen15": lambda: make_asked_later("asked_later_qwen15", renames_echo=False),
        "asked-later-tasks": lambda: make_asked_later("asked_later_tasks", renames_echo=False),
        "asked-later-methods": lambda: make_asked_later("asked_later_methods", renames_echo=False),
        "asked-first": lambda: make_asked_later("asked_first", renames_echo=False),
        "asked-later-peers": lambda: make_asked_later("asked_later_peers"),
        "drift": lambda: make_drift("decode_drift"),
        "drift-qwen": lambda: make_drift("decode_drift_qwen"),
        "peers": lambda: make_peers("embedded"),
        "peers-qwen": lambda: make_peers("qwen05"),
        "origins": make_origins,
    },
    "docs/performance.md": {
        "targets": make_targets,
        "head-times": make_head_times,
        "speed-prefill": lambda: make_speed("prefill"),
        "speed-decode": lambda: make_speed("decode"),
        "quality-speed": make_quality_speed,
        "gpu-prefill": lambda: make_gpu("ttft"),
        "gpu-decode": lambda: make_gpu("tpot"),
        "gpu-waits": lambda: make_gpu("waits"),
        "gpu-backends": lambda: make_gpu("backends"),
        "gpu-correct": lambda: make_gpu("correct"),
    },
    "docs/evaluation.md": {"sweep": make_sweep},
    "docs/kvpress.md": {"parity": make_parity},
    "docs/choosing.md": {"quality-bound": lambda: make_quality_bound("quality_bound")},
    "docs/command-line.md": {"commands": make_commands},
}  # fmt: skip


def put_between(text: str, name: str, table: str, page: str) -> str:
    """Return the text with the table between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{page} has no place for the table: put {begin} and {end} where it goes.")
    return f"{before}{begin}\n{table}\n{end}{after}"


def make_page(page: str) -> tuple[str, str]:
    """Return the text of a page as it stands, and with every table made from its record."""
    text = (ROOT / page).read_text(encoding="utf-8")
    made = text
    for name, make in TABLES[page].items():
        made = put_between(made, name, make(), page)
    return text, made


def main() -> int:
    """Write the tables, or name the pages whose tables are old."""
    from rankkv.utils.files import write_text_atomically

    old = []
    for page in TABLES:
        text, made = make_page(page)
        if text != made:
            old.append(page)
            if "--check" not in sys.argv[1:]:
                write_text_atomically(ROOT / page, made)
    print(f"{'old' if '--check' in sys.argv[1:] else 'written'}: {', '.join(old) or 'none'}")
    return int(bool(old) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
