"""Attacks on LoRA updates; benchmarks/leakage.py runs them and prints their figures."""
