"""Doing a run: a loaded model with its data, the kinds of runs, and their results."""
