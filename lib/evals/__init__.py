"""Evaluations. Each takes a model and knows no script."""
