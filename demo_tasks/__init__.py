"""The demo application of workerpools: its tasks, its local servers and the command that runs them."""
