"""Flower's configuration: ``celery -A demo_tasks.app flower --conf=demo_tasks/flowerconfig.py``."""

import os

import workerpools.flower

# Set and empty: docker-compose.yml was started without a password.
if os.environ.get("FLOWER_BASIC_AUTH") == "":
    raise SystemExit("Flower is not started without a password: echo FLOWER_BASIC_AUTH=me:secret > .env")

workerpools.flower.install()
