"""Clients on other machines: what travels between the round loop and a site, and what a site does with it."""
