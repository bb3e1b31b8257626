"""A merged mix as an ordinary PEFT LoRA folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from exporter.adapters import LoraDelta
from exporter.checkpoints import shared_base_name, write_lora
from exporter.errors import ExportError
from exporter.inputs import Inputs
from exporter.merges.merge import merged
from exporter.merges.update import factored
from exporter.sites import Site, SiteKind
from exporter.static import row_of, touched_sites
from runtime.manifest import MergeInfo, Task


def save_adapter(
    inputs: Inputs, sites: Sequence[Site], rows: torch.Tensor, merge: MergeInfo, folder: Path, final: Path
) -> tuple[str, ...]:
    """Merge again, module by module, and fill the empty `folder`, which will lie at `final`; returns what to say."""
    touched = touched_sites(sites, rows)
    if not touched:
        raise ExportError("the mix changes no module: there is no adapter", where="--save-adapter", fix="another --mix")
    deltas: dict[str, LoraDelta] = {}
    full: list[int] = []
    for site in touched:
        update = merged(site, row_of(rows, site), merge)
        factors = factored(update)
        deltas[site.path] = LoraDelta(factors.a.float(), factors.b.float(), 1.0)
        if isinstance(update, torch.Tensor):
            full.append(factors.rank)
    write_lora(
        folder,
        deltas,
        embeddings={site.path for site in touched if site.kind is SiteKind.EMBEDDING},
        fan_in_fan_out=any(site.kind is SiteKind.CONV1D for site in touched),
        base_name=shared_base_name(inputs.adapters, final),
        # PEFT's class for it wants a generator; that for classes would replace the head, which the mix leaves alone.
        task_type="CAUSAL_LM" if inputs.base.task is Task.TEXT_GENERATION else None,
    )
    if not full:
        return ()
    return (f"{merge.method} gives dense updates: saved at full rank, up to {max(full)}; --merge-rank cuts them",)
