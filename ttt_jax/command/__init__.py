"""The command line `ttt-jax`: cli.py lists the commands, running.py runs one."""
