"""Random calls on many caches in turn, some interrupted or given to a wrong model, each compared with the call alone.

A cache carries the list of the calls that made it.  The oracle repeats that list on a fresh cache, on a model of its
own with the same weights, in a thread of its own, so that nothing of the other calls can reach it.

``python tests/support/mixed_calls.py --calls 500 --seed 0`` prints how often everything ran and what it came to.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import sys
import tempfile
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import oracles
import torch

import rankkv
from rankkv import RankKVCache
from rankkv.errors import CacheStateError, RankKVError, UnsupportedModelError

NAMES = [
    *(
        "Llama",
        "Qwen2",
        "Qwen3",
        "Mistral",
        "Mixtral",
        "Phi",
        "Gemma 2",
        "Gemma 3",
        "Gemma 3n",
        "GPT-NeoX",
        "GPT-2",
    ),
    *("gpt-oss", "OPT", "OLMo 2", "Cohere2", "DeepSeek-V3", "Qwen3-Next", "Jamba", "LFM2", "Qwen2-VL"),
]
#: Models that a cache is given to by mistake, besides those above.
OTHERS = ["Falcon", "BLOOM", "Mistral, sliding window", "StableLM", "Bamba"]

#: Models that remember the positions of the last image: a cache of theirs is copied right before it is used again.
KEEPS_OFFSET = {"Qwen2-VL"}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"compression_ratio": 1.0},
    {"compression_ratio": 0.1, "min_budget": 4},
    {"head_budgets": None},
    {"head_budgets": "adaptive"},
    {"strategy": "uniform"},
    {"strategy": "adaptive"},
    {"strategy": "power", "head_budgets": None},
    {"selector": "h2o"},
    {"selector": "expected_attention"},
    {"selector": "echo"},
    {"strategy": "global"},
    {"decode": "bounded"},
    {"decode": "periodic", "decode_interval": 3},
    {"storage": "int8"},
    {"storage": "offload"},
    {"positions": "packed"},
    {"prefill": "chunked"},
    {"prefill": "streaming"},
    {"recompress_turns": True},
]
HELD_PER_FAMILY, MOST_ANSWERS = 3, 4
PLAIN_PROMPT = oracles.random_prompt(50, seed=77)


@dataclass(frozen=True)
class Answer:
    """A call of generate() with all ids so far."""

    ids: torch.Tensor
    mask: torch.Tensor
    new_tokens: int

    def run(self, model: Any, cache: Any) -> list[list[int]]:
        return oracles.generate(model, self.ids, cache, self.new_tokens, self.mask).tolist()


@dataclass(frozen=True)
class Rewind:
    """A call of rewind()."""

    seen_tokens: int

    def run(self, model: Any, cache: Any) -> list[list[int]]:
        cache.rewind(self.seen_tokens)
        return [[cache.seen_tokens]]


@dataclass
class Held:
    """A cache, the calls that made it, and the ids and mask of its text."""

    family: str
    options: dict[str, Any]
    cache: Any
    steps: list[Answer | Rewind] = field(default_factory=list)
    ids: Any = None
    mask: Any = None

    @property
    def answers(self) -> int:
        return sum(isinstance(step, Answer) for step in self.steps)


@dataclass
class Report:
    """What the calls came to."""

    calls: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def ran(self) -> int:
        return sum(self.calls.values())

    def __str__(self) -> str:
        lines = [f"{self.ran} calls over {len(self.families)} families, {len(self.failures)} failures"]
        lines += [f"  {count:4d} calls: {name}" for name, count in self.calls.most_common()]
        lines += [f"  {count:4d} times: {name}" for name, count in self.outcomes.most_common()]
        return "\n".join(lines + self.failures)


class Failure(AssertionError):
    """Something does not hold."""


class HookError(Exception):
    """Raised by a hook that a user added."""


KINDS: list[Callable[[], BaseException]] = [
    KeyboardInterrupt,
    lambda: torch.OutOfMemoryError("no memory is left"),
    lambda: HookError("a hook failed"),
]


@contextmanager
def raise_in_module(module: Any, error: BaseException, call: int, before: bool):
    """Raise in the ``call``-th forward of a module; yields a list that holds the error once it was raised."""
    raised: list[str] = []
    left = [call]

    def hook(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raised.append(type(error).__name__)
            raise error

    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield raised
    finally:
        handle.remove()


@contextmanager
def raise_at_line(error: BaseException, line: int):
    """Raise before the ``line``-th line of the package that runs in this thread, as Ctrl+C does anywhere."""
    folder = str(Path(rankkv.__file__).parent)
    raised: list[str] = []
    left = [line]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if raised or not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raised.append(type(error).__name__)
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield raised
    finally:
        sys.settrace(before)


@functools.cache
def build_alone(family: str) -> Any:
    """Build the oracle's model: the weights of the shared one, in another object that nothing interrupts."""
    return families.FAMILIES[family].build(families.FAMILIES[family].backends[0])


