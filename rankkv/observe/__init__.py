"""Observe: an attention call of a model goes in, an Observation of its queries, keys and values comes out."""

from .call import AttentionCall, observe
from .hook import install, is_installed, uninstall
from .observation import Observation

__all__ = ["AttentionCall", "Observation", "install", "is_installed", "observe", "uninstall"]
