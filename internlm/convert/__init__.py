"""Checkpoints of other worlds, there and back: Hugging Face folders, Meta's llama files, InternEvo's folders."""
