"""The Transformer with In-Place TTT: layers, their scan, the state of a stream, the loss."""
