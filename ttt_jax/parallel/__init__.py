"""The mesh of devices, and how attention, the op and the loss run on it."""
