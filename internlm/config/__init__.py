"""Configuration. `read_base` is exported here because config files name it."""

from internlm.config.inheritance import read_base

__all__ = ["read_base"]
