"""What a user declares: triggers, jobs, civil time, the database of a group. Pure: no Prefect, no I/O."""
