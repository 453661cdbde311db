"""Helpers for plug-ins: the fit loop, running a module over a split."""
