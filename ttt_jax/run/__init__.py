"""Keeps the folder of a run: config, logs, metrics, report, page, compile cache."""
