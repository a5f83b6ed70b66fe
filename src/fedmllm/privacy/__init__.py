"""Differential privacy of users: clipped and noisy sums, and the accountant that turns noise into ε."""
