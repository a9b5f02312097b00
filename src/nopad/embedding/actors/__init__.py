"""Processes that make a job's shards: on this machine, or on a Ray cluster."""
