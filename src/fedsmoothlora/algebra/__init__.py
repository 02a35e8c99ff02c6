"""Plain tensors: low-rank products, singular vectors, sketches, averages, schedules and seeds."""
