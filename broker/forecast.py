"""When requests that come now would be done, by what workers have said that batches take."""

from __future__ import annotations

from typing import Final, NamedTuple

from penstock.broker.pools import LONG_S
from penstock.broker.queues import ModelQueue
from penstock.broker.shares import ShareKey

# A wait is a sum of many batches that have not been run yet. It is taken for so much longer than it looks: who is
# admitted should be answered in time, and a queue that is somewhat shorter keeps the workers as busy.
_DOUBT: Final = 4 / 3
_LEFT_LEAST: Final = 1 / 16  # of the workers, for those who overtake nobody


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


def at_most_us(model: ModelQueue, rows: int) -> float:
    """No forecast for so many rows says more than this, which costs less: nearly all requests have so much time."""
    work_us: float = rows * model.row_us
    for pool in model.pools:
        work_us += pool.assigned_us + pool.waiting_us / _LEFT_LEAST
    return work_us * _DOUBT + model.batch_us(model.batch_rows)


def forecast_for(model: ModelQueue, priority: int, share_key: ShareKey) -> Forecast:
    """What is before a request: all that its model's workers have been given, or only what runs there if it may
    overtake the rest; what waits for its model and is served first; what waits for other models there, but of these
    not more than their shares beside that; and what will come meanwhile and overtake it, if that is as much as
    lately."""
    servers = other_us = 0
    assigned_us = others_weight = early_us = 0.0
    overtakes = model.may_overtake(priority, share_key)
    for pool in model.pools:
        servers += min(pool.servers, len(pool.workers) * model.instances)
        other_us += pool.waiting_us - model.us
        others_weight += pool.weight - model.weighs
        if (overtakes or pool.is_behind(model)) and pool.assigned_us >= LONG_S * 1e6 * len(pool.workers):
            assigned_us += pool.assigned_us * pool.servers / (pool.servers + len(pool.workers))
        else:
            assigned_us += pool.assigned_us
            early_us += pool.early * pool.servers
    own_us = model.ahead_us(priority, share_key)
    before_us = own_us + min(other_us, own_us * others_weight / model.weight)
    servers = max(1, servers)
    before_us = assigned_us + before_us / max(_LEFT_LEAST, 1 - early_us / servers)
    return Forecast(model, before_us / servers, servers)
