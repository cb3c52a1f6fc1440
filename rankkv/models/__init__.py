"""Models: a name or a path goes in, a loaded model with its tokenizer, or texts, come out."""

from .loading import load_model
from .texts import load_texts

__all__ = ["load_model", "load_texts"]
