"""Real proxies, servers, forks and workers for the tests, and ways to look at what they left behind."""
