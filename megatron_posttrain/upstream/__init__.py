"""Ways round defects of torch and megatron-core; vLLM's are in rollout/. The next upgrade is to empty this room.
`tests/upstream/test_upstream_defects.py` fails when one of them is no longer needed."""
