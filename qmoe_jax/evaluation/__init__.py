"""Evaluation: losses and routing statistics over token files."""