def run_alone(work: Callable[[], Any]) -> Any:
    """Run in a thread of its own, and return the result."""
    results: list[Any] = []

    def run() -> None:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            results.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if not results:
        raise Failure("the oracle itself failed")
    return results[0]


def find_outcome(work: Callable[[], Any]) -> tuple[str, Any]:
    """Return ``("tokens", ...)``, or the name and text of an error of the package."""
    try:
        return "tokens", work()
    except RankKVError as error:
        return type(error).__name__, str(error)


def ask_oracle(held: Held, *steps: Answer | Rewind) -> tuple[str, Any]:
    """Return the outcome of the last step after all steps that made the cache, on a fresh cache."""

    def work() -> tuple[str, Any]:
        model = build_alone(held.family)
        cache = RankKVCache(model, **held.options)
        outcome: tuple[str, Any] = "tokens", []
        for step in [*held.steps, *steps]:
            outcome = find_outcome(functools.partial(step.run, model, cache))
        return outcome

    return run_alone(work)


class Mixture:
    """The caches in use and the draws of one run."""

    def __init__(self, seed: int, report: Report, folder: Path, names: list[str]) -> None:
        self.draw = random.Random(seed)
        self.report, self.folder = report, folder
        known = [families.FAMILIES[name] for name in names]
        self.names = [
            name for name, family in zip(names, known, strict=True) if family.exists and family.is_promised
        ]
        self.held: dict[str, list[Held]] = {name: [] for name in self.names}
        # Before anything can go wrong.
        self.plain = {
            name: run_alone(
                functools.partial(
                    Answer(PLAIN_PROMPT, torch.ones_like(PLAIN_PROMPT), 6).run, build_alone(name), None
                )
            )
            for name in self.names
        }
        self.actions: dict[str, tuple[int, Callable[[str], None]]] = {
            "prefill and generate": (5, self.start),
            "a later turn": (5, self.continue_text),
            "interrupted": (6, self.interrupt),
            "a wrong model": (3, self.misuse),
            "copy": (2, self.copy),
            "rewind": (2, self.rewind),
            "save and load": (2, self.save_and_load),
            "no cache": (3, self.call_plainly),
        }

    # -- helpers ------------------------------------------------------------------------------------------

    def build(self, name: str) -> Any:
        return families.build(name, families.FAMILIES[name].backends[0])

    def check(self, what: str, ours: Any, expected: Any) -> None:
        self.report.outcomes[what] += 1
        if ours != expected:
            raise Failure(f"{what}: {str(ours)[:300]} where alone it is {str(expected)[:300]}")

    def draw_prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        draw = self.draw
        lengths = [draw.randint(20, 110) for _ in range(draw.choice((1, 1, 2, 3)))]
        return oracles.left_pad([oracles.random_prompt(n, seed=draw.randint(0, 10**6)) for n in lengths])

    def draw_held(self, name: str | None = None, other_than: Held | None = None) -> Held | None:
        pool = [h for n in self.names for h in self.held[n] if name in (None, n) and h is not other_than]
        return self.draw.choice(pool) if pool else None

    def make_empty(self, name: str) -> Held:
        """Build a cache with drawn options, or with the defaults where the family refuses them."""
        options = self.draw.choice(OPTIONS)
        try:
            cache = RankKVCache(self.build(name), **options)
        except UnsupportedModelError:
            options, cache = {}, RankKVCache(self.build(name))
            self.report.outcomes["options that the family refuses by name"] += 1
        return Held(name, options, cache)

    def make_answer(self, held: Held) -> Answer:
        """Draw the next call of a cache: its first prompt, or its text with new tokens behind."""
        new_tokens = self.draw.randint(1, 6)
        if held.ids is None:
            return Answer(*self.draw_prompt(), new_tokens)
        if held.family in KEEPS_OFFSET:
            held.cache = held.cache.copy()
        rows, count = len(held.ids), self.draw.randint(1, 9)
        more = oracles.random_prompt(rows * count, seed=self.draw.randint(0, 10**6)).view(rows, count)
        ids = torch.cat([held.ids, more], dim=1)
        return Answer(ids, torch.cat([held.mask, torch.ones_like(more)], dim=1), new_tokens)

    def keep(self, held: Held) -> None:
        caches = self.held[held.family]
        caches.append(held)
        del caches[:-HELD_PER_FAMILY]

    def drop(self, held: Held) -> None:
        self.held[held.family] = [other for other in self.held[held.family] if other is not held]

    def record(self, held: Held, answer: Answer, tokens: list[list[int]]) -> None:
        held.steps.append(answer)
        held.ids = torch.cat([answer.ids, torch.tensor(tokens)], dim=1)
        held.mask = torch.cat(
            [answer.mask, torch.ones(len(tokens), answer.new_tokens, dtype=torch.long)], dim=1
        )

    def answer(self, held: Held) -> None:
        """Let a cache answer, and compare."""
        answer = self.make_answer(held)
        ours = find_outcome(functools.partial(answer.run, self.build(held.family), held.cache))
        self.check("an answer", ours, ask_oracle(held, answer))
        if ours[0] == "tokens":
            self.record(held, answer, ours[1])
        if ours[0] != "tokens" or held.answers >= MOST_ANSWERS:
            self.drop(held)

    def check_plain(self, name: str) -> None:
        call = Answer(PLAIN_PROMPT, torch.ones_like(PLAIN_PROMPT), 6)
        self.check("a call without a cache", call.run(self.build(name), None), self.plain[name])

    # -- calls --------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        held = self.make_empty(name)
        self.keep(held)
        self.answer(held)

    def continue_text(self, name: str) -> None:
        held = self.draw_held(name)
        return self.start(name) if held is None else self.answer(held)

    def call_plainly(self, name: str) -> None:
        self.check_plain(name)

    def copy(self, name: str) -> None:
        held = self.draw_held(name)
        if held is None:
            return self.start(name)
        copied = dataclasses.replace(held, cache=held.cache.copy(), steps=list(held.steps))
        self.keep(copied)
        # The copy goes on; the original must not notice, and is compared after it.
        self.answer(copied)
        self.answer(held)

    def rewind(self, name: str) -> None:
        held = self.draw_held(name)
        if held is None:
            return self.start(name)
        prompt = next(step for step in held.steps if isinstance(step, Answer)).ids.shape[1]
        seen = held.cache.seen_tokens
        step = Rewind(self.draw.randint(min(prompt, seen), seen))
        ours = find_outcome(functools.partial(step.run, None, held.cache))
        self.check("a rewind", ours, ask_oracle(held, step))
        if ours[0] == "tokens":
            held.steps.append(step)
            held.ids, held.mask = held.ids[:, : step.seen_tokens], held.mask[:, : step.seen_tokens]
        # A refused one has changed nothing.
        self.answer(held)

    def save_and_load(self, name: str) -> None:
        held = self.draw_held(name)
        if held is None:
            return self.start(name)
        try:
            path = held.cache.save(self.folder / f"{self.draw.randint(0, 10**6)}.safetensors")
        except CacheStateError:
            self.report.outcomes["a cache that cannot be saved says so"] += 1
        else:
            held.cache = RankKVCache.load(path, self.build(name))
            path.unlink()
        self.answer(held)

    def misuse(self, name: str) -> None:
        held = self.draw_held(name)
        if held is None:
            return self.start(name)
        other = self.draw.choice([n for n in [*self.names, *OTHERS] if n != name])
        answer = self.make_answer(held)
        wrong = dataclasses.replace(answer, ids=answer.ids % 128)
        try:
            wrong.run(self.build(other), held.cache)
        except RankKVError:
            self.report.outcomes["a wrong model is refused by name"] += 1
        except Exception:
            # Stopped by transformers or torch, before the package sees whose attention it is.
            self.report.outcomes["a wrong model stops in transformers"] += 1
        else:
            raise Failure(f"the cache of {name} served {other} without a word")
        self.check_plain(name)
        if other in self.plain:
            self.check_plain(other)
        self.check_after(held, answer)

    def interrupt(self, name: str) -> None:
        held = self.draw_held(name) if self.draw.random() < 0.6 else None
        held = held or self.make_empty(name)
        model, answer, error = self.build(name), self.make_answer(held), self.draw.choice(KINDS)()
        seen = held.cache.seen_tokens
        if self.draw.random() < 0.5:
            modules = [module for module in model.modules() if module is not model]
            interruption = raise_in_module(
                self.draw.choice(modules), error, self.draw.randint(1, 3), self.draw.random() < 0.5
            )
        else:
            interruption = raise_at_line(error, int(10 ** self.draw.uniform(0, 3.7)))
        tokens = None
        try:
            with interruption as raised:
                tokens = answer.run(model, held.cache)
        except (KeyboardInterrupt, torch.OutOfMemoryError, HookError):
            pass
        self.report.outcomes[f"interrupted by {raised[0]}" if raised else "the draw came too late"] += 1
        self.drop(held)
        self.check_plain(name)
        other = self.draw_held(other_than=held)
        if other is not None:
            self.answer(other)
        if tokens is not None:
            self.check("an answer", ("tokens", tokens), ask_oracle(held, answer))
        else:
            self.check_after(held, answer, seen)
        # Whatever happened, reset() makes it an empty one.
        held.cache.reset()
        held.steps, held.ids, held.mask = [], None, None
        self.answer(held)

    def check_after(self, held: Held, answer: Answer, before: int | None = None) -> None:
        """Check that a cache with a trouble behind it says so, or answers as if there had been none."""
        cache = held.cache
        try:
            seen = cache.copy().seen_tokens
        except RankKVError:
            self.report.outcomes["an interrupted cache says so"] += 1
            return self.drop(held)
        before = held.cache.seen_tokens if before is None else before
        steps: list[Answer | Rewind] = []
        if seen > before:
            # The forward ran to its end and something behind it failed: these tokens count.
            length = answer.ids.shape[1]
            if seen < length:
                raise Failure(
                    f"a cache of {before} tokens has {seen} after an interrupted prompt of {length}"
                )
            shorter = dataclasses.replace(answer, new_tokens=seen - length + 1)
            steps = [shorter]
            kind, tokens = ask_oracle(held, shorter)
            if kind != "tokens":
                raise Failure(f"{kind}: {tokens}")
            new = torch.tensor(tokens)
            ids = torch.cat([answer.ids, new, new % 100 + 3], dim=1)
            mask = torch.cat([answer.mask, torch.ones_like(new), torch.ones_like(new)], dim=1)
            answer = Answer(ids, mask, 3)
        expected = ask_oracle(held, *steps, answer)
        if held.family in KEEPS_OFFSET:
            cache = cache.copy()
        ours = find_outcome(functools.partial(answer.run, self.build(held.family), cache))
        if ours[0] != "tokens" and expected[0] == "tokens":
            self.report.outcomes["an interrupted cache says so"] += 1
        else:
            self.check("an answer after a trouble that the cache did not see", ours, expected)
        return self.drop(held)


def run_mixture(calls: int, seed: int = 0, names: list[str] | None = None) -> Report:
    """Run random calls and report."""
    report = Report()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixture = Mixture(seed, report, Path(folder), NAMES if names is None else names)
        weights = [weight for weight, _ in mixture.actions.values()]
        for number in range(calls):
            name = mixture.draw.choice(mixture.names)
            action = mixture.draw.choices(list(mixture.actions), weights)[0]
            report.calls[action] += 1
            report.families[name] += 1
            try:
                mixture.actions[action][1](name)
            except Exception as error:
                where = "".join(traceback.format_tb(error.__traceback__)[-6:])
                report.failures.append(
                    f"call {number} of seed {seed}, {action} with {name}: {type(error).__name__}: {error}\n{where}"
                )
                # What follows would only repeat it.
                mixture.held[name] = []
    return report


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = run_mixture(options.calls, options.seed)
    print(report)
    raise SystemExit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
