"""The version, in a file of its own: the build and ``rankkv --version`` read it without importing anything."""

__version__ = "0.1.0"
