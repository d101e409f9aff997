"""Engines: token segments in, token log-probabilities (and their way back to the weights) out."""
