"""Remake the records of results/ from their commands in experiments/results.yaml, then the tables made from them.

python tools/make_results.py --texts FOLDER [--models NAME=PATH ...] [--only RECORD ...]
python tools/make_results.py --list  # what would run

A record that was remade at this commit is not remade again.  Experiments run in build/results/, where one that was
stopped goes on; its record is copied to results/ once it is complete.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "experiments" / "results.yaml"
#: Files of an experiment's folder that are its record.
KEPT = ("manifest.json", "rows.parquet", "summary.md")


def read_records() -> dict[str, dict[str, Any]]:
    """Return every record's entry, its command as a list of lines."""
    records: dict[str, dict[str, Any]] = yaml.safe_load(RECORDS.read_text(encoding="utf-8"))
    for entry in records.values():
        entry["command"] = [entry["command"]] if isinstance(entry["command"], str) else entry["command"]
    return records


def describe_command(entry: Mapping[str, Any]) -> str:
    """Return the command of a record in one line, as the results page shows it."""
    thread = "OMP_NUM_THREADS=1 " if entry.get("single_thread") else ""
    model = f" --model {entry['model']}" if "model" in entry else ""
    return thread + "; ".join(" ".join(line.split()) for line in entry["command"]) + model


def build_commands(name: str, entry: Mapping[str, Any]) -> list[list[str]]:
    """Return the argument lists that make a record, to be run in build/results/."""
    commands = []
    for line in entry["command"]:
        words = shlex.split(line)
        if words[0] == "python":
            words[0] = sys.executable
        elif words[0].endswith(".py"):
            words.insert(0, sys.executable)
        elif words[0] == "rankkv":
            words[:1] = [sys.executable, "-m", "rankkv"]
        for text in entry.get("texts", ()):
            words += [entry.get("text_option", "--texts"), f"{text}={text}.txt"]
        if "model" in entry:
            words += ["--model", entry["model"]]
        if not name.endswith(".json"):
            words += ["--output_dir" if words[1].endswith(".py") else "--output-dir", name]
        commands.append(words)
    return commands


def find_missing(entry: Mapping[str, Any], texts: Path | None, models: Mapping[str, str]) -> str:
    """Return what a record needs and was not given; empty if nothing."""
    absent = [
        name for name in entry.get("texts", ()) if texts is None or not (texts / f"{name}.txt").is_file()
    ]
    if absent:
        place = "--texts FOLDER" if texts is None else str(texts)
        return f"{place} must hold {', '.join(f'{name}.txt' for name in absent)}"
    if "model" in entry and entry["model"] not in models:
        return f"--models {entry['model']}=PATH is missing"
    if entry.get("gpu") and shutil.which("nvidia-smi") is None:
        return "an NVIDIA GPU"
    return ""


def prepare_folder(texts: Path | None, models: Mapping[str, str]) -> Path:
    """Link texts, models and programs into build/results/, so that records hold no path of this machine."""
    folder = ROOT / "build" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    links = {"experiments": ROOT / "experiments"}
    links |= {path.name: path for path in (texts.glob("*.txt") if texts else ())}
    links |= {name: Path(path) for name, path in models.items()}
    for name, target in links.items():
        link = folder / name
        if link.is_symlink():
            link.unlink()
        link.symlink_to(target.resolve())
    return folder


def make_record(name: str, entry: Mapping[str, Any], folder: Path) -> None:
    """Run a record's commands, and copy it to results/."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    if entry.get("single_thread"):
        environment["OMP_NUM_THREADS"] = "1"
    for words in build_commands(name, entry):
        inside = name if not name.endswith(".json") else ""
        subprocess.run(words, cwd=folder if inside else ROOT, env=environment, check=True)
    if not name.endswith(".json"):
        target = ROOT / "results" / name
        target.mkdir(parents=True, exist_ok=True)
        for kept in KEPT:
            if (folder / name / kept).is_file():
                shutil.copyfile(folder / name / kept, target / kept)


def find_commit() -> str:
    """Return the commit of the working tree, with ``-dirty`` if it differs."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip()


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Remake the records of results/ and their tables.")
    parser.add_argument("--texts", type=Path, help="folder of the texts, NAME.txt each")
    parser.add_argument(
        "--models", nargs="*", default=[], metavar="NAME=PATH", help="models beside the embedded"
    )
    parser.add_argument("--only", nargs="*", metavar="RECORD", help="records to remake; default: all")
    parser.add_argument("--again", action="store_true", help="remake what this commit has made already")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    arguments = parser.parse_args(words)
    unknown = sorted(set(arguments.only or ()) - set(read_records()))
    if unknown:
        parser.error(f"no record {', '.join(unknown)}: one of {', '.join(read_records())}")
    if arguments.texts is not None and not arguments.texts.is_dir():
        parser.error(f"--texts {arguments.texts} must be a folder")
    wrong = [item for item in arguments.models if not all(item.partition("="))]
    if wrong:
        parser.error(f"--models {wrong[0]} must be NAME=PATH")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Remake what is asked for; return 1 if a record failed or lacks its input."""
    arguments = parse_arguments(words)
    models = dict(item.split("=", 1) for item in arguments.models)
    commit, failed = find_commit(), 0
    for name, entry in read_records().items():
        if arguments.only and name not in arguments.only:
            continue
        done = ROOT / "build" / "results" / f"{name.replace('/', '-')}.done"
        missing = find_missing(entry, arguments.texts, models)
        if entry.get("gone"):
            print(f"{name}: stays as it is, its options are gone")
        elif not arguments.again and done.is_file() and done.read_text(encoding="utf-8") == commit:
            print(f"{name}: made at this commit already")
        elif missing:
            print(f"{name}: not made: {missing}")
            failed = 1
        elif arguments.list:
            print(f"{name}: {describe_command(entry)}")
        else:
            print(f"{name}: {describe_command(entry)}", flush=True)
            try:
                make_record(name, entry, prepare_folder(arguments.texts, models))
            except subprocess.CalledProcessError as error:
                print(f"{name}: ended with {error.returncode}; the others go on", file=sys.stderr)
                failed = 1
            else:
                done.write_text(commit, encoding="utf-8")
    if not arguments.list:
        subprocess.run([sys.executable, str(ROOT / "tools" / "make_record_tables.py")], check=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
