"""lm-evaluation-harness: a registered model whose requests run on a compressed cache, and its rows."""
