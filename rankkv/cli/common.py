"""Helpers of the subcommands: error messages, JSON on stdout, files, prompts, options and versions."""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer

from ..errors import ConfigError, InputError, RankKVError
from ..utils.files import dump_json, write_text_atomically

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def reports_errors(command: Command) -> Command:
    """Decorate a command so that bad input ends in one sentence on stderr instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except RankKVError as error:
            typer.echo(format_error(error), err=True)
            raise typer.Exit(EXIT_BAD_INPUT) from None
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return run  # type: ignore[return-value]


def format_error(error: RankKVError) -> str:
    """Return an error's message as one line."""
    return "Error: " + " ".join(str(error).split())


def print_json(record: dict[str, Any]) -> None:
    """Write a record to stdout as JSON; with --json, stdout holds nothing else."""
    sys.stdout.write(dump_json(record))
    sys.stdout.flush()


def write_json(path: Path, record: dict[str, Any]) -> Path:
    """Write a record to a JSON file, atomically, and return its path.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    try:
        return write_text_atomically(path, dump_json(record))
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r}: {error.strerror or error}; give another path."
        ) from error


def check_output(path: Path | None) -> None:
    """Raise an InputError if a file cannot be written, before any work is done.

    Raises
    ------
    InputError
        If ``path`` is a folder, or a parent of it is a file.
    """
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"cannot write {str(path)!r}: it is a folder; give the path of a file.")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise InputError(f"cannot write {str(path)!r}: {str(nearest)!r} is not a folder; give another path.")


def check_at_least_one(option: str, value: int | None) -> None:
    """Raise a ConfigError if the value of a counting option is below 1."""
    if value is not None and value < 1:
        raise ConfigError(f"{option} is {value} but must be at least 1.")


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises
    ------
    InputError
        If the file is missing, is a folder or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not UTF-8 (byte {error.start}: {error.reason}); convert it to UTF-8."
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot read {str(path)!r}: {error.strerror or error}; give a readable file."
        ) from error


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """Return the text of --prompt or of --prompt-file, one of which must be given.

    Raises
    ------
    InputError
        If none or both are given, the text is blank, or the file holds several texts.
    """
    _check_one_given({"--prompt": prompt, "--prompt-file": prompt_file})
    texts = read_prompts(prompt, None if prompt_file is None else [prompt_file], None)
    if len(texts) != 1:
        raise InputError(
            f"{str(prompt_file)!r} holds {len(texts)} texts but must hold one: give another file, or --prompt."
        )
    return texts[0]


def read_prompts(prompt: str | None, prompt_files: list[Path] | None, dataset: str | None) -> list[str]:
    """Return the texts of --prompt, --prompt-file or --dataset, one of which must be given.

    A prompt is one text, and so is each file.  A JSONL file has one text per line.  A data set is joined to one text.

    Raises
    ------
    InputError
        If none or several options are given, or a text is blank.
    RankKVError
        As :func:`rankkv.load_texts`.
    """
    _check_one_given({"--prompt": prompt, "--prompt-file": prompt_files or None, "--dataset": dataset})
    if dataset is not None:
        from ..models.texts import load_texts

        return ["\n\n".join(text.strip() for text in load_texts(dataset))]
    if not prompt_files:
        return [_read_one(prompt, None)]
    texts = []
    for path in prompt_files:
        if path.suffix.lower() == ".jsonl":
            from ..models.texts import load_texts

            texts += load_texts(path)
        else:
            texts.append(_read_one(None, path))
    return texts


def _check_one_given(options: dict[str, Any]) -> None:
    """Raise an InputError unless exactly one option has a value."""
    given = [name for name, value in options.items() if value is not None]
    *names, last = options
    known = f"{', '.join(names)} or {last}"
    if len(given) != 1:
        raise InputError(
            f"{' and '.join(given)} are given together: give exactly one of {known}."
            if given
            else f"there is no prompt: give exactly one of {known}."
        )


def _read_one(prompt: str | None, path: Path | None) -> str:
    """Return the prompt, or the text of the file; raise an InputError if it is blank."""
    text = prompt if path is None else read_text(path)
    if text is None or not text.strip():
        where = "the prompt" if path is None else repr(str(path))
        raise InputError(f"{where} is empty: give some text.")
    return text


def parse_options(given: list[str] | None, flag: str) -> dict[str, Any]:
    """Parse ``name=value`` options into a dict, with numbers and booleans as such.

    Raises
    ------
    ConfigError
        If an option has no ``=`` or no name, or a name comes twice.

    Examples
    --------
    >>> parse_options(["exponent=2", "pooling=avg"], "--strategy-option")
    {'exponent': 2, 'pooling': 'avg'}
    """
    options: dict[str, Any] = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ConfigError(f"{flag} {item!r} must be of the form name=value.")
        if name in options:
            raise ConfigError(f"{flag} gives {name!r} twice: give it once.")
        options[name] = _parse_value(value.strip())
    return options


def _parse_value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def collect_versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    import torch
    import transformers

    from .._version import __version__

    return {
        "rankkv": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
    }


def build_question_prompt(tokenizer: Any, document: str, question: str | None) -> Any:
    """Return the ids of a document and its question, ``[1, token]``.

    With a question, both go through the tokenizer's chat template.  Without a template they are plain text.

    Raises
    ------
    InputError
        If the question is blank.
    """
    if question is None:
        return tokenizer(document, return_tensors="pt", verbose=False)["input_ids"]
    if not question.strip():
        raise InputError("the question is empty: give some text, or leave --question out.")
    content = f"{document}\n\n{question.strip()}"
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer(f"{content}\n", return_tensors="pt", verbose=False)["input_ids"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]


def cut_text(tokenizer: Any, text: str, tokens: int) -> str:
    """Return the beginning of a text, at most ``tokens`` tokens long."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return text if len(ids) <= tokens else tokenizer.decode(ids[:tokens])
