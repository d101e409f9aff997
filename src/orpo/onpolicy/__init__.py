"""Preference pairs from a model's own answers: sampled, scored, chosen, and trained on round after round.

`asked` reads prompts, `answering` samples, `scorers` and `verifier` say how good an answer is, `choice` makes pairs, `making` is the course
of `orpo pairs`. `lookback` says what pairs are worth before anybody trains on them, `heldout` what a model's answers are.
"""
