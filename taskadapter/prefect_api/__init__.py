"""Prefect as this package uses it: its client, work pools, deployments, runs and private names."""
