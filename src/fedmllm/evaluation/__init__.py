"""Deterministic evaluation: predictions under each modality pattern, judges, metrics and their bootstrap intervals."""
