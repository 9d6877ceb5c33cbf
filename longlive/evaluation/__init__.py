"""Benchmarks: from prompts to videos, measurements, tables and paired comparisons."""
