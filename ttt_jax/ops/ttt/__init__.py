"""The In-Place TTT op: one interface, its implementations, and writes of a chunk."""
