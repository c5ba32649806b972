"""Engines: a model loaded and run, token by token. llama.cpp's is in `llama`; the seam for others is `protocol`.

The only home of llama.cpp's low-level bindings beside `quantize`. Knows nothing of conversations or front ends.
"""
