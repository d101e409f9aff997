"""Machine and process: files that survive a power cut, devices and memory, processes that work together, secrets. Knows no model."""
