"""The command ``python -m demo_tasks``: servers, worker and Flower on this machine, and 2,000 tasks through them."""
