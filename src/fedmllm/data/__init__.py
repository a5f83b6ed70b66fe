"""Samples, tasks, partitions, scenarios, manifests and prompts: who holds what, and how it is asked."""
