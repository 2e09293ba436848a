"""Whether a layout trains as one process does: same losses, gradients and weights. `internlm verify` shows it."""
