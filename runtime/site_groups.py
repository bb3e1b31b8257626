"""Names of what several sites share in the weight store: one stacked a of all that read the same tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from runtime.errors import InputError

LORA_A, LORA_B = ".lora_a", ".lora_b"
TRANSPOSED = ".T"  # ends the name of a matrix that lies transposed, [in, out]


def joined_path(paths: Sequence[str]) -> str:
    """("h.0.attn.q", "h.0.attn.k") -> "h.0.attn.q+k": the parts all share once, then what is each one's own."""
    split = [path.split(".") for path in paths]
    common = 0
    while all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
        common += 1
    return ".".join([*split[0][:common], "+".join(".".join(parts[common:]) for parts in split)])


def split_path(joined: str, paths: Collection[str]) -> tuple[str, ...]:
    """ "h.0.attn.q+k" -> ("h.0.attn.q", "h.0.attn.k"): joined_path, undone by trying where the common part ends."""
    first, *others = joined.split("+")
    parts = first.split(".")
    for common in range(len(parts)):
        group = (first, *(".".join([*parts[:common], other]) for other in others))
        if all(path in paths for path in group) and joined_path(group) == joined:
            return group
    raise InputError("belongs to no site of the manifest", where=f"{joined}{LORA_A}", code="E_BUNDLE")


def find_groups(paths: Sequence[str], names: Iterable[str]) -> list[tuple[str, ...]]:
    """The sites that share one stacked a, by the names of the store; groups in the order of their first sites."""
    stems = [name.removesuffix(TRANSPOSED) for name in names]
    found = [split_path(stem.removesuffix(LORA_A), paths) for stem in stems if stem.endswith(LORA_A)]
    missing = set(paths) - {path for group in found for path in group}
    if missing:
        raise InputError("no stacked a of some sites", got=", ".join(sorted(missing)[:5]), code="E_BUNDLE")
    return sorted(found, key=lambda group: paths.index(group[0]))
