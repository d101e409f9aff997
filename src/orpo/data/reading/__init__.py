"""Files, folders, hub ids and streams to rows of plain values."""
