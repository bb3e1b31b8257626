"""A fuzzer that draws whole checkpoints, builds them and holds the bundles to PEFT; see docs/fuzzing.md."""
