"""When two runs give the same tokens: equal, but from a tie of the reference on; ties are counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.request import Request, TokenEvent

TIE_MARGIN = 1e-4  # matrix products of 1, 2 or 8 rows sum in different orders
TIE_SHARE = 1e-3  # of all steps, on random models

Logits = list[NDArray[np.float32]]  # per new token [V]


@contextmanager
def seen_logits() -> Iterator[dict[int, Logits]]:
    """What each prompt's tokens were chosen from, by the prompt's number, of the generations inside."""
    seen: dict[int, Logits] = {}
    accept = Request.accept

    def spy(self: Request, logits: NDArray[np.float32], seconds: float) -> TokenEvent:
        seen.setdefault(self.number, []).append(logits.copy())
        return accept(self, logits, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Request, "accept", spy)
        yield seen


@dataclass(slots=True)
class Ties:
    """Steps compared, and those at which a tie ended the comparison."""

    steps: int = 0
    ties: int = 0
    limit: float = 1e-4  # of |d| / (1 + |logit|)

    def compare(self, alone: Logits, together: Logits, what: str) -> None:
        """Greedy tokens of one row; fails where they differ without a tie, or logits differ before one."""
        for step, (want, got) in enumerate(zip(alone, together, strict=False)):
            self.steps += 1
            if want.argmax() != got.argmax():
                second, first = np.sort(want)[-2:]
                assert first - second < TIE_MARGIN, f"{what}: another token at step {step}, margin {first - second:.2g}"
                self.ties += 1
                return
            apart = float((np.abs(want - got) / (1 + np.abs(want))).max())
            assert apart <= self.limit, f"{what}: logits differ by {apart:.2g} at step {step}"
        assert len(alone) == len(together), f"{what}: {len(alone)} steps alone, {len(together)} together"

    def check(self, share: float = TIE_SHARE) -> None:
        """Print, and fail where ties are not rare."""
        print(f"{self.ties} ties in {self.steps} steps")
        assert self.steps
        assert self.ties <= share * self.steps


def greedy_ids(logits: Sequence[NDArray[np.float32]]) -> list[int]:
    """The tokens that were chosen."""
    return [int(row.argmax()) for row in logits]
