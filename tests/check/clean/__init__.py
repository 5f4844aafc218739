"""The same app as it should be: nothing is found in it."""
