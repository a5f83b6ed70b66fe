"""The parts of `gpu.py`: models of real shape with random weights, the ways to train and to answer, and their measurement."""
