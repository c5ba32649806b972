"""Models that run in torch: what llama.cpp has no graph for, behind the same seam as the llama.cpp engines.

The only modules of the engine that import torch, transformers or PEFT, each inside the functions that need them, so
that importing this package costs nothing.
"""
