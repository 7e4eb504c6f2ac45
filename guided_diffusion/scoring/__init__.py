"""Masks against the truth: metrics, intervals, calibration, per-case scores and summaries."""
