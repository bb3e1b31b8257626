"""What a merge gives for one module: two factors, or a dense matrix; and how far it lies from another."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update b a: a [r, in], b [out, r], fp64. As in a site, an embedding has in = vocabulary."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """The columns it has; its numerical rank may be less."""
        return self.a.shape[0]


Update = LowRank | torch.Tensor  # dense: [out, in], fp64


def joined(parts: list[LowRank]) -> LowRank:
    """Their sum, exactly: the ranks add up."""
    return LowRank(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1))


def dense(update: Update, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[out, in]."""
    return update.to(dtype) if isinstance(update, torch.Tensor) else update.b.to(dtype) @ update.a.to(dtype)


def factored(update: Update) -> LowRank:
    """The same as factors; a dense one beside an identity, which costs no decomposition and no accuracy."""
    if isinstance(update, LowRank):
        return update
    out, features = update.shape
    if out < features:
        return LowRank(update, torch.eye(out, dtype=update.dtype))
    return LowRank(torch.eye(features, dtype=update.dtype), update)


def rank_of(update: Update) -> int:
    """The rank the update adds to its module: all that its shape allows when it is dense."""
    return min(update.shape) if isinstance(update, torch.Tensor) else update.rank


def norm(update: Update) -> float:
    """Frobenius. Of factors by their QR, so that no [out, in] is made."""
    if isinstance(update, torch.Tensor):
        return float(torch.linalg.matrix_norm(update))
    r_b, r_a = (torch.linalg.qr(side, mode="r").R for side in (update.b, update.a.T))
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def difference(update: Update, exact: LowRank) -> float:
    """The Frobenius norm of what lies between them."""
    if isinstance(update, torch.Tensor):
        return norm(update - dense(exact, update.dtype))
    return norm(joined([update, LowRank(exact.a, -exact.b)]))
