"""Run directories, checkpoints and archives on disk, and how they are written safely."""
