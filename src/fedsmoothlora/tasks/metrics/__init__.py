"""Metrics that are too costly for every row and every round."""

from fedsmoothlora.tasks.metrics.base import Measurement, Times

__all__ = ["Measurement", "Times"]
