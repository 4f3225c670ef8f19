"""The client library, and the caller core that it shares with the gateway.

>>> from penstock.client import Client
>>> with Client() as client:
...     scores = client.infer("digits", {"image": image})["scores"]
"""

from penstock.client.client import Client, Result
from penstock.client.jobs import Job, as_completed
from penstock.client.webhooks import verify_callback
from penstock.wire.errors import PenstockError

__all__ = ["Client", "Job", "PenstockError", "Result", "as_completed", "verify_callback"]
