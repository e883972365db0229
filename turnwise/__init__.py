"""turnwise: a reward for every turn of an LLM agent's rollout."""

from importlib.metadata import version

__version__ = version("turnwise")
