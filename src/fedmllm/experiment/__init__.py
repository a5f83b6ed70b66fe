"""From an experiment file to its parts, and grids of experiments."""
