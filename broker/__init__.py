"""Decides which worker runs what, and when. Never looks inside a tensor."""
