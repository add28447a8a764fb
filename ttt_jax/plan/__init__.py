"""Memory, FLOPs and traffic of a step on devices that are not there (`ttt-jax plan`)."""
