"""Mixture of experts on one device: routers, losses that balance them, experts."""
