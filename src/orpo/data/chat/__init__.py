"""Chat templates: rendering, where turns and answers end, special tokens, and fitting a row into the length contract."""
