"""Reading and writing with a model: scores, sessions, sampling, generation."""
