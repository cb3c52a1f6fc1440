"""Calibration of a `RankProfile`: measurements of text chunks in this process, averaged to one profile."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..cache.cache import RankKVCache
from ..models.placement import find_input_device
from ..models.tensor_parallel import find_head_shards
from ..profile.known import describe_shape, sample_weights
from ..profile.record import RankProfile
from ..utils.processes import find_process_rank, gather, split_samples
from .gradient import check_differentiable, measure_gradients
from .progress import DoneRecords
from .settings import BASE_RATIO, RATIOS, CalibrationSettings
from .single_runs import can_measure_heads, measure_text

# One function for each of `rankkv.calibration.settings.METHODS`.
_MEASURERS: dict[str, Callable[..., dict[str, Any]]] = {
    "measured": measure_text,
    "gradient": measure_gradients,
}


def calibrate(
    model: Any,
    tokenizer: Any = None,
    texts: Any = None,
    *,
    context_tokens: int = 1024,
    continuation_tokens: int = 256,
    max_texts: int = 12,
    ratios: Sequence[float] = RATIOS,
    base_ratio: float = BASE_RATIO,
    selector: Any = "snapkv",
    heads: bool = True,
    method: str = "measured",
    name: str | None = None,
    resume_path: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    share_processes: bool = False,
) -> RankProfile:
    """Measure a profile: the cost of compressing each layer, on chunks of the given texts.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed for texts that are strings.
    texts : sequence of str or Tensor
        Strings, or token ids ``[token]`` or ``[1, token]``. A mixture of several kinds of text makes a profile that
        holds for all of them.
    context_tokens, continuation_tokens : int
        Compressed and scored tokens of each text chunk.
    max_texts : int, default 12
        Most text chunks measured; of more, evenly spread ones are used.
    ratios : sequence of float
        Fractions kept at which each layer is compressed alone.
    base_ratio : float, default 0.1
        Fraction kept of all layers while one gets its full cache back.
    selector : str or Selector, default "snapkv"
        Token selection method.
    heads : bool, default True
        Measure each key/value head too, with one more continuation per head: it alone gets its full cache back.
        ``head_budgets="profile"`` needs this. With method "measured", a profile holds layers only under tensor
        parallelism, where a process has only some heads, and on flash attention, which has one mask for all heads.
    method : {"measured", "gradient"}, default "measured"
        "measured" runs one continuation per layer, ratio and head. "gradient" estimates all of them to first order from
        one forward and backward pass (:func:`rankkv.calibration.gradient.measure_gradients`). It is many times as fast,
        so more text chunks can be measured. It fails under tensor parallelism and on flash and flex attention.
    name : str, optional
        Name of the model in the profile.
    resume_path : str or Path, optional
        File that stores each text chunk's measurements as soon as they are made. Chunks found in it are not measured
        again. A file of another model, other settings or another version is an error.
    on_progress : callable, optional
        Called with (continuations done, all continuations) of this process; with gradients, with text chunks.
    share_processes : bool, default False
        Split the text chunks over the processes that ``accelerate launch`` or ``torchrun`` started. All of them must
        call this with the same arguments; each gets the whole profile.

    Returns
    -------
    RankProfile
        Means over the text chunks.

    Raises
    ------
    InputError
        If no text is long enough, strings come without a tokenizer, or the file to resume from belongs to another
        calibration.
    ConfigError
        If a number is out of range.
    UnknownNameError
        If ``method`` is not one of these.
    UnsupportedModelError
        If the method needs a gradient and the model's attention has none.

    Notes
    -----
    Each text chunk takes one prefill, then ``(len(ratios) + 1) * layers`` continuations and one per head. The layers
    below the first layer that differs are run only once, so a continuation costs about half a forward pass. With
    gradients there are two continuations, one of them differentiated, and attention is run with each ratio.
    """
    settings = CalibrationSettings(
        context_tokens, continuation_tokens, max_texts, tuple(ratios), base_ratio, selector, heads, method
    )
    if method == "gradient":
        check_differentiable(model)
    chunks = settings.cut(tokenizer, texts)
    subject = describe_subject(model, name)
    # Tensor-parallel processes measure each text chunk together.
    shared = share_processes and find_head_shards(model) is None
    done = DoneRecords(
        resume_path, settings.describe(subject), find_process_rank().rank if share_processes else 0
    )
    own = split_samples(chunks) if shared else chunks
    steps = settings.count_steps(subject)
    records = []
    for number, ids in enumerate(own):
        key = settings.make_key(ids)
        if key not in done:
            counter = itertools.count(number * steps + 1)
            report = None
            if on_progress is not None:
                report = functools.partial(_report, on_progress, counter, len(own) * steps)
            done.add(key, measure_chunk(model, ids, settings, report))
        records.append(done[key])
    return join_chunks(gather(records) if shared else records, subject, settings)


def describe_subject(model: Any, name: str | None = None) -> dict[str, Any]:
    """Describe the measured model, JSON-ready: shape, sampled weights, dtype, compressible layers and name."""
    return {
        "shape": describe_shape(model),
        "sample": sample_weights(model),
        "layers": list(RankKVCache(model, profile=None).layer_indices),
        "heads": can_measure_heads(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "name": name or model.config._name_or_path or "",
    }


def measure_chunk(
    model: Any,
    ids: Sequence[int],
    settings: CalibrationSettings,
    on_step: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Measure one text chunk, given as token ids, by `measure_text` or `measure_gradients`."""
    input_ids = torch.tensor([list(ids)], device=find_input_device(model))
    return _MEASURERS[settings.method](
        model,
        input_ids,
        settings.context_tokens,
        settings.ratios,
        settings.base_ratio,
        settings.selector,
        settings.heads and can_measure_heads(model),
        on_step,
    )


