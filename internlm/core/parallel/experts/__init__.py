"""Experts on the ranks of the expert view: who holds which, and the exchange of tokens."""
