"""The ``rorqual`` command. Reads argv and environment; nothing else in the package does."""
