"""The inverse Fisher in closed form: one file for each way to get it."""
