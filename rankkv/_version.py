"""The version, in a file of its own: the build and ``rankkv --version`` read it and import nothing else."""

__version__ = "0.1.0"
