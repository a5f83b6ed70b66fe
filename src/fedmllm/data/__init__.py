"""Samples, tasks, partitions, scenarios, manifests and prompts: the data of each client and how the model sees it."""
