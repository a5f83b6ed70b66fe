"""What is on disk: run directories, checkpoints, archives, and how they are written safely."""
