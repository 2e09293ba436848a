"""Mixture of experts: routing, balance, and feed-forward layers of which each token uses a few."""
