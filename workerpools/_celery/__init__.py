"""The Celery integration: app registration, signals, settings and the task base."""
