"""Judges of answers: endpoints, local models, reward models, and how their replies are read."""
