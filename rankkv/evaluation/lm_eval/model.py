"""Benchmarks of lm-evaluation-harness on a compressed cache: the model ``rankkv`` of its registry.

Importing this module registers the model; it needs the package ``lm-eval``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from ...budget.plan import BudgetPlan
from ...cache.cache import RankKVCache
from ...cache.prefill import run_prefill
from ...config import RankKVConfig
from ...errors import ConfigError, UnsupportedModelError
from ...models.compat import cache_argument
from ...models.embedded import EMBEDDED
from ...models.loading import load_model
from ...selection import get_selector
from .prompt_split import PromptSplit

_LOGGER = logging.getLogger(__name__)
_OPTIONS = frozenset(item.name for item in fields(RankKVConfig))


@register_model("rankkv")
class RankKVLM(HFLM):
    r"""The harness' Hugging Face model with a compressed KV cache in every request.

    **Log-likelihood**: the prompt is prefilled, its cache compressed, then the continuation scored from that cache, one
    request after the other; requests that share a prompt share its prefill.  The prompt's last token is held back and
    fed after the compression, so every scored token, that of a one-letter answer too, is predicted from the compressed
    cache.

    **Rolling log-likelihood**: the harness' own windows, each scored in blocks of ``rolling_block`` tokens, or of half
    of the window, if that is less; what stands before a block in its window is prefilled and compressed for it.  The
    first block of a window has nothing before it and is scored whole.

    **Generation**: ``generate()`` with the compressed cache.

    Question-aware (the default), the whole prompt is compressed, and the question stands in the observation window.
    Question-agnostic, the context alone is compressed, and the rest of the prompt is fed after that.  The context ends
    where the last occurrence of the document's field ``context_field`` in the prompt ends, or, without such a field,
    where the last ``question_separator`` stands (it belongs to the question).

    With ``compression_ratio=1.0`` the numbers are those of the harness' own ``hf``.

    Parameters
    ----------
    pretrained : str or PreTrainedModel, default "embedded"
        Hub id, local folder, a model, or ``"embedded"``.
    question_aware : bool, default True
        Whether the question is compressed with the context.
    question_separator : str, default "\n"
        Where the question begins if not ``question_aware``; ``\n`` in it stands for the end of a line.
    context_field : str, optional
        Field of a task's documents that holds the context, such as ``"context"`` in LongBench.
    rolling_block : int, default 512
        Tokens scored from one compressed cache in rolling tasks.
    **options
        Options of :class:`~rankkv.RankKVConfig` go to the cache, all others to the harness' model.

    Raises
    ------
    ConfigError, UnknownNameError
        If an option lies outside its range or is not registered.
    InputError
        While it runs: if a prompt cannot be split into context and question.
    UnsupportedModelError
        If it is no causal language model, or its attention cannot be observed.

    Attributes
    ----------
    config_of_cache : RankKVConfig
        The options of every cache.
    """

    def __init__(
        self,
        pretrained: Any = EMBEDDED,
        *,
        question_aware: bool = True,
        question_separator: str = "\n",
        context_field: str | None = None,
        rolling_block: int = 512,
        **options: Any,
    ) -> None:
        own = {name: _read(options.pop(name)) for name in _OPTIONS & set(options)}
        self.config_of_cache = RankKVConfig(**own)
        BudgetPlan.check(self.config_of_cache)
        get_selector(self.config_of_cache.selector)
        if isinstance(rolling_block, bool) or not isinstance(rolling_block, int) or rolling_block < 1:
            raise ConfigError(f"rolling_block={rolling_block!r} must be an integer of at least 1.")
        self._split = PromptSplit(question_aware, question_separator, context_field)
        self._block = rolling_block
        self._prompts: list[str] = []
        self._kept_bytes = self._full_bytes = self._caches = 0
        if pretrained == EMBEDDED:
            dtype, device = options.pop("dtype", None), options.get("device")
            pretrained, options["tokenizer"] = load_model(EMBEDDED, None if dtype == "auto" else dtype)
            if device is not None and (device == "cpu" or torch.cuda.is_available()):
                pretrained.to(device)
        super().__init__(pretrained=pretrained, **options)
        if self.backend != "causal":
            raise UnsupportedModelError(
                "RankKV compresses the cache of causal language models; this one is seq2seq."
            )

    # -- what the harness asks for --------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations of prompts; see the class for what is compressed."""
        self._split.note(requests)
        answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._warn_if_whole()
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts; see the class for what is compressed."""
        answers = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        self._warn_if_whole()
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate from prompts; see the class for what is compressed."""
        self._split.note(requests)
        answers = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._warn_if_whole()
        return answers

    # -- log-likelihood -------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        shared: dict[tuple[int, ...], list[tuple[int, list[int], list[int]]]] = {}
        bar = tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring from compressed caches"
        )
        for number, (key, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            if key is None:
                # The harness' rolling windows come without strings.
                answers[number] = self._score_blocks(whole, len(whole) - len(continuation))
                bar.update()
                continue
            held = self._split.count(key[0], context, self.tok_encode) - (
                len(context) + len(continuation) - len(whole)
            )
            # One token at least is fed after the compression, so that the cache is read for all that is scored.
            held = max(0, min(held, len(whole) - len(continuation) - 1))
            shared.setdefault(tuple(whole[:held]), []).append((number, whole[held:], continuation))
        for compressed, waiting in shared.items():
            cache = self._compress(compressed)
            for place, (number, fed, continuation) in enumerate(waiting):
                own = cache if cache is None or place == len(waiting) - 1 else cache.copy()
                answers[number] = self._score(fed, len(continuation), own)
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                bar.update()
        bar.close()
        return answers

    def _score_blocks(self, whole: Sequence[int], start: int) -> tuple[float, bool]:
        """Score ``whole[start:]`` in blocks, each from the compressed cache of what stands before it."""
        total, greedy = 0.0, True
        # At least two blocks: a single one would never read a compressed cache.
        block = min(self._block, max(1, -(-(len(whole) - start) // 2)))
        for begin in range(start, len(whole), block):
            end = min(begin + block, len(whole))
            # As above, the last token before the block is fed with it.
            cache = self._compress(whole[: begin - 1])
            loss, right = self._score(whole[max(begin - 1, 0) : end], end - begin, cache)
            total, greedy = total + loss, greedy and right
        return total, greedy

    def _compress(self, ids: Sequence[int]) -> RankKVCache | None:
        """Prefill ids and return their compressed cache; None of no ids."""
        if len(ids) == 0:
            return None
        cache = RankKVCache(self.model, config=self.config_of_cache)
        with self._autocast():
            run_prefill(self.model, cache, torch.tensor(ids, device=self.device)[None])
        cache.finish()
        self._note_bytes(cache)
        return cache

    def _score(self, fed: Sequence[int], scored: int, cache: RankKVCache | None) -> tuple[float, bool]:
        """Return the log-likelihood of the last ``scored`` ids fed, and whether greedy decoding says them."""
        ids = torch.tensor(fed, device=self.device)[None]
        options = {} if cache is None else {"use_cache": True, **cache_argument(cache)}
        with torch.no_grad(), self._autocast():
            logits: Tensor = self.model(input_ids=ids[:, :-1], **options).logits[0, -scored:]
        predicted = logits.log_softmax(dim=-1, dtype=self.softmax_dtype)
        wanted = ids[0, -scored:]
        found = predicted.gather(-1, wanted[:, None])
        return float(found.sum()), bool((predicted.argmax(dim=-1) == wanted).all())

    # -- generation -----------------------------------------------------------------------------------

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tokenize prompts, and remember whose rows they are."""
        self._prompts = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        mask = options.pop("attention_mask")
        if self._split.question_aware:
            cache = RankKVCache(self.model, config=self.config_of_cache)
            output = super()._model_generate(
                context, max_length, stop, attention_mask=mask, **cache_argument(cache), **options
            )
            self._note_bytes(cache)
            return output
        rows = [
            self._generate_after(ids[real.bool()], prompt, max_length - context.shape[1], stop, options)
            for ids, real, prompt in zip(context, mask, self._prompts, strict=True)
        ]
        longest = max(len(row) for row in rows)
        padded = context.new_full((len(rows), longest), self.tokenizer.pad_token_id)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = row
        return torch.cat([context, padded], dim=1)

    def _generate_after(
        self, ids: Tensor, prompt: str, new_tokens: int, stop: list[str], options: Mapping[str, Any]
    ) -> Tensor:
        """Compress one prompt's context, feed its question, and return what is generated."""
        whole = self.tok_encode(prompt)
        held = self._split.count(prompt, whole, self.tok_encode) - (len(whole) - len(ids))
        # The question's last token at least is fed after the compression.
        cache = self._compress(ids[: max(0, min(held, len(ids) - 1))].tolist())
        given = {} if cache is None else cache_argument(cache)
        output = super()._model_generate(
            ids[None],
            len(ids) + new_tokens,
            stop,
            attention_mask=torch.ones_like(ids)[None],
            **given,
            **options,
        )
        return output[0, len(ids) :]

    # -- what it was ----------------------------------------------------------------------------------

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    def _note_bytes(self, cache: RankKVCache) -> None:
        self._kept_bytes += cache.cache_bytes()
        self._full_bytes += cache.full_cache_bytes()
        self._caches += 1

    @property
    def question_aware(self) -> bool:
        """True if the whole prompt is compressed."""
        return self._split.question_aware

    @property
    def mean_bytes(self) -> tuple[float | None, float | None]:
        """Mean bytes of the caches so far, compressed and whole; of a generation, with what was generated."""
        many = self._caches
        return (self._kept_bytes / many, self._full_bytes / many) if many else (None, None)

    def _warn_if_whole(self) -> None:
        asked = self.config_of_cache
        if self._kept_bytes == self._full_bytes and (
            asked.compression_ratio < 1.0 or asked.budget is not None
        ):
            _LOGGER.warning(
                "Nothing was evicted from any cache: every prompt, or every context, is shorter than what all layers "
                "keep, so these numbers are those of the full cache."
            )

    def get_model_info(self) -> dict[str, Any]:
        """Return the harness' facts of the model, the options of the cache, and the share of it that was kept."""
        return {
            **super().get_model_info(),
            "rankkv": {
                **self.config_of_cache.to_dict(),
                **self._split.to_dict(),
                "rolling_block": self._block,
                "kept_share": self._kept_bytes / self._full_bytes if self._full_bytes else None,
            },
        }


def _read(value: Any) -> Any:
    """Return an option as the command line cannot give it: nothing written as None."""
    return None if value in ("None", "none", "null") else value
