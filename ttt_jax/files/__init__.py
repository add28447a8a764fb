"""Reading and writing small files safely: text, JSON, JSON lines, NumPy arrays."""
