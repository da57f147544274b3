"""Prefect tasks: thin wrappers that each call one function of `quee_core`."""
