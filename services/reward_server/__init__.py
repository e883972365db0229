"""Scores every turn of many rollouts and samples from the same policy."""
