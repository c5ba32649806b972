"""A prompt's way through a model, step by step: what the lecture draws on the board, on the real weights.

`explain_gguf` runs a GGUF model in llama.cpp, `explain_checkpoint` any Hugging Face model in torch; both give an
`Explanation`, which the command line, JSON and `html` show. Nothing here prints.
"""
