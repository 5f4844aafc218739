"""The core: standard library only, no celery and no client library."""
