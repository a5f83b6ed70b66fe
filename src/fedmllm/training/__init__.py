"""Local training: the passes of one or several clients over their own samples."""
