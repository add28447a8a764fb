"""ops.ttt."""
