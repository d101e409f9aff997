"""The tasks of `orpo eval`, one file each."""
