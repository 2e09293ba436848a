"""Verifies that a layout trains as one process does: equal losses, gradients and weights. Used by `internlm verify`."""
