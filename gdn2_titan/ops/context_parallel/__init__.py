"""Sequences that devices share: ``api`` is what is called. On top of ``gdn2`` and ``short_conv``, never below them."""
