"""Simulated devices and their clock: how long clients would take, which of them answer in time, and which are selected."""
