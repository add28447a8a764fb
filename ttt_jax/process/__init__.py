"""Keeps a process in order: signals, locks, several processes, and how one ends."""
