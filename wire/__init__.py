"""What crosses a process boundary: messages, tensors, errors, endpoints, metrics.

Imports nothing else of ours, and nothing beyond msgpack and numpy, so that the client library needs no more.
"""
