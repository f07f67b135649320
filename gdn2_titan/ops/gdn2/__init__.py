"""The operator: ``api`` is what is called, ``reference`` what it computes."""
