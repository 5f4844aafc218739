"""A task of celery-batches among the others, where it is installed: 0.11 refuses Celery 5.7."""

from __future__ import annotations

from celery_batches import Batches, SimpleRequest  # type: ignore[import-not-found]

from tests.support.recorder import record
from tests.worker.together import ShopTask, app, write_order


class BatchTask(Batches, ShopTask):  # type: ignore[misc]
    """celery-batches: one body for several messages."""

    abstract = True
    flush_every = 2
    # A batch that waits for its second message would be flushed by this.
    flush_interval = 60


@app.task(base=BatchTask, bind=True, name="shop.batch")
def batch(self: BatchTask, requests: list[SimpleRequest]) -> None:
    record("batch", [request.args[0] for request in requests])
    for request in requests:
        write_order(self, *request.args)
