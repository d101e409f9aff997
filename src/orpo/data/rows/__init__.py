"""One row of any shape to a preference: which shape it is, its messages, verdicts and pairs, and why a row is refused."""
