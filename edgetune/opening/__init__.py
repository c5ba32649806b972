"""A model's name, path or run → a model that is open, on the engine that can run it. For every front end.

`files` finds what a name means, `writers` opens models that write, `encoders` those that read, `answers` turns texts
into replies of either kind of writer. Nothing is imported here: a command's help needs no engine.
"""
