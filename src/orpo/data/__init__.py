"""Rows of any shape to token groups; import the module you need."""
