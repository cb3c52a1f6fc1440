"""Pipeline ``"rankkv-text-generation"``: compress one context once, then answer many questions about it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from ..cache.cache import RankKVCache
from ..cache.prefill import build_cache, compress
from ..config import RankKVConfig, complete_options, join_options
from ..errors import ConfigError, InputError, UnknownNameError
from ..models.compat import cache_argument
from ..models.prompts import split_prompt

TASK = "rankkv-text-generation"

_CACHE_OPTIONS = {item.name for item in fields(RankKVConfig)} | {"config"}
_PROMPT_OPTIONS = {
    "answer_prefix", "max_context_length", "system_prompt", "use_chat_template", "template_options",
}  # fmt: skip
_OWN_OPTIONS = {"question", "questions", "question_aware", "max_new_tokens", "return_details"}
_GENERATE_OPTIONS = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | {
    "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer",
    "assistant_model",
}  # fmt: skip
#: Options of greedy decoding.  Model repositories set the sampling options, and transformers would warn about them.
_SAMPLING_OFF = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
#: A tokenizer without a limit reports one above this number of tokens.
_NO_LIMIT = 10**9


class RankKVTextGenerationPipeline(Pipeline):
    """Answer questions about a context from its compressed KV cache.

    The context is prefilled and compressed once.  Every question is answered on a copy of that cache, so their order
    and number do not change an answer.  Task name and arguments ``question``, ``questions``, ``answer_prefix``,
    ``max_new_tokens`` and ``max_context_length`` mean the same as in kvpress' pipeline.  ``compression_ratio`` is the
    fraction *kept* here; kvpress means the fraction removed.

    Parameters of a call
    --------------------
    context : str, or dict with "context" and "question" or "questions"
        The document; a list or data set of documents gives one result each.
    question, questions : str or list of str
        One question gives ``{"answer": str}``, a list ``{"answers": [str, ...]}``.  Without a question the model
        continues the context.
    question_aware : bool, default False
        Compress context and question together, once per question, so that the kept tokens depend on the question.
    answer_prefix : str
        Beginning of every answer; the answer does not repeat it.
    max_new_tokens : int, default 50
        Largest number of tokens of an answer.
    max_context_length : int, optional
        Largest number of tokens of the context; None is the tokenizer's limit.  A warning tells how many are cut off.
    system_prompt, use_chat_template, template_options
        See :func:`rankkv.models.prompts.split_prompt`.
    return_details : bool, default False
        Add ``"details"``: tokens, bytes, budgets and the options of the compression.
    **options
        ``config=`` or options of :class:`~rankkv.RankKVConfig`, and options of ``model.generate`` (greedy by default).

    Examples
    --------
    >>> from transformers import pipeline
    >>> from rankkv import load_model
    >>> from rankkv.integrations.pipeline import register
    >>> _ = register()
    >>> model, tokenizer = load_model("embedded")
    >>> ask = pipeline("rankkv-text-generation", model=model, tokenizer=tokenizer, device="cpu")
    >>> context = "The archive opens at nine. " * 20
    >>> sorted(ask(context, questions=["When?", "Where?"], max_new_tokens=2, compression_ratio=0.5))
    ['answers']
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Answer the questions about one context, or about each of several contexts."""
        if args:
            raise InputError("give the questions by name: pipe(context, question=...).")
        batch_size = kwargs.get("batch_size") or self._batch_size or 1
        if batch_size != 1:
            raise ConfigError(
                f"batch_size={batch_size} is not possible here, since every context has its own cache: leave it out "
                "(for several prompts at once, use a left-padded batch and RankKVCache)."
            )
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save model and tokenizer, without code: :func:`register` makes the task known again."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = _CACHE_OPTIONS | _PROMPT_OPTIONS | _OWN_OPTIONS | _GENERATE_OPTIONS
        for name in given:
            if name not in known:
                raise UnknownNameError.of("option", name, known)
        preprocess = {
            name: given[name] for name in given if name in _PROMPT_OPTIONS | {"question", "questions"}
        }
        forward: dict[str, Any] = {
            name: given[name]
            for name in ("question_aware", "max_new_tokens", "return_details")
            if name in given
        }
        # Pipeline merges a call's parameters with its own by name only; the contents of these two are merged here.
        built_with = getattr(self, "_forward_params", {})
        cache_options = {name: value for name, value in given.items() if name in _CACHE_OPTIONS}
        if cache_options:
            if "config" in cache_options:
                forward["config"] = join_options(cache_options)
            else:
                own = built_with.get("config", RankKVConfig())
                forward["config"] = replace(own, **complete_options(cache_options))
        generate_options = {
            name: value for name, value in given.items() if name in _GENERATE_OPTIONS - _OWN_OPTIONS
        }
        if generate_options.get("num_return_sequences") not in (None, 1):
            raise ConfigError(
                "num_return_sequences must be 1, since a question has one answer: ask it several times."
            )
        if generate_options:
            forward["generate_options"] = {**built_with.get("generate_options", {}), **generate_options}
        return preprocess, forward, {}

    def preprocess(
        self,
        inputs: Any,
        question: str | None = None,
        questions: list[str] | None = None,
        max_context_length: int | None = None,
        **prompt_options: Any,
    ) -> dict[str, Any]:
        """Tokenize one context and its questions."""
        context = inputs
        if isinstance(inputs, Mapping):
            unknown = inputs.keys() - {"context", "question", "questions"}
            if "context" not in inputs or unknown:
                raise InputError(
                    f"an input has the keys {sorted(map(str, inputs))}: give 'context', and 'question' or 'questions'."
                )
            context = inputs["context"]
            if "question" in inputs or "questions" in inputs:
                question, questions = inputs.get("question"), inputs.get("questions")
        if question is not None and questions is not None:
            raise InputError("give either question or questions, not both.")
        if isinstance(questions, str):
            raise InputError("questions must be a list of texts: give a single text as question.")
        asked = [question or ""] if questions is None else list(questions)
        limit = max_context_length
        if limit is None and self.tokenizer.model_max_length < _NO_LIMIT:
            limit = int(self.tokenizer.model_max_length)
        prompt = split_prompt(self.tokenizer, context, asked, max_context_length=limit, **prompt_options)
        if prompt.dropped_tokens:
            warnings.warn(
                f"the context was longer than {limit} tokens: its last {prompt.dropped_tokens} were cut off.",
                stacklevel=2,
            )
        return {
            "context_ids": prompt.context_ids,
            "question_ids": prompt.question_ids,
            "dropped_tokens": prompt.dropped_tokens,
            "is_single": questions is None,
        }

    def _forward(
        self,
        input_tensors: dict[str, Any],
        question_aware: bool = False,
        max_new_tokens: int = 50,
        return_details: bool = False,
        config: RankKVConfig | None = None,
        generate_options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Compress the context, and generate each answer on a copy of the cache."""
        config = config or RankKVConfig()
        options = self._fill_options(generate_options or {})
        context = input_tensors["context_ids"]
        shared = (
            None if question_aware else compress(self.model, context, tokenizer=self.tokenizer, config=config)
        )
        token_ids, details = [], []
        for question in input_tensors["question_ids"]:
            ids = torch.cat([context, question], dim=1)
            if shared is None:
                cache = build_cache(self.model, ids, self.tokenizer, config=config)
            else:
                cache = shared.copy()
                # generate() repeats the ids for the beams, but not the rows of a filled cache.
                cache.batch_repeat_interleave(self._count_beams(options))
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                **cache_argument(cache),
                **options,
            )
            # An answer of one token leaves a prompt that waits for its replay uncompressed.
            cache.finish()
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            token_ids.append(sequences[0, ids.shape[1] :])
            details.append(_describe_cache(cache, ids.shape[1]))
        return {
            "token_ids": token_ids,
            "is_single": input_tensors["is_single"],
            "details": {
                "question_aware": question_aware,
                "context_tokens": context.shape[1],
                "dropped_tokens": input_tensors["dropped_tokens"],
                "config": (config if shared is None else shared.config).to_dict(),
                "caches": details,
            }
            if return_details
            else None,
        }

    def _fill_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        options = dict(given)
        if not options.get("do_sample") and "generation_config" not in options:
            options = {**_SAMPLING_OFF, **options}
        if options.get("stop_strings"):
            options["tokenizer"] = self.tokenizer
        if self.tokenizer.pad_token_id is not None:
            options.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        return options

    def _count_beams(self, options: Mapping[str, Any]) -> int:
        if options.get("num_beams"):
            return int(options["num_beams"])
        return int((options.get("generation_config") or self.model.generation_config).num_beams or 1)

    def postprocess(self, model_outputs: dict[str, Any]) -> dict[str, Any]:
        """Decode the answers."""
        answers = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in model_outputs["token_ids"]]
        record: dict[str, Any] = (
            {"answer": answers[0]} if model_outputs["is_single"] else {"answers": answers}
        )
        if model_outputs["details"] is not None:
            record["details"] = model_outputs["details"]
        return record


