"""What the network remembers of one sequence: fixed-size state plus compressed entries.

The state cache of the report (3.5.1): a window of recent key/value entries and the unfinished
compression groups, of fixed size, beside the compressed entries, which grow by one row per
``ratio`` tokens. Plain data: the modules that fill it are in ``attention`` and ``compressor``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


class Rows:
    """A growing [n, width] tensor with amortised appends and at most an eighth to spare."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._buffer is None else self._buffer.nbytes

    @property
    def used_nbytes(self) -> int:
        """Bytes of the rows in use, without the spare capacity."""
        return 0 if self._buffer is None else self._buffer[: self._count].nbytes

    def append(self, rows: Tensor) -> None:
        """Copy ``rows`` [k, width] to the end."""
        need = self._count + rows.shape[0]
        if self._buffer is None or need > self._buffer.shape[0]:
            capacity = max(need, self._count + self._count // 8, 16)
            grown = rows.new_empty(capacity, rows.shape[1])
            if self._buffer is not None:
                grown[: self._count] = self._buffer[: self._count]
            self._buffer = grown
        self._buffer[self._count : need] = rows
        self._count = need

    def view(self) -> Tensor | None:
        """The rows in use, without copying; None before the first append."""
        return None if self._buffer is None else self._buffer[: self._count]


@dataclass
class CompressorState:
    """Compressed entries and the raw projections still needed to form the next one."""

    entries: Rows = field(default_factory=Rows)
    tail_values: Tensor | None = None
    """[tokens of the unfinished group, projection width], float32."""
    tail_scores: Tensor | None = None
    previous_values: Tensor | None = None
    """Overlapping compression only: the last finished group's first half, [ratio, C]."""
    previous_scores: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        held = (
            self.tail_values, self.tail_scores, self.previous_values, self.previous_scores,
        )  # fmt: skip
        return [t for t in held if t is not None]


@dataclass
class LayerState:
    """One attention layer's memory of one sequence."""

    window: Tensor | None = None
    """The last ``sliding_window`` key/value entries, oldest first, [<= W, C]."""
    compressed: CompressorState | None = None
    index: CompressorState | None = None

    @property
    def compressed_nbytes(self) -> int:
        """Bytes of the compressed entries in use."""
        return sum(rows.used_nbytes for rows in self._rows())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes allocated for compressed entries."""
        return sum(rows.nbytes for rows in self._rows())

    def _rows(self) -> list[Rows]:
        return [part.entries for part in (self.compressed, self.index) if part is not None]

    @property
    def fixed_nbytes(self) -> int:
        """Bytes of the window and the unfinished groups."""
        tensors = [] if self.window is None else [self.window]
        for part in (self.compressed, self.index):
            if part is not None:
                tensors += part.tensors()
        return sum(t.nbytes for t in tensors)


class SequenceState:
    """Everything remembered of one sequence; made by ``Transformer.new_state``, never reused."""

    def __init__(self, layers: list[LayerState], mtp: list[LayerState]) -> None:
        self.length = 0
        """Tokens consumed so far; the position of the next one."""
        self.layers = layers
        self.mtp = mtp

    @property
    def compressed_nbytes(self) -> int:
        """Bytes of compressed entries in use: the part a formula gives, spare rows left out."""
        return sum(layer.compressed_nbytes for layer in (*self.layers, *self.mtp))

    @property
    def nbytes(self) -> int:
        """All bytes allocated, spare capacity included."""
        layers = (*self.layers, *self.mtp)
        return sum(layer.fixed_nbytes + layer.allocated_nbytes for layer in layers)


@dataclass(frozen=True)
class Segment:
    """``num_tokens`` consecutive tokens of one sequence inside a ragged batch."""

    state: SequenceState
    num_tokens: int
