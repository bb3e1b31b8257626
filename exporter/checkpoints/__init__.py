"""Foreign folders -> AdapterSet and base model: the only code that knows foreign keys, configs and layouts."""

from __future__ import annotations

from exporter.checkpoints.adapter_set import read_adapters
from exporter.checkpoints.base import BaseDescription, ModuleInfo, ModuleKind, describe_base, meta_model
from exporter.checkpoints.base_folder import base_reference
from exporter.checkpoints.blank import BlankBase, StoredTensor, load_blank, stored_tensors
from exporter.checkpoints.fit import check_against_base
from exporter.checkpoints.half_range import check_half_range, largest_update
from exporter.checkpoints.load import load_base
from exporter.checkpoints.save_lora import require_free, shared_base_name, write_lora
from exporter.checkpoints.shared_heads import without_shared_heads
from exporter.checkpoints.sources import compare_sources, source_files
from exporter.checkpoints.tokenizer_files import tokenizer_files
from exporter.checkpoints.tying import Tying, read_tying

__all__ = [
    "BaseDescription",
    "BlankBase",
    "ModuleInfo",
    "ModuleKind",
    "StoredTensor",
    "Tying",
    "base_reference",
    "check_against_base",
    "check_half_range",
    "compare_sources",
    "describe_base",
    "largest_update",
    "load_base",
    "load_blank",
    "meta_model",
    "read_adapters",
    "read_tying",
    "require_free",
    "shared_base_name",
    "source_files",
    "stored_tensors",
    "tokenizer_files",
    "without_shared_heads",
    "write_lora",
]
