"""A base in a GGUF file, in torch: frozen in its quantized blocks, so that an adapter is trained against the very
weights that will serve it, in about as much memory as the file takes.

`blocks` keeps matrices in blocks, `modules` computes with them, `load` builds the model and compares it with llama.cpp,
`tokenizer` makes token ids as llama.cpp does. Which weight lies where is told by the export bridge.
"""
