"""Asks a server for as much as it is told to, and measures what that takes: what ``penstock bench`` and
``penstock tune`` stand on. It runs in processes of its own, ``python -m penstock.load``."""