def register() -> type[RankKVTextGenerationPipeline]:
    """Register the task ``"rankkv-text-generation"`` with ``transformers.pipeline`` and return its class.

    Further calls do nothing.  Importing this module registers nothing.

    Raises
    ------
    ConfigError
        If another class has registered this name.

    Examples
    --------
    >>> register().__name__
    'RankKVTextGenerationPipeline'
    """
    known = PIPELINE_REGISTRY.supported_tasks.get(TASK)
    if known is None:
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=RankKVTextGenerationPipeline, pt_model=AutoModelForCausalLM
        )
    elif known["impl"] is not RankKVTextGenerationPipeline:
        raise ConfigError(
            f"the task {TASK!r} already belongs to {known['impl'].__name__}: use RankKVTextGenerationPipeline itself."
        )
    return RankKVTextGenerationPipeline


def unregister() -> None:
    """Remove the task from ``transformers.pipeline``."""
    if PIPELINE_REGISTRY.supported_tasks.get(TASK, {}).get("impl") is RankKVTextGenerationPipeline:
        del PIPELINE_REGISTRY.supported_tasks[TASK]


def _describe_cache(cache: RankKVCache, prompt_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "kept_tokens": sum(cache.budgets),
        "budgets": cache.budgets,
        "cache_bytes": cache.kept_bytes(),
        "full_cache_bytes": cache.full_cache_bytes(),
    }
