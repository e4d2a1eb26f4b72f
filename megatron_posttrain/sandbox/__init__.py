"""Runs programs that nobody has read, isolated from this machine. Linux, with the kernel's own means."""

from megatron_posttrain.sandbox.run import Result, check_isolation, run, why_unavailable

__all__ = ["Result", "check_isolation", "run", "why_unavailable"]
