"""Distributed inference of large language models, split by layers over several machines."""

__version__ = "0.1.0"
