"""One Celery application a way of keeping connections, each with the same tasks: noop, read, write, get and hold."""
