"""One module for each model family; `converters.base.families` finds them."""
