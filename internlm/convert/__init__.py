"""Conversion from and to other formats: Hugging Face folders, Meta's llama files, checkpoints of InternEvo."""
