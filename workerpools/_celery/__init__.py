"""The part that knows Celery: registration with an app, signals, settings and the task base."""
