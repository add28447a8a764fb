"""ops.attention."""
