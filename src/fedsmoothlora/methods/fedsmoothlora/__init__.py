"""FedSmoothLoRA (arXiv 2605.29460): the algorithm is in `method`."""

from fedsmoothlora.methods.fedsmoothlora.method import FedSmoothLoRA as FedSmoothLoRA
