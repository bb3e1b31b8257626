"""Drafts from the text itself: what followed the last tokens when they came before (prompt lookup).

Method: A. Saxena, "Prompt Lookup Decoding", 2023; N. Yang et al. 2023, arXiv 2304.04487.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

LONGEST = 3  # tokens at the end of a text that are looked up; where they never came before, fewer


def looked_up(text: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that followed the latest earlier place of the text's end; none where there is no such place.

    A copy that reaches the end of the text goes on through itself: "abcab" is followed by "cabcab…".
    """
    ids = np.asarray(text, np.int64)
    for size in range(min(LONGEST, len(ids) - 1), 0, -1):
        earlier = sliding_window_view(ids[:-1], size)  # each but the end itself
        places = np.flatnonzero((earlier == ids[-size:]).all(axis=1))
        if len(places):
            start = int(places[-1]) + size
            period = len(ids) - start
            return [int(ids[start + number % period]) for number in range(count)]
    return []
