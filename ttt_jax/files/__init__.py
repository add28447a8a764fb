"""What every file format needs: bounded reads, whole writes, lines, `.npy` and messages."""
