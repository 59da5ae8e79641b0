"""Backends: one package for each way to compute, each a `turboquant_np._backend.Backend`."""
