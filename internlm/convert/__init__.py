"""Converts from and to other formats: Hugging Face folders, Meta's llama files, InternEvo checkpoints."""
