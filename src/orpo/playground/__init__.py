"""The chat in a browser's page: two columns, and the better answer is one click."""
