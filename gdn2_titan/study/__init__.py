"""Studies of what a model does. ``python -m gdn2_titan.study --help`` lists them."""
