"""Local training: one client's pass over its samples."""
