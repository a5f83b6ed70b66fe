"""Deterministic evaluation: predictions under each modality pattern, judges, metrics and their intervals."""
