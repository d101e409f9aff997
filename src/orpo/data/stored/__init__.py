"""Token groups on disk, memory-mapped, and the cache that holds them: tokenised once, read by every process of a machine."""
