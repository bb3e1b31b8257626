"""The exporter's error root: a `runtime.errors.InputError`, so that every command prints and exits alike."""

from __future__ import annotations

from runtime.errors import InputError


class ExportError(InputError):
    """A checkpoint, flag or model that cannot be exported as asked (exit 2)."""


class VerifyError(ExportError):
    """The exported graph is not the model: which measure failed, and where."""
