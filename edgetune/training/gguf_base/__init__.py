"""A base in a GGUF file, in torch: frozen in its quantized blocks, so that an adapter is trained against the very
weights that will serve it, in about as much memory as the file takes.

`blocks` keeps matrices in blocks, `modules` and `experts` compute with them, `fill` puts them into a model, `load`
compares that with llama.cpp, `config` says what model it is, `tokenizer` makes token ids as llama.cpp does. The export
bridge tells which weight lies where.
"""
