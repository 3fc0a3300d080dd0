"""Prune a PyTorch network to the latency, memory and size that are measured on your board.

The pipeline, one module and one command per stage:
load -> trace -> profile -> score -> plan -> compact -> recover -> export -> validate -> bundle -> report.
"""

__version__ = "0.1.0"
