"""One file per deploy format: REQUIRES, EXTRA, SUFFIX, refuses, export, load, weights."""
