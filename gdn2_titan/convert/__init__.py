"""Checkpoints out of TorchTitan and into it: Hugging Face folders, plain torch files, flash-linear-attention's layout,
the authors' layout. ``python -m gdn2_titan.convert --help`` lists the commands.

Every format is read and written tensor by tensor, so that the memory needed does not grow with the model. No code from
a file runs. What is written appears under its final name only when all of it is on disk.
"""
