"""Tests of `tests.support`: with a proxy that does not cut, every test of a cut would pass."""
