"""When requests that come now would be done, by what workers have said that batches take."""

from __future__ import annotations

from typing import Final, NamedTuple

from penstock.broker.queues import ModelQueue
from penstock.broker.shares import ShareKey

# A wait is a sum of many batches that have not been run yet. It is taken for so much longer than it looks: who is
# admitted should be answered in time, and a queue that is somewhat shorter keeps the workers as busy.
_DOUBT: Final = 4 / 3


class Forecast(NamedTuple):
    """``wait_us``: until what is before the requests has been done; ``servers``: batches that run at once."""

    model: ModelQueue
    wait_us: float
    servers: int

    def done_us(self, rows: int) -> float:
        """When the last of so many rows would be done."""
        model = self.model
        batch = min(rows, model.batch_rows)
        behind_us = (rows - batch) * model.row_us / self.servers
        batch = min(batch + model.rows, model.batch_rows)  # what waits runs together with others
        return (self.wait_us + behind_us) * _DOUBT + model.batch_us(batch)


def forecast_for(model: ModelQueue, priority: int, share_key: ShareKey) -> Forecast:
    """What is before a request: all that its model's workers have been given; what waits for its model and is served
    first; what waits for other models there, but of these not more than their shares beside that."""
    servers = assigned_us = other_us = 0
    others_weight = 0.0
    for pool in model.pools:
        servers += min(pool.servers, len(pool.workers) * model.instances)
        assigned_us += pool.assigned_us
        other_us += pool.waiting_us - model.us
        others_weight += pool.weight - model.weighs
    own_us = model.ahead_us(priority, share_key)
    before_us = assigned_us + own_us + min(other_us, own_us * others_weight / model.weight)
    servers = max(1, servers)
    return Forecast(model, before_us / servers, servers)
