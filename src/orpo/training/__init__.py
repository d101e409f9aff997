"""An optimizer step of our own inside transformers' Trainer, and a run from its start to its end."""
