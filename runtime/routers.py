"""Routers inside the sites of a dynamic graph: which one it has, and its settings; see docs/routers.md."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class RouterKind(StrEnum):
    """What decides, token by token, how much of each expert is used."""

    XLORA = "xlora"  # the gate, in a pass of its own
    ARROW = "arrow"  # inside each site: the experts whose prototypes lie along the site's input
    RANK_SELECT = "rank-select"  # inside each site: the rank-one terms that change the output most


class _RouterInfo(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ArrowInfo(_RouterInfo):
    """Arrow's settings, as PEFT's ArrowConfig has them."""

    kind: Literal["arrow"] = "arrow"
    top_k: Annotated[int, Field(ge=1)]  # experts of a token; a site with fewer uses all of its own
    temperature: Annotated[float, Field(ge=1e-30, le=1e30)]  # what float32 can divide by
    seed: Annotated[int, Field(ge=0, lt=1 << 64)]  # of the power iterations; generators take 64 bits
    general: tuple[str, ...] = ()  # adapters whose mean was subtracted from every expert; they are no experts


class RankSelectInfo(_RouterInfo):
    """The setting of rank-select."""

    kind: Literal["rank-select"] = "rank-select"
    keep: Annotated[float, Field(gt=0, le=1)]  # share of a site's rank-one terms, rounded up


RouterInfo = Annotated[ArrowInfo | RankSelectInfo, Field(discriminator="kind")]
