"""Answers: how the tokens of one request are chosen, as ``model.generate`` would choose them for it alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from .errors import RequestError


class FiniteLogits(LogitsProcessor):
    """Refuse logits that are NaN or infinite: no token would be right, and a draw would end the process on a GPU."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits unchanged, or raise a RequestError (500)."""
        if not bool((scores < torch.inf).all()):
            raise RequestError(
                "the model predicts values that are no numbers: start the server with --dtype float32, or load other "
                "weights.",
                500,
                "not_finite",
            )
        return scores


class Answer:
    """Choose the tokens of one answer from the logits of its row.

    Parameters
    ----------
    ids : Tensor
        Prompt, ``[1, token]``.
    processors, criteria
        Logits processors and stopping criteria, as ``model.generate`` builds them.
    sampled : bool
        True if tokens are drawn, False if the likeliest one is taken.
    seed : int, optional
        Seed of the draws; None draws another answer each time.
    streamer
        Takes each token.
    """

    def __init__(
        self, ids: Tensor, processors: Any, criteria: Any, sampled: bool, seed: int | None, streamer: Any
    ) -> None:
        #: Prompt and answer, ``[1, token]``.
        self.ids = ids
        self._processors, self._criteria, self._streamer = processors, criteria, streamer
        self._generator = None
        if sampled:
            # A generator of its own, so that no other answer changes what this one draws.
            self._generator = torch.Generator(ids.device)
            if seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(seed)

    @classmethod
    def prepare(
        cls, model: Any, tokenizer: Any, inputs: Any, generation_config: Any, seed: int | None, streamer: Any
    ) -> Answer:
        """Let ``model.generate`` check the options and build what an answer needs; no token is computed."""

        def take(
            model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
            **others: Any,
        ) -> Answer:  # fmt: skip
            sampled = generation_config.do_sample
            return cls(input_ids, logits_processor, stopping_criteria, sampled, seed, streamer)

        # generate() gives its tokenizer to no function in its place, so the texts that stop an answer come from here.
        stops, criteria = generation_config.stop_strings, StoppingCriteriaList()
        if stops:
            generation_config.stop_strings = None
            criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stops))
        answer: Answer = model.generate(
            **inputs,
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([FiniteLogits()]),
            stopping_criteria=criteria,
            streamer=streamer,
            custom_generate=take,
        )
        return answer

    @property
    def newest(self) -> int:
        """The newest token."""
        return int(self.ids[0, -1])

    def choose(self, logits: Tensor) -> bool:
        """Choose the next token from logits ``[1, token]``; return True if it is the last one.

        Raises
        ------
        _GenerationCancelled
            If nobody waits for the answer.
        RequestError
            If a logit is no number; see :class:`FiniteLogits`.
        """
        scores = self._processors(self.ids, logits.to(copy=True, dtype=torch.float32, device=self.ids.device))
        if self._generator is None:
            token = scores.argmax(dim=-1)
        else:
            token = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=self._generator)[:, 0]
        self.ids = torch.cat([self.ids, token[:, None]], dim=-1)
        self._streamer.put(token.cpu())
        return bool(self._criteria(self.ids, None).all())

    def end(self) -> None:
        """Tell the streamer that the answer is complete."""
        self._streamer.end()
