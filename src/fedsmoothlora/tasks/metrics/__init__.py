"""Metrics that are too costly to be measured on every row and in every round."""

from fedsmoothlora.tasks.metrics.base import Measurement, Times

__all__ = ["Measurement", "Times"]
