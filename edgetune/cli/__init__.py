"""The command line: parse, call a stage, render. One module per verb, loaded when the verb is used.

stdout carries data alone (generated text, JSON, paths); everything else goes to stderr. Exit codes are made in `main`.
"""
