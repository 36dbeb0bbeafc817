"""The agent of a node: what `prefect worker start --type warm-backup` runs, and nothing of it in a run."""
