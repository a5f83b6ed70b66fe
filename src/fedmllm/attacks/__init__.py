"""Simulated clients that send harmful updates, to test what the server's protections are worth."""
