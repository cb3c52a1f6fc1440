"""lm-evaluation-harness: a model for its registry that compresses the cache of every request, and rows of results."""
