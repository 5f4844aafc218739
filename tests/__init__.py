"""The test suite of workerpools."""
