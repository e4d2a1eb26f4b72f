"""Qwen3 and Qwen3-MoE."""
