"""One file per deploy format: REQUIRES, RUNS_ON, EXTRA, SUFFIX, BATCH, refuses, lacks, not_here, export, load, runtime,
weights, fallbacks (docs/architecture.md says what each gives; tests/contract/test_formats.py holds them to it)."""
