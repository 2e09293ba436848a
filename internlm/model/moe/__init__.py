"""Mixture of experts: routers, losses, and the order of tokens by expert."""
