"""Model ``rankkv`` of lm-evaluation-harness, which compresses the KV cache of every request.

An import of this module registers the model.  It needs the package ``lm-eval``.
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
from ...cache.prefill import build_cache, run_prefill
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
    r"""Run the harness' Hugging Face model with a compressed KV cache in every request.

    **Log-likelihood**: prefill the prompt, compress its cache, and score the continuation from that cache, one request
    after the other.  Requests with the same prompt share its prefill.  The prompt's last token is fed after the
    compression.  Every scored token is then predicted from the compressed cache, even a one-letter answer.

    **Rolling log-likelihood**: score each of the harness' windows in blocks of ``rolling_block`` tokens, or of half of
    the window if that is less.  The tokens before a block in its window are prefilled and compressed for it.  The
    first block of a window has no tokens before it and is scored without a cache.

    **Generation**: ``generate()`` with the compressed cache.

    If ``question_aware`` (the default), the whole prompt is compressed, and the question stands in the observation
    window.  Otherwise only the context is compressed, and the rest of the prompt is fed after that.  The context ends
    with the last occurrence of the document's field ``context_field``.  Without such a field it ends before the last
    ``question_separator``, which belongs to the question.

    With ``compression_ratio=1.0`` the results equal those of the harness' own ``hf``.

    Parameters
    ----------
    pretrained : str or PreTrainedModel, default "embedded"
        Hub id, local folder, a model, or ``"embedded"``.
    question_aware : bool, default True
        If True, compress the question with the context.
    question_separator : str, default "\n"
        Beginning of the question if not ``question_aware``; the two characters ``\n`` stand for a newline.
    context_field : str, optional
        Field of a task's documents that holds the context, such as ``"context"`` in LongBench.
    rolling_block : int, default 512
        Tokens scored from one compressed cache in rolling tasks.
    **options
        Options of :class:`~rankkv.RankKVConfig` go to the cache, all others to the harness' model.

    Raises
    ------
    ConfigError
        If an option lies outside its range.
    UnknownNameError
        If a name is not registered.
    InputError
        During a run, if a prompt cannot be split into context and question.
    UnsupportedModelError
        If the model is not a causal language model, or its attention cannot be observed.

    Attributes
    ----------
    config_of_cache : RankKVConfig
        Options of every cache.
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
        own = {name: _parse_none(options.pop(name)) for name in _OPTIONS & set(options)}
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
                f"the model's backend is {self.backend!r} but must be causal: use a causal language model."
            )

    # -- requests of the harness ----------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations of prompts; the class describes what is compressed."""
        self._split.note(requests)
        answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._warn_if_whole()
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts; the class describes what is compressed."""
        answers = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        self._warn_if_whole()
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate from prompts; the class describes what is compressed."""
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
                # Rolling windows have no strings as their key.
                answers[number] = self._score_blocks(whole, len(whole) - len(continuation))
                bar.update()
                continue
            held = self._split.count(key[0], context, self.tok_encode) - (
                len(context) + len(continuation) - len(whole)
            )
            # Feed at least one token after the compression, so that every scored token is predicted from the cache.
            held = max(0, min(held, len(whole) - len(continuation) - 1))
            shared.setdefault(tuple(whole[:held]), []).append((number, whole[held:], continuation))
        for compressed, waiting in shared.items():
            cache = self._compress(compressed)
            for place, (number, fed, continuation) in enumerate(waiting):
                # Scoring appends to the cache: only the last request may use the cache itself.
                own = cache if cache is None or place == len(waiting) - 1 else cache.copy()
                answers[number] = self._score(fed, len(continuation), own)
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                bar.update()
        bar.close()
        return answers

    def _score_blocks(self, whole: Sequence[int], start: int) -> tuple[float, bool]:
        """Score ``whole[start:]`` in blocks, each from the compressed cache of the tokens before it."""
        total, greedy = 0.0, True
        # At least two blocks: a single block would never read a compressed cache.
        block = min(self._block, max(1, -(-(len(whole) - start) // 2)))
        for begin in range(start, len(whole), block):
            end = min(begin + block, len(whole))
            # The last token before the block is fed with it, as in `_loglikelihood_tokens`.
            cache = self._compress(whole[: begin - 1])
            loss, right = self._score(whole[max(begin - 1, 0) : end], end - begin, cache)
            total, greedy = total + loss, greedy and right
        return total, greedy

    def _compress(self, ids: Sequence[int]) -> RankKVCache | None:
        """Prefill ids and return their compressed cache; None if there are no ids."""
        if len(ids) == 0:
            return None
        input_ids = torch.tensor(ids, device=self.device)[None]
        cache = build_cache(self.model, input_ids, self.tokenizer, config=self.config_of_cache)
        with self._autocast():
            run_prefill(self.model, cache, input_ids)
            cache.finish()
        self._note_bytes(cache)
        return cache

    def _score(self, fed: Sequence[int], scored: int, cache: RankKVCache | None) -> tuple[float, bool]:
        """Return the log-likelihood of the last ``scored`` ids, and True if greedy decoding gives them."""
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
        """Tokenize prompts, and remember them for `_model_generate`, which receives only ids."""
        self._prompts = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Generate after a batch of prompts, left-padded; the harness calls this."""
        mask = options.pop("attention_mask")
        if self._split.question_aware:
            cache = build_cache(self.model, context, self.tokenizer, config=self.config_of_cache)
            output = super()._model_generate(
                context, max_length, stop, attention_mask=mask, **cache_argument(cache), **options
            )
            # An answer of one token leaves a prompt that waits for its replay uncompressed.
            self._note_bytes(cache.finish())
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
        """Compress one prompt's context, feed its question, and return the generated ids."""
        whole = self.tok_encode(prompt)
        # The harness may have cut the beginning of the prompt, so the context is shorter by as much.
        held = self._split.count(prompt, whole, self.tok_encode) - (len(whole) - len(ids))
        # Feed at least the last token of the question after the compression.
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

    # -- cache sizes and facts ------------------------------------------------------------------------

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    def _note_bytes(self, cache: RankKVCache) -> None:
        self._kept_bytes += cache.kept_bytes()
        self._full_bytes += cache.full_cache_bytes()
        self._caches += 1

    @property
    def question_aware(self) -> bool:
        """True if the whole prompt is compressed."""
        return self._split.question_aware

    @property
    def mean_bytes(self) -> tuple[float | None, float | None]:
        """Mean bytes of the caches so far, compressed and full; generated tokens count too."""
        many = self._caches
        return (self._kept_bytes / many, self._full_bytes / many) if many else (None, None)

    def _warn_if_whole(self) -> None:
        """Warn if compression is on but evicted nothing."""
        config = self.config_of_cache
        if self._kept_bytes == self._full_bytes and (
            config.compression_ratio < 1.0 or config.budget is not None
        ):
            _LOGGER.warning(
                "Nothing was evicted, because every prompt (or context) is shorter than the budget of all layers: "
                "these results are those of the full cache; use longer prompts or a lower budget."
            )

    def get_model_info(self) -> dict[str, Any]:
        """Return the harness' facts about the model, the options of the cache, and the share kept."""
        return {
            **super().get_model_info(),
            "rankkv": {
                **self.config_of_cache.to_dict(),
                **self._split.to_dict(),
                "rolling_block": self._block,
                "kept_share": self._kept_bytes / self._full_bytes if self._full_bytes else None,
            },
        }


def _parse_none(value: Any) -> Any:
    """Return None for the strings "None", "none" and "null": a command line cannot pass None itself."""
    return None if value in ("None", "none", "null") else value
