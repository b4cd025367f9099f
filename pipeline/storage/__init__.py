"""What is kept: objects, the edit log, shard deltas and releases. Knows no torch."""
