"""Rorqual: the whole DeepSeek-V4 system, open end to end."""

__version__ = "0.1.0"
