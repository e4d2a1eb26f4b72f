"""Measurements of throughput and links, and their comparison."""
