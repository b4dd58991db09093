"""Evaluations. Each takes a model; none imports a script."""
