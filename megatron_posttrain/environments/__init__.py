"""Environments: what answers a model's turns. A new one is one file of the user's."""

from megatron_posttrain.environments import tools
from megatron_posttrain.environments.protocol import Call, Done, ToolEnvironment, Turn, environment, load_environment

__all__ = ["Call", "Done", "ToolEnvironment", "Turn", "environment", "load_environment", "tools"]
