"""Jobs: requests that are stored, run later, and whose answers are fetched or called back.

A job is a stored HTTP request and, later, its stored HTTP response. ``job.py`` decides what may become of one, purely;
``store.py`` says what a store does, ``sqlite.py`` and ``redis.py`` do it; ``callbacks.py`` tells who asked
to be told.
"""
