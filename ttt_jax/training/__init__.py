"""Trains a model: the step, its optimizer, and the job around it."""
