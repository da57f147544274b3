"""Prefect flows, and the `quee` command that runs them."""