def join_chunks(
    records: Sequence[Mapping[str, Any]], subject: Mapping[str, Any], settings: CalibrationSettings
) -> RankProfile:
    """Average the measurements of all text chunks, in their order, to the profile of the model."""
    calibration = {
        "texts": len(records),
        "context_tokens": settings.context_tokens,
        "continuation_tokens": settings.continuation_tokens,
        "selector": str(settings.selector),
        "method": settings.method,
        "dtype": subject["dtype"],
        "rankkv": __version__,
    }
    return join_records(
        records,
        subject["shape"],
        subject["sample"],
        settings.ratios,
        settings.base_ratio,
        calibration,
        subject["name"],
    )


def join_records(
    records: Sequence[Mapping[str, Any]],
    shape: Mapping[str, Any],
    sample: Sequence[float],
    ratios: Sequence[float],
    base_ratio: float,
    calibration: Mapping[str, Any],
    name: str,
) -> RankProfile:
    """Average records of `measure_text` to one profile, rounded to six digits."""

    def average(field: str) -> Any:
        return _round(torch.tensor([record[field] for record in records], dtype=torch.float64).mean(0))

    ranks = {}
    for kind in records[0]["ranks"]:
        values = torch.tensor([record["ranks"][kind] for record in records], dtype=torch.float64)
        ranks[kind] = {"mean": _round(values.mean(0)), "std": _round(values.std(0, correction=0))}
    distances = {
        "nll": average("nll"),
        "base_excess_loss": average("base_excess_loss"),
        "base_divergence": average("base_divergence"),
    }
    return RankProfile(
        model=shape,
        weight_sample=_round(torch.tensor(list(sample), dtype=torch.float64)),
        layer_indices=records[0]["layer_indices"],
        ratios=tuple(ratios),
        excess_loss=average("excess_loss"),
        divergence=average("divergence"),
        gain_loss=average("gain_loss"),
        gain_divergence=average("gain_divergence"),
        head_gain_divergence=_average_heads([record["head_gain_divergence"] for record in records]),
        base_ratio=base_ratio,
        ranks=ranks,
        calibration={**calibration, **distances},
        name=name,
    )


def _average_heads(tables: Sequence[Sequence[Sequence[float]]]) -> Any:
    """Average over the texts, ``[layer][kv_head]``; layers may differ in their numbers of heads."""
    return [_round(torch.tensor(rows, dtype=torch.float64).mean(0)) for rows in zip(*tables, strict=True)]


def _round(values: Tensor) -> Any:
    """Convert to nested lists of numbers rounded to six significant digits."""
    nested = values.tolist()

    def shorten(value: Any) -> Any:
        return [shorten(item) for item in value] if isinstance(value, list) else float(f"{value:.6g}")

    return shorten(nested)


def _report(on_progress: Callable[[int, int], None], counter: Iterator[int], total: int) -> None:
    on_progress(next(counter), total)
