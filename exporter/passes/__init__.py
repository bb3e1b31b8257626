"""Graph rewrites between the trace and the bundle, run in the order of `portable_passes` and `modern_passes`."""
