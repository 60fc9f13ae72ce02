"""The version of the package, for everything that records it."""

__version__ = "0.9.0.dev0"
