"""Flower's configuration: ``celery -A demo_tasks.app flower --conf=demo_tasks/flowerconfig.py``."""

import workerpools.flower

workerpools.flower.install()
