"""Helpers that know nothing of models or caches: files, registries, the hub, processes."""
