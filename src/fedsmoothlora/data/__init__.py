"""Data: where it comes from, how it is split among clients, and how it becomes batches."""
