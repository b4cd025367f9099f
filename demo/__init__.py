"""The demo: a small language model that knows a closed world of facts, and edits to that world."""
