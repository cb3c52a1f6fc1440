"""Measure what compressing each layer of a model costs, text by text, into a `RankProfile`."""

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

# One for each of `rankkv.calibration.settings.METHODS`.
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
    """Measure a profile: what compressing each layer costs, on pieces of the texts given.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed where texts are strings.
    texts : sequence of str or Tensor
        Strings, or token ids ``[token]`` or ``[1, token]``; several kinds of text mixed make a profile that holds
        for all of them.
    context_tokens, continuation_tokens : int
        A piece is so many tokens compressed and so many scored.
    max_texts : int, default 12
        Most pieces measured; of more, so many are taken, spread evenly.
    ratios : sequence of float
        Fractions kept at which each layer is compressed alone.
    base_ratio : float, default 0.1
        Fraction kept of all layers while one gets its full cache back.
    selector : str or Selector, default "snapkv"
        Token selection method.
    heads : bool, default True
        Whether each key/value head gets its full cache back alone, too: what ``head_budgets="profile"`` needs, at one
        more continuation a head. Not under tensor parallelism, where a process has some of them only, nor on flash
        attention, whose mask is one for all of them: there a measured profile holds layers only.
    method : {"measured", "gradient"}, default "measured"
        Whether each layer, ratio and head takes a continuation of its own, or all are estimated to first order from one
        forward and backward pass (:func:`rankkv.calibration.gradient.measure_gradients`): many times as fast, so that
        more pieces can be measured. Refused under tensor parallelism and on flash and flex attention.
    name : str, optional
        What to call the model.
    resume_path : str or Path, optional
        File that takes each piece's measurements as they are made; pieces found in it are not measured again. One that
        was begun for another model, with other settings or by another version is refused.
    on_progress : callable, optional
        Called with (continuations done, in all), those of this process; with gradients, with pieces.
    share_processes : bool, default False
        Split the pieces over the processes that ``accelerate launch`` or ``torchrun`` started, all of which must then
        call this with the same arguments; each gets the whole profile.

    Returns
    -------
    RankProfile
        Means over the pieces.

    Raises
    ------
    InputError
        If no text is long enough, strings come without a tokenizer, or the file to go on from belongs to another
        calibration.
    ConfigError
        If a number is out of range.
    UnknownNameError
        If there is no such method.
    UnsupportedModelError
        If the model's attention has no gradient and the method needs one.

    Notes
    -----
    One prefill a piece, then ``(len(ratios) + 1) * layers`` continuations, and one a head; what lies below the first
    layer that differs is run once, so that they cost about half of as many forwards. With gradients two continuations,
    one of which is differentiated, and attention with each ratio.
    """
    settings = CalibrationSettings(
        context_tokens, continuation_tokens, max_texts, tuple(ratios), base_ratio, selector, heads, method
    )
    if method == "gradient":
        check_differentiable(model)
    pieces = settings.cut(tokenizer, texts)
    subject = describe_subject(model, name)
    # Tensor-parallel processes measure each piece together.
    shared = share_processes and find_head_shards(model) is None
    done = DoneRecords(
        resume_path, settings.describe(subject), find_process_rank().rank if share_processes else 0
    )
    own = split_samples(pieces) if shared else pieces
    cells = settings.count_cells(subject)
    records = []
    for number, ids in enumerate(own):
        key = settings.make_key(ids)
        if key not in done:
            counter = itertools.count(number * cells + 1)
            report = None
            if on_progress is not None:
                report = functools.partial(_report, on_progress, counter, len(own) * cells)
            done.add(key, measure_piece(model, ids, settings, report))
        records.append(done[key])
    return join_pieces(gather(records) if shared else records, subject, settings)


def describe_subject(model: Any, name: str | None = None) -> dict[str, Any]:
    """Describe the model that is measured, JSON-ready: shape, sampled weights, dtype, compressible layers and name."""
    return {
        "shape": describe_shape(model),
        "sample": sample_weights(model),
        "layers": list(RankKVCache(model, profile=None).layer_indices),
        "heads": can_measure_heads(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "name": name or model.config._name_or_path or "",
    }


def measure_piece(
    model: Any,
    ids: Sequence[int],
    settings: CalibrationSettings,
    on_cell: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Measure one piece, given as token ids, by `measure_text` or `measure_gradients`."""
    input_ids = torch.tensor([list(ids)], device=find_input_device(model))
    return _MEASURERS[settings.method](
        model,
        input_ids,
        settings.context_tokens,
        settings.ratios,
        settings.base_ratio,
        settings.selector,
        settings.heads and can_measure_heads(model),
        on_cell,
    )


def join_pieces(
    records: Sequence[Mapping[str, Any]], subject: Mapping[str, Any], settings: CalibrationSettings
) -> RankProfile:
    """Join the measurements of all pieces, in their order, to the profile of the model."""
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
    """Join what `measure_text` gave for several texts to one profile, rounded to six digits."""

    def average(field: str) -> Any:
        return _round(torch.tensor([record[field] for record in records], dtype=torch.float64).mean(0))

    ranks = {}
    for kind in records[0]["ranks"]:
        values = torch.tensor([record["ranks"][kind] for record in records], dtype=torch.float64)
        ranks[kind] = {"mean": _round(values.mean(0)), "std": _round(values.std(0, correction=0))}
    told = {
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
        calibration={**calibration, **told},
        name=name,
    )


def _average_heads(tables: Sequence[Sequence[Sequence[float]]]) -> Any:
    """Return means over the texts, ``[layer][kv_head]``; layers may have different numbers of heads."""
    return [_round(torch.tensor(rows, dtype=torch.float64).mean(0)) for rows in zip(*tables, strict=True)]


def _round(values: Tensor) -> Any:
    nested = values.tolist()

    def shorten(value: Any) -> Any:
        return [shorten(item) for item in value] if isinstance(value, list) else float(f"{value:.6g}")

    return shorten(nested)


def _report(on_progress: Callable[[int, int], None], counter: Iterator[int], total: int) -> None:
    on_progress(next(counter), total)
