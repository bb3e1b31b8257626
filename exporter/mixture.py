"""A trainable mix: softmax weights of the experts, and the base modules that run under them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from exporter.sites import Site, SiteKind


class Mixture(nn.Module):
    """Softmax over the experts, one row a group of sites; sites of a group share it."""

    def __init__(self, rows: torch.Tensor, groups: Sequence[str]) -> None:
        """`rows` [sites, E]: where to begin, all positive; a group begins at the mean of its sites."""
        super().__init__()
        self.names = tuple(dict.fromkeys(groups))
        self.group_of = [self.names.index(group) for group in groups]  # by site index
        members = torch.tensor(self.group_of)
        means = torch.stack([rows[members == number].mean(0) for number in range(len(self.names))])
        self.logits = nn.Parameter(means.log())

    def weights(self) -> torch.Tensor:
        """[groups, E]; each row sums to 1."""
        return self.logits.softmax(-1)

    def factors(self, site: Site) -> torch.Tensor:
        """[R]: what every rank column of the site is multiplied by."""
        return self.weights()[self.group_of[site.index]] @ site.weights


class MixedModule(nn.Module):
    """base(x) + ((x aT) * (s . weights)) bT with s from the mixture; only the mixture has gradients."""

    def __init__(self, base: nn.Module, site: Site, mixture: Mixture) -> None:
        super().__init__()
        self.base, self.site = base, site
        self.mixture = [mixture]  # in a list, so that it is no submodule of every site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(self.down(x) * self.mixture[0].factors(self.site), self.site.b)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """x aT, [B, S, R]."""
        return F.linear(x, self.site.a)


class MixedEmbedding(MixedModule):
    """The same for a token lookup, times the base's embed_scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = F.embedding(x, self.site.a.T) * self.mixture[0].factors(self.site)
        return self.base(x) + F.linear(down, self.site.b) * getattr(self.base, "embed_scale", 1.0)


def mixed_modules(model: nn.Module, sites: Sequence[Site], mixture: Mixture) -> dict[str, nn.Module]:
    """Path -> what stands in for the base module there."""
    return {
        site.path: (MixedEmbedding if site.kind is SiteKind.EMBEDDING else MixedModule)(
            model.get_submodule(site.path), site, mixture
        )
        for site in sites
    }


def blocks_of(paths: Sequence[str]) -> Iterator[str]:
    """The transformer block of each module ("model.layers.3"), or the module itself outside of all blocks."""
    for path in paths:
        parts = path.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        yield ".".join(parts[: number + 1])
