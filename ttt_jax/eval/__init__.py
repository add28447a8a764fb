"""Evaluation: what In-Place TTT gives on the same weights, by position, length and task.

perplexity.py, synthetic.py, harness.py (lm-evaluation-harness) and diagnostics.py compute; run.py
puts them together for `ttt-jax eval`; output.py and page.py write the results. docs/evaluation.md
has the definitions.
"""
