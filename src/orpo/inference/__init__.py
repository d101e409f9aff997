"""Asking a model: loaded and ready, log-probabilities of given answers, generated answers."""
