"""Writes and reads checkpoints: steps on disk, their checksums and trees."""
