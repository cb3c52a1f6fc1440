"""Models: a name or a path goes in, a loaded model, its tokenizer, texts or prompts come out."""

from .compat import cache_argument
from .loading import load_model
from .prompts import split_prompt
from .texts import load_texts

__all__ = ["cache_argument", "load_model", "load_texts", "split_prompt"]
