"""transformers' handlers of the API, for one pinned model."""

from __future__ import annotations

from typing import Any

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler

from .generation import PinnedGenerationState, PinnedModelManager


class _Pinned(BaseHandler):
    """Answer with the pinned model; sample if a client asks for it."""

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        self.model_manager.check_model(body.get("model"))
        name = self.model_manager.force_model
        return name, *self.model_manager.load_model_and_processor(name)

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        # transformers sets the temperature alone, which a model that is greedy by default ignores.
        if body.get("temperature") or (body.get("top_p") or 1.0) < 1.0:
            config.do_sample = body.get("temperature") != 0
        return config

    def list_fields(self) -> set[str]:
        """Return the fields of a body that transformers knows."""
        return set(getattr(self._valid_params_class, "__mutable_keys__", ()))


class ChatHandler(_Pinned, ChatCompletionHandler):
    """Handler of ``/v1/chat/completions``."""


class TextHandler(_Pinned, CompletionHandler):
    """Handler of ``/v1/completions``."""


class ResponsesHandler(_Pinned, ResponseHandler):
    """Handler of ``/v1/responses``."""


def build_handlers(manager: PinnedModelManager, state: PinnedGenerationState) -> dict[str, Any]:
    """Build the handlers by the name of their route."""
    return {
        "chat": ChatHandler(manager, state),
        "completions": TextHandler(manager, state),
        "responses": ResponsesHandler(manager, state),
    }
