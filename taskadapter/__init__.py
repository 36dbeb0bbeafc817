"""Run a periodic Prefect job on exactly one of several machines."""
