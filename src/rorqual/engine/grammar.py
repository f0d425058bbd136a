"""What an answer may contain: constraints on a sequence's tokens, and their effect on logits.

A constraint is the engine's only view of grammars, schemas and thinking budgets: per sequence, it
says which tokens may come next and follows the ones that came. Who makes constraints, and of
what, is other packages' business (``protocol/constraint.py``). Nothing here knows text.

Shapes: B rows of the batch, V vocabulary, R constrained rows, K bytes of a packed mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rorqual.errors import EngineError


class Constraint(Protocol):
    """What one sequence's next token may be. Used by the engine's thread only.

    Its state is a function of the accepted tokens alone. Any method may raise EngineError:
    the constraint cannot be followed further, and the request ends with that error.
    """

    def mask(self) -> bytes | None:
        """The allowed tokens, one bit each, token 0 in the lowest bit of byte 0; None allows all.

        Tokens beyond the mask's end are not allowed.
        """
        ...

    def forbidden(self) -> Sequence[int]:
        """A few tokens not allowed even so; cheaper than a mask where nearly all are."""
        ...

    def accept(self, token_id: int) -> None:
        """Follow one token, which must be an allowed one and not a stop token."""
        ...

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        """Set once nothing but an end may follow: ``stop`` where the answer is complete,
        ``length`` where a bound of the constraint itself is used up."""
        ...


class ConstraintSource(Protocol):
    """What a request carries; immutable and shareable between threads."""

    def start(self) -> Constraint:
        """A constraint that has accepted nothing. Raises EngineError."""
        ...


class Restricted(NamedTuple):
    """Logits under constraints."""

    logits_BV: Tensor
    """The argument where no row is constrained, else a copy with -inf at what is not allowed."""
    errors: dict[int, str]
    """Row -> why no token of it may be drawn."""


def restrict(logits_BV: Tensor, constraints: Sequence[Constraint | None]) -> Restricted:
    """Apply each row's constraint, before penalties, temperature and filters.

    Unconstrained rows keep their values; a batch without constraints costs one look at each row.
    A constraint that fails harms its own row only.

    Args:
        logits_BV: float, unchanged.
        constraints: one per row, or None.
    """
    rows = [i for i, constraint in enumerate(constraints) if constraint is not None]
    if not rows:
        return Restricted(logits_BV, {})
    errors: dict[int, str] = {}
    masks: dict[int, bytes] = {}
    holes: list[tuple[int, int]] = []
    for i in rows:
        constraint = constraints[i]
        assert constraint is not None
        try:
            mask = constraint.mask()
            holes += [(i, token) for token in constraint.forbidden()]
        except EngineError as error:
            errors[i] = str(error)
            continue
        if mask is not None:
            masks[i] = mask
    if not masks and not holes:
        return Restricted(logits_BV, errors)
    logits_BV = logits_BV.clone()
    if masks:
        at = torch.tensor(list(masks), device=logits_BV.device)
        allowed_RV = _unpacked(list(masks.values()), logits_BV)
        logits_BV[at] = logits_BV[at].masked_fill(~allowed_RV, -torch.inf)
    if holes:
        row_ids, token_ids = torch.tensor(holes, device=logits_BV.device).unbind(1)
        logits_BV[row_ids, token_ids] = -torch.inf
    best_R = logits_BV[rows].amax(dim=-1).tolist()
    for i, best in zip(rows, best_R, strict=True):
        if best == -torch.inf and i not in errors:
            errors[i] = "the constraint on the answer allows no token here"
    return Restricted(logits_BV, errors)


def _unpacked(masks: Sequence[bytes], logits_BV: Tensor) -> Tensor:
    """Boolean [R, V] on the logits' device, which the packed bits travel to."""
    vocab = logits_BV.shape[-1]
    num_bytes = (vocab + 7) // 8
    packed = bytearray(b"".join(mask[:num_bytes].ljust(num_bytes, b"\0") for mask in masks))
    packed_RK = torch.frombuffer(packed, dtype=torch.uint8).view(len(masks), num_bytes)
    packed_RK = packed_RK.to(logits_BV.device)
    bit_8 = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed_RK.device)
    return (packed_RK.unsqueeze(-1) & bit_8).bool().flatten(1)[:, :vocab]
