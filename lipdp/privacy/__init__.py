"""Sampling, noise, accounting, and the engine that ties them to a torch optimiser."""
